"""Which model is the baseline, and what a verdict means for the alias."""

import json

import pytest

from posttrain.errors import ConfigError, RewardError
from posttrain.evidence import Verdict
from posttrain.files import digest_json, read_json
from posttrain.gate.folder import load_verdict

NOT_WORSE = {"baseline": "alias:champion", "guards": [{"suite": "yes", "margin": 0.4}]}
SFT = {
    "datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8,
    "per_device_train_batch_size": 8, "lr_scheduler_type": "constant",
}  # fmt: skip
GRPO = {
    "datasets": [{"path": "prompts.jsonl"}], "learning_rate": 1e-4, "max_steps": 2, "num_generations": 2,
    "num_prompts_per_step": 2, "max_completion_length": 6, "temperature": 2.0, "reward_timeout_s": 1.0,
}  # fmt: skip


@pytest.fixture
def second(promoted, tmp_path):
    """`second(**keys)` is another pipeline for the same registered name, beside a champion; in its own registry."""
    import shutil

    run = promoted.copy_to(tmp_path / "second")
    shutil.copytree(promoted.folder / "registry", run.folder / "registry")
    run.values["gate"] = NOT_WORSE

    def make(**keys):
        run.values |= keys
        return run

    return make


def champion(run):
    book = run.registry()
    try:
        return book.holder("yes", "champion")
    finally:
        book.close()


def test_without_a_champion_the_base_is_the_baseline(promoted):
    verdict = load_verdict(promoted.out / "gates" / "final")
    assert verdict.baseline_digest == promoted.state.pins["base_model"]
    assert champion(promoted).digest == promoted.state.stages[-1].output_digest == verdict.candidate_digest


def test_the_registered_model_verifies_offline(promoted):
    book = promoted.registry()
    verified = book.verify("yes", 1)
    assert [manifest.stage for manifest in book.chain("yes", 1)] == ["sft", "dpo"]
    assert verified.num_files > 0
    manifest = book.chain("yes", 1)[0]
    assert {
        "model",
        "config",
        "posttrain",
        "numbers.sft",
        "environment",
        "data.sft.jsonl",
        "suite.evals.yes",
    } <= manifest.inputs.keys()
    book.close()


def test_a_second_pipeline_is_judged_against_the_champion_of_the_first(second):
    run = second(seed=2)
    before = champion(run)
    outcome = run.run()
    assert outcome.verdict is Verdict.PASS
    verdict = load_verdict(run.out / "gates" / "final")
    assert verdict.baseline_digest == before.digest
    assert (run.out / "evals" / "yes-v1" / "yes-gate" / "report.json").exists()
    after = champion(run)
    assert (after.version, after.digest) == (2, run.state.stages[-1].output_digest)
    book = run.registry()
    assert book.holder("yes", "previous").digest == before.digest
    book.close()
    state = read_json(run.out / "pipeline.json")
    assert run.run().verdict is Verdict.PASS
    assert read_json(run.out / "pipeline.json") == state


def test_a_candidate_that_is_the_champion_is_invalid_and_exits_3(second):
    run = second()
    before = champion(run)
    assert run.command() == 3
    assert run.state.gates[-1].verdict == "INVALID"
    assert "the same model" in load_verdict(run.out / "gates" / "final").reason
    assert champion(run) == before


def test_a_worse_candidate_does_not_take_the_alias(second):
    weak = {**SFT, "max_steps": 1, "learning_rate": 1e-6}
    run = second(stages=[{"sft": weak}])
    before = champion(run)
    assert run.command() == 1
    assert champion(run) == before
    assert run.state.registered is None


def test_a_run_with_findings_is_registered_but_held(project):
    health = {"gradient_spike": {"times": 0.001, "after": 1, "at_least": 0.0}}
    run = project([{"sft": {**SFT, "health": health}}], gate=NOT_WORSE, register={"name": "yes"})
    assert run.command() == 5
    assert run.state.stages[0].held == ("gradient_spike",)
    assert champion(run) is None
    assert run.state.registered["alias"] is None
    assert "it is on hold: health: gradient_spike" in run.state.registered["refused"]
    book = run.registry()
    assert book.show("yes", 1).tags["hold"] == "health: gradient_spike"
    book.close()


def test_reward_check_off_is_registered_but_never_promoted(finished):
    assert champion(finished) is None
    assert "was trained without a reward certificate" in finished.state.registered["refused"]


def test_with_a_passing_certificate_rl_is_promoted(project, tmp_path):
    rows = [{"sft": SFT}, {"grpo": {**GRPO, "reward_funcs": ["number"]}}]
    run = project(rows, gate=NOT_WORSE, register={"name": "yes"})
    assert run.run().verdict is Verdict.PASS
    certificate = read_json(run.out / "stages/02-grpo/certificate.json")
    assert certificate["verdict"] == "pass"
    assert champion(run).digest == run.state.stages[-1].output_digest
    book = run.registry()
    assert [record["verdict"] for record in book.records("yes", 1, "certificate")] == ["pass"]
    assert book.chain("yes", 1)[-1].inputs["rewards"] == certificate["reward_digest"]
    book.close()


