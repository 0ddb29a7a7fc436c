"""What KTO compares a step's rows with; columns of pairs that are asked for and not there."""

import json

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.recipes.dpo import mismatched
from posttrain.types import TokenSeq

TURNS = TokenSeq((1, 2, 3, 4, 5, 6, 7), (False, False, True, True, False, False, True))
"""A prompt of two tokens; an answer of two, another's turn of two, and an answer of one."""
SINGLE = TokenSeq((8, 9, 10), (False, True, True))


def test_what_is_not_trained_is_no_part_of_z():
    first, second = mismatched([SINGLE, TURNS])
    assert first == TokenSeq((8, 3, 4, 5, 6, 7), (False, True, True, False, False, True))
    assert second == TokenSeq((1, 2, 9, 10), (False, False, True, True))
    assert sum(sequence.num_loss_tokens for sequence in (first, second)) == 5


def rows(data_dir, tmp_path, count):
    path = tmp_path / "few.jsonl"
    path.write_text("".join((data_dir / "kto.jsonl").read_text().splitlines(keepends=True)[:count]))
    return [{"path": str(path)}]


def test_z_of_conversations_is_the_mean_over_their_trained_tokens(train, runner, data_dir, tmp_path, model_dir):
    """After one step z is what loops over the exchanged rows give, with the turns of the user left out."""
    from posttrain.data.load import load_kto
    from posttrain.models.load import load_policy
    from posttrain.recipes.experience.engines import EngineSource, make_engine

    def row(n):
        prompt = [{"role": "user", "content": f"What is {n} plus 2?"}]
        turns = [("assistant", f"{n + 2}"), ("user", "Are you sure? " * 4), ("assistant", "Yes." * n)]
        completion = [{"role": role, "content": text} for role, text in turns]
        return {"prompt": prompt, "completion": completion, "label": True}

    path = tmp_path / "turns.jsonl"
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in (1, 2, 3)))
    options = {"loss_type": "kto", "datasets": [{"path": str(path)}], "lr_scheduler_type": "constant"}
    found = runner.rows(train("dpo", name="two", max_steps=2, **options))[1]["kl"]

    after_one = train("dpo", name="one", max_steps=1, **options) / "model"
    keys = runner.keys_of("dpo", model_dir("qwen3"), data_dir, **options)
    data = load_kto(keys, load_policy(keys, trainable=False).tokenizer)
    order = [data.rows[index][0] for index in data.order(keys.seed, 1)]
    engines = [
        make_engine(EngineSource(keys.model_copy(update={"base_model": str(base)})))
        for base in (after_one, model_dir("qwen3"))
    ]
    total = 0.0
    for prompt, other in zip(order, [order[-1], *order[:-1]], strict=True):
        start, first = prompt.loss_mask.index(True), other.loss_mask.index(True)
        sequence = (prompt.ids[:start] + other.ids[first:], start)
        now, given = (engine.score([sequence])[0] for engine in engines)
        total += sum(a - b for a, b, on in zip(now, given, other.loss_mask[first:], strict=True) if on)
    assert 0 < found == pytest.approx(total / 3, rel=1e-3)


def test_a_step_of_one_row_is_refused(train, data_dir, tmp_path):
    options = {"per_device_train_batch_size": 1}
    with pytest.raises(ConfigError, match=r"kto with one row per optimizer step.*raise per_device_train_batch_size"):
        train("dpo", loss_type="kto", datasets=rows(data_dir, tmp_path, 4), **options)
    split = train(
        "dpo", loss_type="kto", datasets=rows(data_dir, tmp_path, 4), gradient_accumulation_steps=2, **options
    )
    assert (split / "result.json").exists()


def test_a_single_row_is_refused(train, data_dir, tmp_path):
    with pytest.raises(DataError, match="datasets: loss_type: kto needs at least 2 rows, got 1"):
        train("dpo", loss_type="kto", datasets=rows(data_dir, tmp_path, 1))
    one = rows(data_dir, tmp_path, 1)
    with pytest.raises(DataError, match="eval_datasets: loss_type: kto needs at least 2 rows, got 1"):
        train("dpo", loss_type="kto", datasets=[{"path": str(data_dir / "kto.jsonl")}], eval_datasets=one)


def test_a_remainder_of_one_row_is_folded_in(train, runner, data_dir, tmp_path):
    """Five rows, four a step, two epochs: two steps of five."""
    data = rows(data_dir, tmp_path, 5)
    folder = train("dpo", loss_type="kto", datasets=data, max_steps=-1, num_train_epochs=2)
    assert [row["epoch"] for row in runner.rows(folder)] == [1.0, 2.0]


@pytest.mark.parametrize(("asked", "column"), [({"row_weights": True}, "weight"), ({"margin_coef": 0.5}, "margin")])
def test_a_key_that_reads_a_column_which_no_pair_has_is_refused(asked, column, train):
    with pytest.raises(DataError, match=f"no row has a `{column}` other than"):
        train("dpo", **asked)
