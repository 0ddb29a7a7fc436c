"""Back to the last healthy checkpoint with something changed: end to end, killed at the worst moments, and to the end."""

import json
import os
import signal

import pytest
import torch

from posttrain.checkpoint.store import CheckpointStore
from posttrain.errors import TrainingError
from posttrain.health.controls import Controls
from posttrain.recipes import dpo, grpo, ppo, sft
from posttrain.recipes.optim import learning_rate
from posttrain.recipes.run import rollback
from posttrain.recipes.run.guard import TrainingGuard
from posttrain.recipes.run.rollback import begin_rollback, read_rollbacks
from posttrain.types import Finding, Severity

RECIPES = {"sft": (sft, "loss"), "grpo": (grpo, "loss"), "dpo": (dpo, "pair_loss"), "ppo": (ppo, "critic_loss")}
ONE_BY_ONE = {"per_device_train_batch_size": 1, "save_steps": 1, "max_steps": 5}
OPTIONS = {
    "sft": ONE_BY_ONE,
    "grpo": {**ONE_BY_ONE, "num_iterations": 2},
    "dpo": ONE_BY_ONE,
    "ppo": {**ONE_BY_ONE, "num_prompts_per_step": 1},
}


def events(folder, *kinds):
    lines = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["kind"] in kinds]


