"""Steps over rows that are not counted before: each row once a pass, the same from every cursor on, and few of them held."""

import gc
import json

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.errors import CheckpointError, DataError
from posttrain.models.load import load_tokenizer
from posttrain.recipes.batches import flat
from posttrain.recipes.streamed import StreamedSchedule
from posttrain.types import TokenSeq

NUM_ROWS = 60
WAYS = {
    "by rows": {},
    "packed": {"packing": True},
    "wrapped": {"packing": True, "packing_strategy": "wrapped"},
    "split": {"packing": True, "overflow": "split"},
    "of two shares": {"num_processes": 2},
    "accumulated": {"gradient_accumulation_steps": 2},
}


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} " + "many words " * (n % 7)}) + "\n" for n in range(NUM_ROWS)))
    return path


@pytest.fixture
def streamed(rows_file, model_dir):
    def make(**options):
        given = {"per_device_train_batch_size": 2, "sequence_len": 32, "buffer_size": 20, "max_steps": 1000, "seed": 3}
        keys = SFTKeys(
            **{
                "base_model": str(model_dir("llama")),
                "datasets": [{"path": str(rows_file)}],
                "streaming": True,
                **given,
                **options,
            }
        )
        with join_ranks() as ranks:
            return StreamedSchedule(keys, load_tokenizer(keys), ranks)

    return make


def lines(micros):
    return [row.origin.line for row in flat(micros)]


@pytest.mark.parametrize("options", [WAYS["by rows"], WAYS["packed"], WAYS["of two shares"]])
def test_a_pass_has_every_row_once_and_the_next_in_another_order(streamed, options):
    schedule, seen, step = streamed(overflow="truncate", **options), [], 0
    while step < 200 and len(seen) < 2 * NUM_ROWS:
        seen += lines(schedule.step(step))
        step += 1
    assert sorted(seen[:NUM_ROWS]) == list(range(1, NUM_ROWS + 1))
    assert sorted(seen[NUM_ROWS : 2 * NUM_ROWS]) == list(range(1, NUM_ROWS + 1))
    assert seen[:NUM_ROWS] != sorted(seen[:NUM_ROWS]) and seen[:NUM_ROWS] != seen[NUM_ROWS : 2 * NUM_ROWS]


def test_the_order_is_a_function_of_the_seed(streamed):
    first, again, other = (streamed(seed=seed).step(0) for seed in (3, 3, 4))
    assert first == again != other


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", [1, 9, 40])
def test_from_a_cursor_on_the_steps_are_those_of_the_run_that_was_not_cut(streamed, way, at):
    """Also where steps are left out behind it, as after a rollback."""
    whole = streamed(**WAYS[way])
    whole.step(at - 1)
    later = streamed(**WAYS[way])
    later.go_on(json.loads(json.dumps(whole.cursor)))
    expected = [whole.step(step) for step in range(at, at + 12)]
    assert [later.step(step) for step in range(at, at + 6)] == expected[:6]
    assert later.step(at + 11) == expected[11]
    assert later.cursor == whole.cursor


def test_every_second_micro_batch_has_the_rows_of_one_of_two_shares(streamed):
    both = streamed(num_processes=2).step(0)
    assert {line % 2 for line in lines(both[::2])} == {1} and {line % 2 for line in lines(both[1::2])} == {0}


@pytest.mark.slow
def test_what_is_held_does_not_grow_with_the_file(streamed, rows_file):
    """Counted are the sequences that are alive, after many passes' worth of rows."""
    rows_file.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(2000)))
    schedule = streamed(buffer_size=50)
    for step in range(600):
        schedule.step(step)
        if step % 100 == 99:
            gc.collect()
            alive = sum(
                isinstance(one, TokenSeq) and str(one.origin).startswith(str(rows_file)) for one in gc.get_objects()
            )
            assert 0 < alive <= 50 + 2


def test_rows_left_out_are_counted_over_a_resume(streamed, tmp_path, caplog):
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"text": "long " * 40 if n % 2 else "short"}) + "\n" for n in range(20)))
    schedule = streamed(datasets=[{"path": str(path)}], buffer_size=10)
    micros = schedule.step(0)
    assert schedule.balance(micros, 1) == {"rows_skipped": 5.0}
    assert "left out: longer than sequence_len" in caplog.text
    later = streamed(datasets=[{"path": str(path)}], buffer_size=10)
    later.go_on(schedule.cursor)
    assert later.balance(later.step(1), 1) == {"rows_skipped": 5.0}


def test_rows_that_give_nothing_to_train_are_refused(streamed, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "long " * 40}) + "\n")
    with pytest.raises(DataError, match=r"a whole pass gave nothing to train: .*longer than sequence_len"):
        streamed(datasets=[{"path": str(path)}]).step(0)


def test_a_format_that_changes_on_the_way_is_named(streamed, tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"text": "a"}\n' * 20 + '{"prompt": "a", "completion": "b"}\n' * 20)
    schedule = streamed(datasets=[{"path": str(path)}])
    with pytest.raises(
        DataError, match=r"mixed\.jsonl:21: rows from here on are completion, and those before were text"
    ):
        for step in range(20):
            schedule.step(step)


def test_a_column_that_only_the_first_rows_have_is_asked_for_of_no_later_ones(streamed, tmp_path):
    """Not of the window that a resume begins in, and not of a share whose first rows lack it."""
    path, columns = tmp_path / "rare.jsonl", {"messages": "said", "tools": "offered"}
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(
        "".join(json.dumps({"said": said} | ({"offered": "[]"} if n == 0 else {})) + "\n" for n in range(40))
    )
    options = {
        "datasets": [{"path": str(path), "columns": columns}],
        "buffer_size": 4,
        "num_processes": 2,
        "sequence_len": 256,
    }
    whole = streamed(**options)
    whole.step(6)
    later = streamed(**options)
    later.go_on(whole.cursor)
    assert later.step(7) == whole.step(7)


def test_a_checkpoint_of_other_shares_is_refused(streamed):
    schedule = streamed(num_processes=2)
    schedule.step(0)
    with pytest.raises(CheckpointError, match="dealt to 2 processes, and this start has 1; set num_processes: 2"):
        streamed().go_on(schedule.cursor)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"max_steps": -1}, "streaming: true needs max_steps"),
        ({"val_size": 3}, "streaming: true with val_size"),
        ({"deduplicate": True}, "streaming: true with deduplicate"),
        ({"datasets": [{"path": "a", "weight": 1}, {"path": "b"}]}, "give all of them a weight, or none"),
    ],
)
def test_keys_that_need_all_rows_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SFTKeys(**{"base_model": "m", "datasets": [{"path": "a"}], "streaming": True, "max_steps": 3, **keys})


def test_a_streamed_run_trains_on_its_rows_and_says_what_it_looked_at(train, runner, rows_file):
    keys = {
        "datasets": [{"path": str(rows_file)}],
        "streaming": True,
        "buffer_size": 8,
        "max_steps": 12,
        "sequence_len": 32,
    }
    folder = train("sft", packing=True, packing_strategy="wrapped", **keys)
    assert len(runner.rows(folder)) == 12
    (data,) = json.loads((folder / "summary.json").read_text())["datasets"]
    assert data["sources"][0]["rows_read"] == 8 and data["cache"] == "none: the first 8 rows of a stream"
