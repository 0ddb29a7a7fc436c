"""Each action on a real tiny run: one in which a rule fires and the action does what it says, one in which none does."""

import json

import pytest
import torch
from safetensors.torch import load_file

from posttrain.errors import TrainingError
from posttrain.recipes.optim import learning_rate


def spike(action, **options):
    """The early rule that any step from the third on trips; quiet ones do so once."""
    return {"health": {"gradient_spike": {"times": 0.0, "after": 2, "at_least": 0.0, "action": action}}, **options}


def all_wrong(action, **options):
    """Trips after the second step of a run whose groups have no spread."""
    return {
        "health": {"all_wrong": {"steps": 2, "limit": 0.5, "action": action}},
        "reward_funcs": ["constant"],
        **options,
    }


def events(folder, *kinds):
    lines = (json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["kind"] in kinds]


def state(folder, step):
    return json.loads((folder / f"checkpoints/step-{step:08d}/state.json").read_text())


def saved(folder, step, name):
    return load_file(folder / f"checkpoints/step-{step:08d}/{name}.safetensors")


def held(folder):
    return json.loads((folder / "result.json").read_text())["held"]


@pytest.fixture
def dev(data_dir):
    return {"eval_datasets": [{"path": str(data_dir / "dev-sft.jsonl")}]}


@pytest.mark.parametrize("action", ["log", "warn"])
def test_a_finding_is_written_down_and_changes_nothing(action, train, runner):
    folder = train("sft", name="fired", **spike(action))
    assert [(e["step"], e["action"]) for e in events(folder, "finding")] == [(3, action)]
    assert events(folder, "action") == [] and held(folder) == []
    silent = train("sft", name="silent")
    assert events(silent, "finding", "action") == []
    assert runner.rows(folder) == runner.rows(silent)


def test_hold(train):
    assert held(train("sft", **spike("hold"))) == ["gradient_spike"]
    assert held(train("sft")) == []


def test_evaluate_measures_now_and_holds(train, runner, dev):
    folder, silent = train("sft", **spike("evaluate"), **dev), train("sft", **dev)
    measured = [[row["step"] for row in runner.rows(f) if "eval_loss" in row] for f in (folder, silent)]
    assert measured == [[3, 4], [4]]
    assert (held(folder), held(silent)) == (["gradient_spike"], [])


def test_evaluate_after_a_late_finding_measures_at_the_next_step(train, runner, dev):
    always = {"zero_loss": {"steps": 2, "at_most": 1e9, "action": "evaluate"}}
    folder = train("sft", health=always, save_steps=1, stop_after=2, name="run", **dev)
    assert state(folder, 2)["guard"]["controls"]["evaluate_next"] is True
    train("sft", health=always, save_steps=1, name="run", **dev)
    assert [row["step"] for row in runner.rows(folder) if "eval_loss" in row] == [3, 4]


def test_lower_learning_rate(train, runner):
    folder, silent = train("sft", **spike("lower_learning_rate")), train("sft")
    fired, usual = ([row["learning_rate"] for row in runner.rows(f)] for f in (folder, silent))
    assert usual == [learning_rate(step, 4, runner.keys_of("sft", folder, folder)) for step in range(4)]
    # Found before the update of step 3, whose rate was set: the next step has the lower one.
    assert fired == [*usual[:3], usual[3] / 2]


def test_skip_step_leaves_weights_and_optimizer_untouched(train, runner):
    folder = train("sft", save_steps=1, save_total_limit=9, **spike("skip_step"))
    assert [row.get("skipped_step") for row in runner.rows(folder)] == [None, None, 1.0, 1.0]
    for name in ("weights", "optimizer"):
        before, after = saved(folder, 2, name), saved(folder, 4, name)
        assert all(torch.equal(before[key], after[key]) for key in before)
    silent = train("sft", save_steps=1, save_total_limit=9)
    assert not any("skipped_step" in row for row in runner.rows(silent))
    before, after = saved(silent, 2, "weights"), saved(silent, 4, "weights")
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("change", [{"action": "log"}, {"action": "skip_step"}, {"enabled": False}])
def test_what_is_not_a_number_never_reaches_the_weights(change, train, runner, monkeypatch):
    from posttrain.recipes import sft

    original, calls = sft.loss, []

    def poisoned(*args):
        calls.append(1)
        terms = original(*args)
        return type(terms)(terms.loss * torch.nan, terms.metrics) if len(calls) == 2 else terms

    monkeypatch.setattr(sft, "loss", poisoned)
    folder = train("sft", health={"nonfinite": change})
    assert [row.get("skipped_step") for row in runner.rows(folder)] == [None, 1.0, None, None]
    assert all(torch.isfinite(tensor).all() for tensor in runner.weights(folder).values())


def test_a_run_that_skips_every_step_is_rolled_back_and_stopped(train):
    options = spike("skip_step", max_steps=20, per_device_train_batch_size=1, health_rollbacks=0)
    options["health"]["updates_skipped"] = {"steps": 3}
    with pytest.raises(
        TrainingError, match=r"step 5: updates_skipped: the updates of 3 steps in a row were thrown away"
    ):
        train("sft", **options)


def test_stop(train, tmp_path):
    with pytest.raises(TrainingError, match=r"step 3: gradient_spike: .* Training stops here; no healthy checkpoint"):
        train("sft", name="run", **spike("stop"))
    assert not (tmp_path / "run/rollbacks.json").exists()