def result(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.fixture
def faulty(monkeypatch):
    """`faulty("sft")`: the loss of a micro-batch with the third row (or prompt) of the run is NaN, whenever it comes."""

    def inject(kind):
        module, name = RECIPES[kind]
        original, seen = getattr(module, name), {}

        def poisoned(policy, *args, **options):
            terms = original(policy, *args, **options)
            if not torch.is_grad_enabled():
                return terms  # a validation
            rows = next(arg for arg in args if isinstance(arg, list))
            places = [seen.setdefault(_key(row), len(seen)) for row in rows]
            return type(terms)(terms.loss * torch.nan, terms.metrics) if 2 in places else terms

        monkeypatch.setattr(module, name, poisoned)

    return inject


def _key(row):
    """What a row of SFT, a pair, or a group of rollouts is about: its prompt."""
    first = row[0] if isinstance(row, tuple) else row
    return first.ids if isinstance(first.ids, tuple) else tuple(first.ids[~first.loss_mask].tolist())


@pytest.mark.parametrize("kind", ["sft", "grpo", "dpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_a_poisoned_row_is_passed_over_and_the_run_ends_well(kind, faulty, train, runner):
    faulty(kind)
    folder = train(kind, **OPTIONS[kind])
    rows, [first] = runner.rows(folder), read_rollbacks(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert (first.rule, first.from_step, first.to_step) == ("nonfinite", 3, 2)
    assert (first.controls.lr_scale, first.controls.skipped, first.controls.seed_shift) == (0.5, 1, 1)
    usual = learning_rate(2, 5, runner.keys_of(kind, folder, folder, **OPTIONS[kind]))
    assert rows[2]["learning_rate"] == usual / 2
    assert all(torch.isfinite(tensor).all() for tensor in runner.weights(folder).values())
    told = events(folder, "rollback")
    assert [event["number"] for event in told] == [record["number"] for record in result(folder)["rollbacks"]]
    assert result(folder)["held"] == []
    steps = [json.loads(p.read_text())["step"] for p in (folder / "checkpoints").glob("step-*/SEAL.json")]
    assert sorted(steps) == [4, 5]


def test_a_healthy_run_is_not_rolled_back(train):
    folder = train("sft", save_steps=1)
    assert not (folder / "rollbacks.json").exists()
    assert result(folder)["rollbacks"] == [] and events(folder, "rollback", "action") == []


def test_without_a_checkpoint_it_goes_back_to_the_start(faulty, train, runner):
    faulty("sft")
    folder = train("sft", **{**ONE_BY_ONE, "save_steps": 0})
    assert [(r.from_step, r.to_step, r.controls.skipped) for r in read_rollbacks(folder)] == [(3, 0, 3)]
    assert len(runner.rows(folder)) == 5


def test_after_the_last_rollback_it_stops_and_says_why_and_what_to_change(train, tmp_path):
    always = {"gradient_spike": {"times": 0.0, "after": 2, "at_least": 0.0, "severity": "hard"}}
    with pytest.raises(TrainingError) as stopped:
        train("sft", name="run", save_steps=1, max_steps=6, health=always)
    text = str(stopped.value)
    assert text.startswith("step 3: gradient_spike: gradient norm") and "lower max_grad_norm" in text
    assert "after 2 rollbacks that did not help" in text and "learning rate ×0.25" in text
    first, second = read_rollbacks(tmp_path / "run")
    # The checkpoint that led here again is not trusted a second time.
    assert (first.to_step, second.to_step) == (2, 1)
    assert (first.controls.skipped, second.controls.skipped) == (1, 3)
    assert not (tmp_path / "run/model").exists()
    finding = events(tmp_path / "run", "finding")[-1]
    assert (finding["rule"], finding["action"], finding["severity"]) == ("gradient_spike", "rollback", "hard")


def test_evidence_that_reaches_back_leaves_the_checkpoints_within_it(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=9)
    for step in range(1, 8):
        store.save(step, lambda folder: (folder / "state.json").write_text("{}"))
    finding = Finding("zero_gradient", Severity.HARD, 8, {"grad_norm": 0.0}, "rollback", "no gradient", since=4)
    assert begin_rollback(tmp_path, store, finding, Controls(), most=2).to_step == 3


@pytest.mark.parametrize("chosen", ["best before", "best after"])
def test_the_best_checkpoint_is_one_of_those_that_are_left(chosen, faulty, train, data_dir, runner):
    faulty("sft")
    dev = {
        "eval_datasets": [{"path": str(data_dir / "dev-sft.jsonl")}],
        "eval_steps": 1,
        "load_best_model_at_end": True,
    }
    rate = {"best before": 0.5, "best after": 1e-3}[chosen]
    folder = train("sft", **ONE_BY_ONE, learning_rate=rate, **dev)
    assert read_rollbacks(folder)
    scores = {row["step"]: row["eval_loss"] for row in runner.rows(folder)}
    assert json.loads((folder / "checkpoints/best.json").read_text())["step"] == min(scores, key=scores.get)


def kill_after(module, name, calls=1):
    """Let the `calls`-th call of `module.name` end, and then kill this process."""
    original, seen = getattr(module, name), []

    def last(*args, **options):
        value = original(*args, **options)
        seen.append(1)
        if len(seen) == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(module, name, last)


MOMENTS = {
    "decided": lambda: kill_after(rollback, "write_json"),
    "half discarded": lambda: kill_after(CheckpointStore, "discard", calls=2),
    "told": lambda: kill_after(TrainingGuard, "tell_rollbacks", calls=2),
}


@pytest.mark.parametrize(("kind", "moment"), [("sft", moment) for moment in MOMENTS] + [("grpo", "decided")])
def test_killed_in_a_rollback_it_ends_as_if_it_had_not_been(
    kind, moment, faulty, runner, model_dir, data_dir, tmp_path
):
    faulty(kind)
    keys = runner.keys_of(kind, model_dir("qwen3"), data_dir, **OPTIONS[kind])
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runner.run_stage(kind, straight, keys)
    child = os.fork()
    if not child:
        try:
            MOMENTS[moment]()
            runner.run_stage(kind, killed, keys)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert (killed / "rollbacks.json").exists() and not (killed / "result.json").exists()
    runner.run_stage(kind, killed, keys)
    assert runner.rows(killed) == runner.rows(straight)
    for name in ("model_digest", "rollbacks", "held"):
        assert result(killed)[name] == result(straight)[name], name
    times = [
        [{k: v for k, v in e.items() if k != "time"} for e in events(f, "rollback", "action", "finding")]
        for f in (straight, killed)
    ]
    assert times[0] == times[1]
