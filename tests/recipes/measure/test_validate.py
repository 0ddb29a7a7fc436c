"""When a run validates and saves, by steps and by shares of them, and when it ends early."""

import json
import math
from itertools import chain, repeat

import pytest

from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.optimizing import step_interval
from posttrain.config.preference import DPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.errors import ConfigError
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


def two_sets(data_dir, kind="sft", **more):
    path = str(data_dir / f"dev-{kind}.jsonl")
    return {
        "eval_datasets": [{"path": path, "eval_name": "dev"}, {"path": path, "eval_name": "few", "limit": 1}],
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "file", "metric"),
    [
        ("sft", "sft", "loss"),
        ("dpo", "pairs", "loss"),
        ("dpo", "pairs", "rewards/accuracies"),
        ("reward_model", "pairs", "loss"),
        ("process_reward_model", "steps", "accuracy"),
        ("grpo", "prompts", "reward"),
    ],
)
def test_each_validation_set_has_metrics_of_its_own(train, data_dir, kind, file, metric):
    """What a set measures is what it would measure as the only one, without a name."""
    both = metrics(train(kind, max_steps=1, name="both", **two_sets(data_dir, file)))[-1]
    alone = metrics(train(kind, max_steps=1, name="alone", **dev(data_dir, file)))[-1]
    assert both[f"eval_dev_{metric}"] == alone[f"eval_{metric}"]
    assert f"eval_few_{metric}" in both and f"eval_{metric}" not in both
    found, said = {name for name in alone if name.startswith("eval_")}, STAGE_KINDS[kind].keys.validated
    assert said == ("…",) or {f"eval_{name}" for name in said} - {"eval_aux_loss"} == found


def test_the_named_metric_decides_which_checkpoint_is_best(train, data_dir, tmp_path):
    """Of two sets that disagree: the rows of training, and other answers to them."""
    row = {"prompt": "What is 1 + 1?", "completion": "2"}
    files = {"same": row, "other": row | {"completion": "zzzz"}}
    for name, one in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n")
    sets = [{"path": str(tmp_path / f"{name}.jsonl"), "eval_name": name} for name in files]
    keys = {"max_steps": 6, "eval_steps": 1, "learning_rate": 1e-2, "load_best_model_at_end": True}
    given = {"datasets": [{"path": str(tmp_path / "same.jsonl")}], "eval_datasets": sets, **keys}
    best = {}
    for chosen, greater in (("eval_same_loss", None), ("eval_other_loss", None), ("eval_same_loss", True)):
        folder = train(
            "sft", name=f"{chosen}-{greater}", metric_for_best_model=chosen, greater_is_better=greater, **given
        )
        values = [line[chosen] for line in metrics(folder)]
        picked = (max if greater else min)(values)
        assert read_json(folder / "checkpoints/best.json")["step"] == 1 + values.index(picked)
        best[chosen, greater] = 1 + values.index(picked)
    assert len(set(best.values())) > 1


def test_a_run_that_was_killed_measures_its_sets_as_if_it_had_not_been(train, runner, data_dir):
    keys = {"eval_steps": 2, "save_steps": 2, "max_steps": 4, "load_best_model_at_end": True}
    keys |= two_sets(data_dir, metric_for_best_model="eval_few_loss")
    train("sft", name="cut", stop_after=3, **keys)
    cut, whole = (train("sft", name=name, **keys) for name in ("cut", "whole"))
    names = ("eval_dev_loss", "eval_few_loss")
    assert [[row.get(n) for n in names] for row in metrics(cut)] == [
        [row.get(n) for n in names] for row in metrics(whole)
    ]
    assert read_json(cut / "checkpoints/best.json") == read_json(whole / "checkpoints/best.json")
    assert read_json(cut / "result.json")["metrics"] == read_json(whole / "result.json")["metrics"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric_for_best_model": "eval_art_loss"}, "eval_art_loss is not measured here; expected one of eval_dev_loss, eval_dev_mean_token_accuracy, "),
        ({"metric_for_best_model": "eval_dev_los"}, "eval_dev_los is not measured here; expected one of eval_dev_loss, "),
        ({"load_best_model_at_end": True}, "set metric_for_best_model, such as eval_dev_loss"),
        ({"eval_datasets": [{"path": "a.jsonl", "eval_name": "a b"}]}, "expected letters, digits"),
        ({"datasets": [{"path": "d.jsonl", "eval_name": "math"}]}, r"datasets\[0\].eval_name: math: none of its rows are held out"),
        ({"eval_datasets": [{"path": "a.jsonl", "val_size": 3}]}, r"eval_datasets\[0\].val_size: 3: all of its rows"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_told_apart_or_do_not_decide_are_refused(data_dir, keys, message):
    with pytest.raises(ValueError, match=message):
        SFTKeys(**{"base_model": "m", "datasets": [{"path": "d.jsonl"}], **two_sets(data_dir), **keys})


def test_a_metric_that_no_validation_gives_is_named_and_costs_no_training_that_is_over(train, data_dir, caplog):
    mistyped = two_sets(data_dir, "pairs", metric_for_best_model="eval_dev_los", load_best_model_at_end=True)
    why = "eval_dev_los is not measured; expected one of eval_dev_logps/chosen, "
    with pytest.raises(ConfigError, match=why):
        train("dpo", name="early", max_steps=2, **mistyped | {"eval_steps": 1})
    folder = train("dpo", name="late", max_steps=1, **mistyped)
    assert (folder / "model" / "model.safetensors").exists() and why in caplog.text


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