def test_raise_beta_on_preferences(train, runner):
    options = {"save_steps": 1, "learning_rate": 1e-4}
    folder, silent = train("dpo", **spike("raise_beta", **options)), train("dpo", **options)
    assert state(folder, 4)["guard"]["controls"]["beta_scale"] == 2.0
    assert state(silent, 4)["guard"]["controls"]["beta_scale"] == 1.0
    # Before step 4 both runs are the same; then twice the beta is twice the reward of the same log-ratio.
    margins = [[row["rewards/margins"] for row in runner.rows(f)] for f in (folder, silent)]
    assert margins[0][:3] == margins[1][:3]
    assert margins[0][3] == pytest.approx(2 * margins[1][3], rel=1e-5)


def test_raise_beta_in_rl_switches_the_controller_on(train, runner):
    drift = {"kl_drift": {"steps": 2, "limit": 1e-9, "action": "raise_beta"}}
    options = {"beta": 0.1, "save_steps": 1, "save_total_limit": 9}
    folder, silent = train("grpo", health=drift, **options), train("grpo", **options)
    scales = [state(folder, step)["guard"]["controls"]["beta_scale"] for step in range(1, 5)]
    fired = [event["step"] for event in events(folder, "action")]
    assert len(fired) == 1 and state(folder, 4)["guard"]["controls"]["kl_target"] == 5e-10
    step = fired[0]
    assert scales[step - 1] == 2.0
    # From then on by 2 % a step, the most the controller moves it while the KL is far above its target.
    assert scales[step:] == pytest.approx([2.0 * 1.02 ** (n + 1) for n in range(4 - step)])
    assert state(silent, 4)["guard"]["controls"] == {**state(silent, 1)["guard"]["controls"]}


def test_raise_entropy(train):
    folder, silent = train("grpo", save_steps=1, **spike("raise_entropy")), train("grpo", save_steps=1)
    assert state(folder, 4)["guard"]["controls"]["entropy_target"] == 0.2
    assert state(silent, 4)["guard"]["controls"]["entropy_target"] is None


def test_the_controllers_are_keys_too(train, runner):
    """Below its target the entropy earns a bonus that grows by 0.005 a step and is part of the loss."""
    options = {"save_steps": 1, "max_steps": 3, "learning_rate": 1e-4}
    steered, plain = train("grpo", entropy_target=50.0, **options), train("grpo", **options)
    assert state(steered, 3)["guard"]["controls"]["entropy_bonus"] == pytest.approx(0.015)
    one, other = runner.rows(steered), runner.rows(plain)
    assert one[0]["loss"] == other[0]["loss"]
    assert one[1]["loss"] == pytest.approx(other[1]["loss"] - 0.005 * one[1]["entropy"], abs=1e-4)
    held_to = train("grpo", beta=0.1, kl_target=1e-6, save_steps=1, learning_rate=1e-2, max_steps=3)
    assert state(held_to, 3)["guard"]["controls"]["beta_scale"] > 1.0


def test_resample_passes_over_prompts_that_taught_nothing(train, runner, data_dir):
    few = {"datasets": [{"path": str(data_dir / "prompts.jsonl"), "limit": 4}], "max_steps": 8}
    folder, silent = train("grpo", **all_wrong("resample", **few)), train("grpo", **all_wrong("log", **few))
    passed = [event["prompts"]["passed_over"] for event in events(folder, "rollouts")]
    issued = [event["prompts"]["issued"] for event in events(folder, "rollouts")]
    assert passed[:2] == [[], []] and all(len(numbers) == 2 for numbers in issued)
    assert sum(map(len, passed)) >= 6
    # Nothing is lost or asked twice: every number was issued or passed over.
    assert sorted(n for part in (*passed, *issued) for n in part) == list(range(sum(map(len, (*passed, *issued)))))
    assert [row["sampling/passed_over"] for row in runner.rows(folder)[2:]] == [float(len(p)) for p in passed[2:]]
    assert not any(event["prompts"]["passed_over"] for event in events(silent, "rollouts"))


def test_resample_goes_on_after_a_stop_as_if_there_had_been_none(train, runner, data_dir):
    few = {"datasets": [{"path": str(data_dir / "prompts.jsonl"), "limit": 4}], "max_steps": 6, "save_steps": 1}
    straight = train("grpo", name="straight", **all_wrong("resample", **few))
    train("grpo", name="stopped", stop_after=4, **all_wrong("resample", **few))
    stopped = train("grpo", name="stopped", **all_wrong("resample", **few))
    assert runner.rows(stopped) == runner.rows(straight)
    ledgers = [[e["prompts"] for e in events(f, "rollouts")] for f in (straight, stopped)]
    assert ledgers[0] == ledgers[1]


def test_raise_group_size(train):
    options = {"save_steps": 1, "save_total_limit": 9}
    folder, silent = (
        train("grpo", **all_wrong("raise_group_size", **options)),
        train("grpo", **all_wrong("log", **options)),
    )
    sizes = [
        [saved(f, step, "experience")["group_sizes_P"].tolist() for step in (1, 2, 3, 4)] for f in (folder, silent)
    ]
    assert sizes[0] == [[4, 4], [4, 4], [8, 8], [8, 8]]
    assert sizes[1] == [[4, 4]] * 4