@pytest.mark.slow
def test_each_rl_stage_has_its_own_certificate(project):
    grpo = [
        {"grpo": {**GRPO, "max_steps": 1, "reward_funcs": rewards}}
        for rewards in (["number"], ["number", "soft_overlong"])
    ]
    run = project(grpo, gate=NOT_WORSE, register={"name": "yes"})
    assert run.run().verdict is Verdict.PASS
    held = [read_json(run.out / f"stages/0{n}-grpo/certificate.json") for n in (1, 2)]
    assert [certificate["config"]["rewards"] for certificate in held] == [["number"], ["number", "soft_overlong"]]
    book = run.registry()
    chain = book.chain("yes", 1)
    assert [manifest.inputs["certificate"] for manifest in chain] == [digest_json(certificate) for certificate in held]
    assert champion(run) is not None
    book.close()


HACKABLE = {**GRPO, "reward_funcs": ["rewards.py:is_in"]}


@pytest.mark.slow
def test_a_hackable_reward_of_a_later_stage_stops_the_run_before_any_training(project):
    run = project(
        [{"sft": SFT}, {"grpo": {**GRPO, "max_steps": 1, "reward_funcs": ["number"]}}, {"grpo": HACKABLE}], evals={}
    )
    with pytest.raises(RewardError, match=r"so RL does not start:(.|\n)*earn more than a wrong answer"):
        run.run()
    assert not run.out.exists()
    assert run.said[-2:] == [
        f"rewards of stage {number}: {verdict} before any training, without completions of its policy"
        for number, verdict in ((2, "pass"), (3, "fail"))
    ]


def test_a_hackable_reward_stops_the_run_before_rl(project):
    """Of the first stage, whose certificate is made at once; what refused to start has pinned nothing."""
    run = project([{"grpo": HACKABLE}], evals={})
    with pytest.raises(RewardError) as refusal:
        run.run()
    message = str(refusal.value)
    assert message.startswith("the rewards did not pass their check, so RL does not start:")
    assert "earn more than a wrong answer" in message
    assert read_json(run.out / "stages/01-grpo/certificate.json")["verdict"] == "fail"
    assert (run.state.status, run.state.stage(1)) == ("error", None)
    assert not (run.out / "stages/01-grpo/metrics.jsonl").exists()
    (run.folder / "rewards.py").write_text((run.folder / "rewards.py").read_text().replace("def is_in", "def was_in"))
    run.values["stages"][0]["grpo"] = {**GRPO, "max_steps": 1, "reward_funcs": ["number"]}
    assert run.run().status == "done", "the corrected start needs no word"
    assert [entry.folder for entry in run.state.stages] == ["stages/01-grpo"]


def test_a_baseline_may_be_a_stage_or_a_folder(project, model_dir):
    inner = {"baseline": "stage:1", "guards": [{"suite": "yes", "margin": 0.4}]}
    other = {"baseline": str(model_dir("llama")), "primary": [{"suite": "yes", "min_delta": 0.35}]}
    dpo = {"datasets": [{"path": "pairs.jsonl"}], "max_steps": 1, "learning_rate": 1e-5, "gate": inner}
    run = project([{"sft": {**SFT, "gate": other}}, {"dpo": dpo}])
    assert run.run().verdict is Verdict.PASS
    verdicts = [load_verdict(run.out / "gates" / name) for name in ("1", "2")]
    assert verdicts[1].baseline_digest == run.state.stages[0].output_digest
    assert verdicts[0].baseline_digest not in (verdicts[1].baseline_digest, run.state.pins["base_model"])


def test_an_alias_without_a_registry_to_look_in_is_refused_before_any_work(project):
    run = project([{"sft": SFT}], gate=NOT_WORSE)
    with pytest.raises(ConfigError, match="alias:champion needs `register:`"):
        run.run()
    assert not (run.out / "stages").exists()


def test_another_candidate_on_the_same_items_is_another_look(second, capsys):
    """Alpha is spent over the looks that the registry counts, and the look past the budget is refused before training."""
    gate = {**NOT_WORSE, "looks": 3, "guards": [{"suite": "yes", "margin": 0.45}]}
    alphas = []
    for seed in (2, 3):
        run = second(seed=seed, gate=gate, name=f"seed-{seed}", stages=[{"sft": SFT}])
        run.run()
        alphas.append(json.loads((run.out / "gates" / "final" / "verdict.json").read_text())["alpha"])
    first = 0.05 * 6 / 3.141592653589793**2
    assert alphas == pytest.approx([first / 4, first / 9]), "the champion's own verdict was the first look"
    run = second(seed=4, gate=gate, name="seed-4", stages=[{"sft": SFT}])
    assert run.command() == 64
    assert (
        "gate.looks: 3 of 3 looks at suite yes are taken, so a new model could not be judged" in capsys.readouterr().err
    )
    assert not run.out.exists()
