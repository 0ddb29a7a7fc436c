import random

from posttrain.rollout.pages import PAGE, PageTable


def test_a_prompt_of_300_tokens_shares_its_first_page_and_has_the_second_copied():
    table = PageTable()
    prompt = table.add_prompt(300)
    copies = [table.add_row(prompt) for _ in range(3)]
    assert [row[0] for row in table.rows] == [prompt.pages[0]] * 3
    assert [copy.source for copy in copies] == [prompt.pages[1]] * 3
    assert [copy.target for copy in copies] == [row[1] for row in table.rows]
    assert len({prompt.pages[1], *(row[1] for row in table.rows)}) == 4


def test_a_row_gets_a_page_exactly_when_its_last_is_full():
    table = PageTable()
    table.add_row(table.add_prompt(PAGE - 1))
    assert [table.advance() for _ in range(PAGE + 2)] == [False, True, *[False] * (PAGE - 1), True]
    assert (table.lengths, len(table.rows[0])) == ([2 * PAGE + 1], 3)


def test_no_page_is_ever_written_by_two_and_all_are_free_when_everything_has_gone():
    rng, table, prompts = random.Random(0), PageTable(), []
    for _ in range(600):
        deed = rng.choice(("prompt", "row", "row", "advance", "advance", "drop row", "drop prompt"))
        if deed == "prompt" and len(prompts) < 5:
            prompts.append(table.add_prompt(rng.randint(1, 3 * PAGE)))
        elif deed == "row" and prompts and len(table.rows) < 12:
            table.add_row(rng.choice(prompts))
        elif deed == "advance":
            for _ in range(rng.randint(1, PAGE // 2)):
                table.advance()
        elif deed == "drop row" and table.rows:
            table.drop_row(rng.randrange(len(table.rows)))
        elif deed == "drop prompt" and prompts:
            table.drop_prompt(prompts.pop(rng.randrange(len(prompts))).pages)
        written = [
            row[(length - 1) // PAGE] for row, length in zip(table.rows, table.lengths, strict=True) if length % PAGE
        ]
        partial = [prompt.pages[-1] for prompt in prompts if prompt.length % PAGE]
        assert len({0, *written, *partial}) == 1 + len(written) + len(partial)
        assert all(len(row) * PAGE >= length for row, length in zip(table.rows, table.lengths, strict=True))
    while table.rows:
        table.drop_row(0)
    for prompt in prompts:
        table.drop_prompt(prompt.pages)
    assert table.num_free == table.num_pages - 1 > 20
