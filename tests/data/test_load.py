"""The recipes' entry points: what is kept, what is counted, what is refused."""

import pytest

from posttrain.config.preference import DPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.data.dataset import origin, sequences
from posttrain.data.load import load_kto, load_preference, load_prompts, load_sft, read_nouns
from posttrain.data.parse import IDENTICAL
from posttrain.data.render import draft_example, tokenize
from posttrain.data.rendered import DROPPED, REWRITTEN
from posttrain.errors import DataError
from posttrain.types import Example, Origin


def render_example(tokenizer, example, train_on="assistant"):
    return tokenize(tokenizer, draft_example(tokenizer, example, train_on)).seqs[0]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sft(path, **keys):
    return SFTKeys(base_model="x", datasets=[{"path": str(path)}], **keys)


def test_rows_are_those_of_render_and_the_summary_counts_them(write_jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    rows = [chat("Hello", "fine"), chat("2+2?", "4"), {"messages": [{"role": "user", "content": "a"}]}]
    data = load_sft(sft(write_jsonl(rows)), tokenizer)
    assert len(data) == 2
    for row, raw in zip(data, rows[:2], strict=True):
        assert row == render_example(tokenizer, Example(row.origin, messages=tuple(raw["messages"])))
    (source,) = data.summary.sources
    assert (source.rows_read, source.rows_kept) == (3, 2)
    assert source.skipped["no assistant turn"].count == 1
    assert source.skipped["no assistant turn"].first[0].endswith("train.jsonl:3")
    assert source.tokens == sum(len(row.ids) for row in data)
    assert source.loss_tokens == sum(row.num_loss_tokens for row in data)
    assert source.lengths["max"] == max(len(row.ids) for row in data)
    text = "\n".join(data.summary.lines())
    assert "chat (column `messages` in all 3 rows); 2 of 3 rows" in text
    assert "skipped 1: no assistant turn (" in text


def test_short_rows_and_repeated_rows_are_left_out_where_asked(write_jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    rows = [chat("Hello", "fine"), chat("Hello", "Yes No " * 30), chat("Hello", "fine"), chat("Hello", "Yes")]
    first, second = write_jsonl(rows, "first.jsonl"), write_jsonl([rows[1], chat("Yes", "No")], "second.jsonl")

    def load(**options):
        return load_sft(sft(first, **options).model_copy(update={"datasets": both}), tokenizer)

    both = sft(first).datasets + sft(second).datasets
    whole = load()
    lengths = [len(row.ids) for row in whole]
    long = load(min_sample_len=max(lengths))
    assert [len(row.ids) for row in long] == [max(lengths)] * 2
    assert long.summary.sources[0].skipped["shorter than min_sample_len"].count == 3
    once = load(deduplicate=True)
    assert [row.ids for row in once] == [whole.rows[i].ids for i in (0, 1, 3, 5)]
    again = [source.skipped["the same tokens as an earlier row"] for source in once.summary.sources]
    assert [skipped.lines for skipped in again] == [(3,), (1,)]


def test_overflow_drops_truncates_or_stops(write_jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    path = write_jsonl([chat("Hello", "fine"), chat("Hello", "Yes No " * 30), chat("Hello there " * 30, "Yes")])
    dropped = load_sft(sft(path, sequence_len=32), tokenizer)
    assert len(dropped) == 1
    assert dropped.summary.sources[0].skipped["longer than sequence_len"].count == 2
    cut = load_sft(sft(path, sequence_len=32, overflow="truncate"), tokenizer)
    assert [len(row.ids) for row in cut][1] == 32 and len(cut) == 2
    assert cut.rows[1].loss_mask[-1]
    (source,) = cut.summary.sources
    assert source.notes["truncated to sequence_len"] == 1
    skipped = source.skipped["nothing left to train after truncation"]
    assert skipped.count == 1 and skipped.first[0].endswith(":3")
    with pytest.raises(DataError, match=r"train\.jsonl:2: \d+ tokens > sequence_len = 32; raise sequence_len"):
        load_sft(sft(path, sequence_len=32, overflow="error"), tokenizer)


def test_all_masked_data_is_an_error_with_the_counts(write_jsonl, tokenizer_of):
    asked = {"messages": [{"role": "user", "content": "a"}]}
    muted = {"messages": [*chat("a", "b")["messages"][:1], {"role": "assistant", "content": "b", "weight": 0}]}
    path = write_jsonl([asked, asked, muted, chat("a", "")])
    with pytest.raises(
        DataError, match=r"none of 4 rows can be used: 3 no assistant turn \(first .*:1\); 1 empty completion"
    ):
        load_sft(sft(path), tokenizer_of("chatml"))
    with pytest.raises(DataError, match=r"none of 1 rows can be used: 1 longer than sequence_len"):
        load_sft(sft(write_jsonl([chat("Hello " * 50, "a")]), sequence_len=8), tokenizer_of("chatml"))


def test_train_on_last_of_a_row_whose_last_turn_is_muted_is_counted(write_jsonl, tokenizer_of):
    muted = chat("a", "b")["messages"] + [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0},
    ]
    data = load_sft(sft(write_jsonl([chat("a", "b"), {"messages": muted}]), train_on="last"), tokenizer_of("chatml"))
    assert data.summary.sources[0].skipped["nothing to train"].count == 1


def test_eval_sources_and_weights(write_jsonl, tokenizer_of):
    train, more = write_jsonl([chat("a", "b")] * 4), write_jsonl([chat("c", "d")] * 2, "more.jsonl")
    keys = SFTKeys(
        base_model="x",
        datasets=[{"path": str(train), "weight": 1}, {"path": str(more), "weight": 2}],
        eval_datasets=[{"path": str(more)}],
    )
    data = load_sft(keys, tokenizer_of("chatml"))
    assert (data.sizes, data.weights) == ((4, 2), (1.0, 2.0))
    assert sorted(i >= 4 for i in data.order(0, 0)) == [False] * 2 + [True] * 4
    assert len(load_sft(keys, tokenizer_of("chatml"), sources=keys.eval_datasets)) == 2


def test_digest_follows_rows_and_weights_not_file_names(write_jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    one = load_sft(sft(write_jsonl([chat("a", "b")], "one.jsonl")), tokenizer)
    same = load_sft(sft(write_jsonl([chat("a", "b")], "two.jsonl")), tokenizer)
    other = load_sft(sft(write_jsonl([chat("a", "c")], "three.jsonl")), tokenizer)
    weighted = load_sft(
        SFTKeys(base_model="x", datasets=[{"path": str(write_jsonl([chat("a", "b")])), "weight": 2}]), tokenizer
    )
    assert one.digest == same.digest and len({one.digest, other.digest, weighted.digest}) == 3


def test_preference_and_kto(write_jsonl, tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    path = write_jsonl(
        [
            {"prompt": "The answer is", "chosen": " 4", "rejected": " 5"},
            {"prompt": "The answer is", "chosen": " 4", "rejected": " 4"},
        ]
    )
    pairs = load_preference(DPOKeys(base_model="x", datasets=[{"path": str(path)}]), tokenizer)
    assert len(pairs) == 1 and pairs.summary.sources[0].skipped["identical chosen and rejected"].count == 1
    keys = DPOKeys(base_model="x", loss_type="kto", datasets=[{"path": str(path)}])
    unpaired = load_kto(keys, tokenizer)
    assert [row for row, _ in unpaired] == list(pairs.rows[0][:2]) and [label for _, label in unpaired] == [True, False]
    labelled = write_jsonl([{"prompt": "The answer is", "completion": " 4", "label": True}], "kto.jsonl")
    own = load_kto(DPOKeys(base_model="x", loss_type="kto", datasets=[{"path": str(labelled)}]), tokenizer)
    assert [(row.ids, row.loss_mask, label) for row, label in own] == [
        (row.ids, row.loss_mask, label) for row, label in unpaired
    ][:1]


def test_prompts_leave_room_for_the_completion(write_jsonl, tokenizer_of):
    tokenizer = tokenizer_of("raw")
    path = write_jsonl([{"prompt": "2+2=", "answer": 4}, {"prompt": "Yes No " * 20 + "2+2=", "answer": 4}])

    def keys(**more):
        return GRPOKeys(base_model="x", datasets=[{"path": str(path)}], reward_funcs=["r"], sequence_len=20, **more)

    data = load_prompts(keys(max_completion_length=8), tokenizer)
    prompt, ids = data.rows[0]
    assert (prompt.prompt, dict(prompt.columns), ids) == ("2+2=", {"answer": 4}, tuple(tokenizer("2+2=")["input_ids"]))
    assert data.summary.sources[0].skipped["longer than sequence_len"].count == 1
    cut = load_prompts(keys(max_completion_length=8, overflow="truncate"), tokenizer)
    assert len(cut.rows[1][1]) == 12 and cut.rows[1][1][-len(ids) :] == ids
    with pytest.raises(DataError, match=r"sequence_len=20 leaves no room for a prompt beside max_completion_length=20"):
        load_prompts(keys(max_completion_length=20), tokenizer)


def test_a_source_of_which_nothing_is_left_is_refused_even_beside_others(write_jsonl, tokenizer_of):
    good, bad = write_jsonl([chat("a", "b")]), write_jsonl([chat("a", "")], "bad.jsonl")
    keys = SFTKeys(base_model="x", datasets=[{"path": str(good)}, {"path": str(bad)}])
    with pytest.raises(DataError, match=r"bad\.jsonl: none of 1 rows can be used: 1 empty completion"):
        load_sft(keys, tokenizer_of("chatml"))


def test_notes_say_what_was_handled_specially(write_jsonl, tokenizer_of):
    think = "<think>\nx\n</think>\n\ny"
    path = write_jsonl([{"messages": chat("a", think)["messages"] + chat("b", think)["messages"]}])
    data = load_sft(sft(path), tokenizer_of("qwen3"))
    assert data.summary.sources[0].notes == {DROPPED: 1, REWRITTEN: 1}
    text = write_jsonl([{"prompt": "The answer is ", "completion": "Paris"}], "text.jsonl")
    assert next(iter(load_sft(sft(text), tokenizer_of("raw")).summary.sources[0].notes)).startswith(
        "prompt and answer tokenised apart"
    )


def test_nouns_and_row_access(write_jsonl, tokenizer_of):
    path = write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    keys = DPOKeys(base_model="x", datasets=[{"path": str(path)}])
    assert [noun.chosen for noun in read_nouns(keys.datasets, "pairs")] == ["b"]
    assert [noun.label for noun in read_nouns(keys.datasets, "labels")] == [True, False]
    row = load_preference(keys, tokenizer_of("raw")).rows[0]
    assert sequences(row) == row[:2] and isinstance(origin(row), Origin) and origin(row).line == 1


def test_margin_and_weight_of_a_pair_are_read_and_come_back_from_the_cache(write_jsonl, tokenizer_of):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "d", "rejected": "c", "margin": 1.5, "weight": 0},
    ]
    keys = DPOKeys(base_model="x", datasets=[{"path": str(write_jsonl(rows))}])
    for _ in range(2):
        found = load_preference(keys, tokenizer_of("raw")).rows
        assert [(row.margin, row.weight) for row in found] == [(0.0, 1.0), (1.5, 0.0)]


@pytest.mark.parametrize(
    ("weight", "message"),
    [("much", '`weight` is str "much"'), (-1, "expected 0 or more"), (True, "how much the pair counts")],
)
def test_a_weight_that_is_none_is_an_error_with_its_line(write_jsonl, tokenizer_of, weight, message):
    path = write_jsonl([{"prompt": "a", "chosen": "b", "rejected": "c", "weight": weight}])
    with pytest.raises(DataError, match=rf"train.jsonl:1: .*{message}"):
        load_preference(DPOKeys(base_model="x", datasets=[{"path": str(path)}]), tokenizer_of("raw"))


def test_a_pair_that_is_equal_after_truncation_counts_as_identical(write_jsonl, tokenizer_of):
    long = "a" * 200
    rows = [
        {"prompt": "ok", "chosen": f"{long}X", "rejected": f"{long}Y"},
        {"prompt": "ok", "chosen": "yes", "rejected": "no"},
    ]
    keys = DPOKeys(base_model="x", datasets=[{"path": str(write_jsonl(rows))}], sequence_len=64, overflow="truncate")
    data = load_preference(keys, tokenizer_of("raw"))
    assert len(data) == 1 and data.summary.sources[0].skipped[IDENTICAL].lines == (1,)


@pytest.mark.parametrize("name", ["prompts", "completions", "self"])
def test_a_column_that_a_reward_could_not_be_given_is_refused_when_read(write_jsonl, name):
    path = write_jsonl([{"prompt": "a"}, {"prompt": "b", name: 1}])
    with pytest.raises(DataError, match=rf"train\.jsonl:2: the column `{name}` has the name of a reward"):
        read_nouns(GRPOKeys(base_model="x", datasets=[{"path": str(path)}], reward_funcs=["r"]).datasets, "prompts")


LONG = [{"text": "many words " * n + "."} for n in (1, 30, 2, 9)]


def end_to_end(data):
    return [token for row in data for token in row.ids]


def test_wrapped_rows_are_all_rows_end_to_end_in_blocks_of_one_length(write_jsonl, tokenizer_of):
    tokenizer, path = tokenizer_of("chatml"), write_jsonl(LONG)
    whole = load_sft(sft(path, sequence_len=1000), tokenizer)
    blocks = load_sft(sft(path, sequence_len=16, packing=True, packing_strategy="wrapped"), tokenizer)
    assert end_to_end(blocks) == end_to_end(whole)
    lengths = [len(row.ids) for row in blocks]
    assert set(lengths[:-1]) == {16} and 0 < lengths[-1] <= 16 and len(lengths) > 3
    assert origin(blocks.rows[-1]).line == 4 and origin(blocks.rows[1]).line == 2
    again = load_sft(sft(path, sequence_len=16, packing=True, packing_strategy="wrapped"), tokenizer)
    assert again.summary.cache == "hit" and again.rows == blocks.rows


def test_a_text_that_is_split_loses_no_token_and_the_others_stay_whole(write_jsonl, tokenizer_of):
    tokenizer, path = tokenizer_of("chatml"), write_jsonl(LONG)
    whole = load_sft(sft(path, sequence_len=1000), tokenizer)
    parts = load_sft(sft(path, sequence_len=16, overflow="split"), tokenizer)
    assert end_to_end(parts) == end_to_end(whole)
    assert parts.rows[0] == whole.rows[0] and max(len(row.ids) for row in parts) == 16
    (source,) = parts.summary.sources
    assert source.notes["cut into rows of sequence_len"] == sum(len(row.ids) > 16 for row in whole)


def test_a_conversation_is_not_split(write_jsonl, tokenizer_of):
    with pytest.raises(DataError, match=r"train\.jsonl:1: .* parts of this row would lack its prompt"):
        load_sft(
            sft(write_jsonl([chat("Hello", "fine " * 40)]), sequence_len=16, overflow="split"), tokenizer_of("chatml")
        )
    with pytest.raises(ValueError, match="overflow: split cuts plain text"):
        DPOKeys(base_model="m", datasets=[{"path": "a"}], overflow="split")
