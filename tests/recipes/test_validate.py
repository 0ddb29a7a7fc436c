"""When a run validates and saves, by steps and by shares of them, and when it ends early."""

import json
import math
from itertools import chain, repeat

import pytest

from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import DPOKeys, SFTKeys, step_interval
from posttrain.files import read_json, read_json_lines

WAIT = {
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
    "max_steps": 12,
    "learning_rate": 0.5,
}


def metrics(folder):
    return [row for _, row in read_json_lines(folder / "metrics.jsonl")]


def measured(folder):
    return [row["step"] for row in metrics(folder) if "eval_loss" in row]


def dev(data_dir, kind="sft"):
    return {"eval_datasets": [{"path": str(data_dir / f"dev-{kind}.jsonl")}]}


def test_a_share_of_the_steps_is_rounded_up_as_in_transformers():
    assert [step_interval(steps, 10) for steps in (0, 4, 0.5, 0.25, 0.01)] == [0, 4, 5, 3, 1]


def test_a_run_validates_and_saves_by_shares_of_its_steps(train, data_dir):
    folder = train("sft", max_steps=8, eval_steps=0.25, save_steps=0.5, save_total_limit=9, **dev(data_dir))
    assert measured(folder) == [2, 4, 6, 8]
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000008"]


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward_model"])
def test_a_run_ends_after_so_many_validations_without_a_better_one(train, data_dir, tmp_path, kind):
    """Pairs are held against their contrary, so that they only get worse."""
    turned = tmp_path / "turned.jsonl"
    pairs = [row for _, row in read_json_lines(data_dir / "dev-pairs.jsonl")]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]
    turned.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    held = dev(data_dir) if kind == "sft" else {"eval_datasets": [{"path": str(turned)}], "learning_rate": 1e-3}
    folder = train(kind, **{**WAIT, **held})
    losses = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 12, losses
    assert [row["validations_since_best"] for row in metrics(folder)][best:] == [0.0, 1.0, 2.0]
    assert read_json(folder / "result.json")["steps"] == len(losses)


def test_a_run_that_was_killed_after_its_early_end_takes_no_further_step(train, data_dir):
    folder = train("sft", name="early", **WAIT, **dev(data_dir))
    steps, weights = len(metrics(folder)), (folder / "model/model.safetensors").read_bytes()
    (folder / "result.json").unlink()
    again = train("sft", name="early", **WAIT, **dev(data_dir))
    assert len(metrics(again)) == steps
    assert (again / "model/model.safetensors").read_bytes() == weights


def test_the_count_outlives_a_stop_between_validations(train, data_dir):
    whole = train("sft", name="whole", **WAIT, **dev(data_dir))
    last = len(metrics(whole))
    train("sft", name="halves", stop_after=last - 1, **WAIT, **dev(data_dir))
    halves = train("sft", name="halves", **WAIT, **dev(data_dir))
    assert [row["validations_since_best"] for row in metrics(halves)] == [
        row["validations_since_best"] for row in metrics(whole)
    ]


def test_a_validation_that_a_health_rule_asks_for_does_not_bring_the_early_end_nearer(train, data_dir, monkeypatch):
    losses = chain([1.0], repeat(2.0))
    monkeypatch.setattr("posttrain.recipes.sft.validation_loss", lambda *args, **kwargs: {"eval_loss": next(losses)})
    asks = {"gradient_spike": {"times": 0.0, "after": 1, "at_least": 0.0, "action": "evaluate"}}
    folder = train("sft", **{**WAIT, "eval_steps": 5}, health=asks, **dev(data_dir))
    waited = {row["step"]: row["validations_since_best"] for row in metrics(folder) if "eval_loss" in row}
    asked = [step for step in waited if step % 5]
    assert asked[0] < 5 < asked[-1], "the rule asks before the cadence does, and again between"
    assert waited == {asked[0]: 0.0, 5: 1.0} | dict.fromkeys(asked[1:], 1.0) | {10: 2.0}


def test_a_validation_without_a_number_is_never_the_best(train, data_dir, monkeypatch):
    losses = iter([math.nan, 3.0, 2.0, math.nan])
    monkeypatch.setattr("posttrain.recipes.sft.validation_loss", lambda *args, **kwargs: {"eval_loss": next(losses)})
    folder = train("sft", max_steps=4, eval_steps=1, load_best_model_at_end=True, **dev(data_dir))
    events = [event for _, event in read_json_lines(folder / "events.jsonl")]
    assert [e["step"] for e in events if e["kind"] == "notice" and "the best on held-out rows" in e["message"]] == [3]


@pytest.mark.parametrize(
    ("model", "keys", "said"),
    [
        (SFTKeys, {"early_stopping_patience": 2}, "needs load_best_model_at_end: true and eval_steps"),
        (
            DPOKeys,
            {"early_stopping_patience": 2, "load_best_model_at_end": True},
            "needs load_best_model_at_end: true and eval_steps",
        ),
        (
            GRPOKeys,
            {"early_stopping_patience": 2, "load_best_model_at_end": True, "eval_steps": 5, "reward_funcs": ["boxed"]},
            "set max_steps",
        ),
        (SFTKeys, {"neftune_noise_alpha": 5, "sharding": {"sp_size": 2}}, "no process has a whole row"),
        (SFTKeys, {"eval_steps": 2.5}, "neither a number of steps nor a share"),
        (SFTKeys, {"save_steps": 0.5, "save_keep_every": 4}, "is not a multiple of save_steps=0.5"),
        (SFTKeys, {"label_smoothing_factor": 0.1, "loss_type": "dft"}, "which has no smoothed form"),
    ],
)
def test_what_cannot_be_is_refused(model, keys, said):
    with pytest.raises(ValueError, match=said):
        model(base_model="m", datasets=[{"path": "d.jsonl"}], **keys)
