"""Whole runs: what is on disk afterwards, what a second start does, loop-backs and early ends."""

import json
import shutil

import pytest

from posttrain.data.origin import write_origin
from posttrain.errors import ChangedInputsError, ConfigError, RewardError
from posttrain.evidence import Verdict
from posttrain.files import file_digests, read_json, read_json_lines
from posttrain.gate.folder import recompute
from posttrain.report.build import build_report
from posttrain.report.records import read_run
from posttrain.report.summary import render_summary
from posttrain.rewards.resolve import reward_digest

QUICK = {"learning_rate": 1e-2, "max_steps": 8, "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}
SLOW = {**QUICK, "max_steps": 1, "learning_rate": 1e-6}
"""Too little to learn anything."""


def sft(**keys):
    return {"sft": {"datasets": [{"path": "sft.jsonl"}], **QUICK, **keys}}


def dpo(**keys):
    return {
        "dpo": {
            "datasets": [{"path": "pairs.jsonl"}],
            "max_steps": 2,
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 4,
            **keys,
        }
    }


def gate(**keys):
    return {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.35}], **keys}


NOT_WORSE = {"baseline": "stage:base", "guards": [{"suite": "yes", "margin": 0.4}]}
"""Passes also where nothing was learned: both models are wrong on every item."""


def attempts(project):
    return [(entry.kind, entry.attempt, entry.status) for entry in project.state.stages]


def verdicts(project):
    return [(entry.after, entry.attempt, entry.verdict) for entry in project.state.gates]


def reward_model(**keys):
    return {"reward_model": {"datasets": [{"path": "pairs.jsonl"}], **SLOW, **keys}}


def test_a_reward_model_stands_beside_the_line(project):
    """The stage after it starts from the policy before it; it is measured on no suite and registered as nothing."""
    made = project([sft(), reward_model(), dpo(max_steps=1, learning_rate=1e-6)], gate=gate())
    assert made.run().status == "passed"
    first, beside, last = made.state.stages
    assert beside.inputs["model"] == last.inputs["model"] == first.output_digest
    assert beside.output_digest not in (first.output_digest, last.output_digest)
    assert {path.name for path in (made.out / "evals").iterdir()} == {"base", "01-sft", "03-dpo"}


def paid(by, **keys):
    asked = {"datasets": [{"path": "prompts.jsonl"}], "num_prompts_per_step": 2, "num_generations": 4, **SLOW}
    return {"grpo": {**asked, "max_completion_length": 6, "reward_check": "off", "reward_funcs": by, **keys}}


BY_STAGE = "model:stage:reward_model"


def test_rl_is_paid_by_the_reward_model_of_an_earlier_stage_and_starts_from_the_policy(project):
    """Pinned by its digest: as the input of the stage that it pays, which is run again when another was made."""
    made = project([sft(), reward_model(), paid([BY_STAGE])])
    assert made.run().status == "done"
    first, beside, last = made.state.stages
    assert last.inputs["model"] == first.output_digest
    folder = made.out / beside.folder / "model"
    assert last.inputs["rewards"] == reward_digest([f"model:{folder}"])
    assert made.run().status == "done" and len(made.state.stages) == 3

    again = project([sft(), reward_model(max_steps=2), paid([BY_STAGE])], name="other")
    assert again.run().status == "done"
    assert again.state.stages[2].inputs["model"] == last.inputs["model"]
    assert again.state.stages[2].inputs["rewards"] != last.inputs["rewards"]


def steps(first):
    asked = [{"role": "user", "content": f"What is {first} plus 2?"}]
    return {"prompt": asked, "completions": [f"{first} plus 2 is {first + 2}.", "Yes."], "labels": [True, False]}


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_rl_is_paid_by_the_process_reward_model_of_an_earlier_stage_with_its_options(project, aggregate):
    """Named by its stage before it is made and by its folder then; options that it has not are refused before any training."""
    prm = {"process_reward_model": {"datasets": [{"path": "steps.jsonl", "type": "stepwise_supervised"}], **SLOW}}
    name = "process_reward_model"
    asked = {"reward_kwargs": {name: {"aggregate": aggregate}, "spread": {}}, "credit": "step"}
    made = project([sft(), prm, paid([f"model:stage:{name}", "rewards.py:spread"], **asked)])
    (made.folder / "steps.jsonl").write_text("".join(f"{json.dumps(steps(n))}\n" for n in range(8)))
    if aggregate == "max":
        with pytest.raises(ConfigError, match="aggregate: got 'max', expected one of min"):
            made.run()
        assert not (made.out / "stages").exists()
        return
    assert made.run().status == "done"
    _, beside, last = made.state.stages
    specs = [f"model:{made.out / beside.folder / 'model'}", f"{made.folder / 'rewards.py'}:spread"]
    assert last.inputs["rewards"] == reward_digest(specs, {"model": {"aggregate": "mean"}})
    assert last.inputs["rewards"] != reward_digest(specs)
    *_, (_, metrics) = read_json_lines(made.out / last.folder / "metrics.jsonl")
    assert 0 < metrics["rewards/model/mean"] < 1
    assert made.run().status == "done" and len(made.state.stages) == 3


def test_the_reward_model_of_a_stage_is_certified_when_it_is_trained(project):
    """Before that only the rewards beside it can be, and are."""
    made = project([sft(), reward_model(), paid([BY_STAGE], reward_check="require")])
    try:
        made.run()
    except RewardError as error:
        assert "did not pass their check" in str(error)
    assert "rewards of stage 3: checked when the stage that trains them is done" in made.said
    assert [entry.status for entry in made.state.stages[:2]] == ["done", "done"]
    certificate = read_json(made.out / "stages" / "03-grpo" / "certificate.json")
    model = made.out / made.state.stages[1].folder / "model"
    assert certificate["reward_digest"] == reward_digest([f"model:{model}"])


def test_a_stage_is_taught_by_a_folder_and_notices_when_that_has_changed(project, model_dir, tmp_path):
    """Judged, reported and planned like any other; the teacher is pinned by its digest, and found beside the YAML."""
    shutil.copytree(model_dir("qwen3"), tmp_path / "project" / "teacher")
    asked = {
        "datasets": [{"path": "prompts.jsonl"}],
        "teachers": [{"model": "./teacher"}],
        "num_prompts_per_step": 2,
        **SLOW,
    }
    made = project(
        [sft(), {"distill": {**asked, "num_generations": 2, "max_completion_length": 6, "loss_type": "jsd"}}],
        gate=gate(),
    )
    assert made.run().status == "passed"
    assert attempts(made) == [("sft", 1, "done"), ("distill", 1, "done")]
    assert "Distance to the teacher" in build_report(made.out).read_text()
    (made.folder / "teacher" / "note.txt").write_text("another teacher")
    with pytest.raises(ChangedInputsError, match=r"stages\.2\.distill\.teachers\.0"):
        made.run()


# --- a whole run ---------------------------------------------------------------------------------------------------


def test_a_whole_run_leaves_records_that_are_read_without_problems(finished):
    run = read_run(finished.out)
    assert run.problems == ()
    assert (run.name, run.status) == ("yes", "passed")
    assert [(stage.name, stage.kind, stage.status) for stage in run.stages] == [
        ("01-sft", "sft", "done"),
        ("02-dpo", "dpo", "done"),
        ("03-grpo", "grpo", "done"),
    ]
    assert [len(stage.metrics) for stage in run.stages] == [8, 3, 3]
    assert all(stage.steps == len(stage.metrics) and stage.tokens and stage.wall_s for stage in run.stages)
    assert run.models == ["base", "01-sft", "02-dpo", "03-grpo"]
    assert [len(run.evals[model]["yes", "gate"].items) for model in run.models] == [40] * 4
    assert [round(run.evals[model]["yes", "gate"].mean, 2) for model in run.models[:2]] == [0.0, 1.0]
    assert run.final_gate is not None
    assert (run.final_gate.id, run.final_gate.verdict["verdict"]) == ("final", "PASS")
    assert run.registered is not None
    assert run.registered["version"] == 1


def test_each_stage_starts_from_the_model_before_and_says_so(finished):
    stages = finished.state.stages
    results = [read_json(finished.out / entry.folder / "result.json") for entry in stages]
    assert [result["parent_digest"] for result in results] == [
        finished.state.pins["base_model"],
        stages[0].output_digest,
        stages[1].output_digest,
    ]
    assert [result["model_digest"] for result in results] == [entry.output_digest for entry in stages]
    for entry in stages:
        summary = read_json(finished.out / entry.folder / "summary.json")
        assert summary["datasets"][0]["sources"][0]["rows_kept"] == 24
        trained = any(trained for example in summary["examples"] for _, trained in example["segments"])
        assert trained == (entry.kind != "grpo"), "a prompt alone is not trained"


def test_the_metrics_of_each_stage_are_under_trls_names(finished):
    metrics = {stage.kind: stage.metrics[-1] for stage in read_run(finished.out).stages}
    assert {"loss", "grad_norm", "learning_rate", "epoch", "num_tokens"} <= metrics["sft"].keys()
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"} <= metrics["dpo"].keys()
    assert {"reward", "entropy", "frac_reward_zero_std", "completions/mean_length"} <= metrics["grpo"].keys()


def test_the_verdict_is_recomputed_from_the_stored_items(finished):
    assert recompute(finished.out / "gates" / "final").verdict is Verdict.PASS


def test_the_page_and_the_table_are_made_from_the_records(finished, tmp_path):
    page = build_report(finished.out).read_text()
    assert "https://" not in page
    for text in ("01-sft", "02-dpo", "03-grpo", "PASS"):
        assert text in page
    table = render_summary(finished.out)
    assert "yes/gate" in table
    assert "PASS" in table


def test_the_config_that_was_run_loads_again_to_the_same_run(finished, tmp_path):
    from posttrain.config.load_pipeline import load_pipeline
    from posttrain.pipeline.pins import pins_of

    again = load_pipeline(finished.out / "config.yaml").keys
    assert pins_of(again) == dict(finished.state.pins)


def test_the_models_load_in_transformers_alone(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.out / finished.state.stages[-1].folder / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 1 plus 2?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == "Yes."


# --- started again -------------------------------------------------------------------------------------------------


def kept(project):
    """Every file of the run that a second start must leave as it is; the eval files hold the time they took."""
    return {
        name: digest
        for name, digest in file_digests(project.out, ignore=(".lock",)).items()
        if not name.endswith("report.html")
    }


def test_started_again_a_finished_run_does_nothing(finished):
    before, state = kept(finished), read_json(finished.out / "pipeline.json")
    outcome = finished.run()
    assert (outcome.status, outcome.verdict) == ("passed", Verdict.PASS)
    assert kept(finished) == before
    assert read_json(finished.out / "pipeline.json") == state
    assert sum("not run again" in line for line in finished.said) == 3


def test_started_again_after_its_promotion_a_run_is_still_a_pass(promoted):
    """By then the champion is the candidate itself; that must not turn into a comparison with itself."""
    before, state, events = kept(promoted), read_json(promoted.out / "pipeline.json"), promoted.events("promote")
    outcome = promoted.run()
    assert (outcome.status, outcome.verdict) == ("passed", Verdict.PASS)
    assert read_json(promoted.out / "pipeline.json") == state
    assert kept(promoted) == before
    assert promoted.events("promote") == events
    assert len(events) == 1


def test_a_longer_pipeline_goes_on_from_what_is_there(project):
    short = project([sft()])
    short.run()
    short.values["stages"].append(dpo())
    short.run(on_change="rerun")
    assert attempts(short) == [("sft", 1, "done"), ("dpo", 1, "done")]


# --- loop back -----------------------------------------------------------------------------------------------------


def test_a_failed_gate_loops_back_with_changed_keys(project):
    rule = {"retry": "sft", "times": 1, "with": {"max_steps": 8, "learning_rate": 1e-2}}
    run = project([sft(**SLOW), dpo()], gate=gate(on_fail=rule))
    outcome = run.run()
    assert (outcome.status, outcome.verdict) == ("passed", Verdict.PASS)
    assert attempts(run) == [("sft", 1, "done"), ("dpo", 1, "done"), ("sft", 2, "done"), ("dpo", 2, "done")]
    assert verdicts(run) == [("final", 2, "PASS")], "the first attempt was told by the dev split, without a verdict"
    assert run.state.stages[2].changed == {"max_steps": 8, "learning_rate": 1e-2}
    assert [entry.folder for entry in run.state.stages[2:]] == ["stages/01-sft-2", "stages/02-dpo-2"]
    assert outcome.model_dir == run.out / "stages/02-dpo-2/model"
    assert [made.chosen for made in run.state.selections] == [False, True]
    state = read_json(run.out / "pipeline.json")
    run.run()
    assert read_json(run.out / "pipeline.json") == state


def test_the_loop_ends_after_so_many_times_with_fail(project):
    rule = {"retry": "sft", "times": 2, "with": {"max_steps": 2}}
    run = project([sft(**SLOW)], gate=gate(on_fail=rule))
    assert run.command() == 1
    assert attempts(run) == [("sft", 1, "done"), ("sft", 2, "done"), ("sft", 3, "done")]
    assert verdicts(run) == [("final", 3, "FAIL")]
    assert (run.state.status, run.state.reason) == ("failed", "the gate after sft says FAIL")
    assert len({entry.output_digest for entry in run.state.stages}) == 3
    state = read_json(run.out / "pipeline.json")
    assert run.command() == 1
    assert read_json(run.out / "pipeline.json") == state


def test_without_changed_keys_the_retry_takes_another_seed(project):
    run = project([sft(**SLOW, num_train_epochs=1)], gate=gate(on_fail={"retry": 1, "times": 1}))
    assert run.run().verdict is Verdict.FAIL
    assert [entry.changed for entry in run.state.stages] == [{}, {"seed": 2}]


def test_stop_is_the_default(project):
    run = project([sft(**SLOW), dpo()], gate=gate())
    assert run.run().verdict is Verdict.FAIL
    assert [attempt for _, attempt, _ in attempts(run)] == [1, 1]


# --- verdicts and exit codes ---------------------------------------------------------------------------------------


def test_inconclusive_exits_2_and_is_not_registered(project):
    run = project([sft(**SLOW)], gate=gate(primary=[{"suite": "yes"}]), register={"name": "yes"})
    assert run.command() == 2
    assert (run.state.status, run.state.registered) == ("inconclusive", None)
    assert not (run.folder / "registry").exists() or run.registry().entries() == []


def test_inconclusive_may_let_later_stages_run(project):
    inner = gate(primary=[{"suite": "yes"}], on_inconclusive="continue")
    run = project([sft(**SLOW, gate=inner), dpo(gate=NOT_WORSE)])
    assert run.run().verdict is Verdict.PASS
    assert verdicts(run) == [(1, 1, "INCONCLUSIVE"), (2, 1, "PASS")]


def test_inconclusive_stops_later_stages_by_default(project):
    run = project([sft(**SLOW, gate=gate(primary=[{"suite": "yes"}])), dpo()])
    assert run.run().verdict is Verdict.INCONCLUSIVE
    assert attempts(run) == [("sft", 1, "done")]


def test_a_gate_inside_a_stage_stops_before_the_next(project):
    run = project([sft(**SLOW, gate=gate()), dpo()])
    assert run.command() == 1
    assert attempts(run) == [("sft", 1, "done")]
    assert verdicts(run) == [(1, 1, "FAIL")]
    assert (run.out / "gates" / "1" / "verdict.json").exists()


def test_a_gate_inside_a_stage_may_judge_the_dev_split(project):
    run = project([sft(gate=gate(split="dev", primary=[{"suite": "yes", "min_delta": 0.4}])), dpo()], gate=NOT_WORSE)
    assert run.run().verdict is Verdict.PASS
    assert verdicts(run) == [(1, 1, "PASS"), ("final", 1, "PASS")]
    assert (run.out / "evals" / "01-sft" / "yes-dev").is_dir()
    assert read_json(run.out / "gates" / "1" / "verdict.json")["tests"][0]["num_items"] == 35


def test_two_gates_after_the_last_stage_are_refused(project, capsys):
    run = project([sft(gate=gate())], gate=NOT_WORSE)
    assert run.command() == 64
    assert "the last stage has a gate of its own" in capsys.readouterr().err
    assert not run.out.joinpath("stages").exists()


def test_without_gate_a_run_is_done_and_exits_0(project):
    run = project([sft(**SLOW)])
    assert run.command() == 0
    assert (run.state.status, run.state.gates) == ("done", ())


def test_gate_passes_ends_at_the_first_stage_that_passes(project):
    run = project([sft(), dpo()], gate=gate(), stop_when="gate_passes", register={"name": "yes"})
    outcome = run.run()
    assert (outcome.verdict, outcome.model_dir) == (Verdict.PASS, run.out / "stages/01-sft/model")
    assert attempts(run) == [("sft", 1, "done")]
    assert run.state.registered is not None
    assert (run.state.registered["digest"], run.state.registered["alias"]) == (
        run.state.stages[0].output_digest,
        "champion",
    )


def test_gate_passes_goes_on_while_it_fails(project):
    teach = {"loss_type": "sft", "learning_rate": 1e-2, "max_steps": 10, "lr_scheduler_type": "constant"}
    rule = {"retry": 1, "times": 1, "with": {"max_steps": 2}}
    run = project([sft(**SLOW), dpo(**teach)], gate=gate(on_fail=rule), stop_when="gate_passes")
    assert run.run().verdict is Verdict.PASS
    assert attempts(run) == [("sft", 1, "done"), ("dpo", 1, "done")]
    assert verdicts(run) == [("final", 1, "PASS")]


def test_the_lineage_says_what_rows_of_ours_were_made_from(project):
    run = project([sft()], gate=gate(), register={"name": "yes"})
    write_origin(run.folder / "sft.jsonl", {"made_by": "posttrain data synth", "model": "sha256:1"})
    run.run()
    book = run.registry()
    (manifest,) = book.chain("yes", 1)
    assert manifest.details["data_origins"]["sft.jsonl"]["model"] == "sha256:1"
    book.close()


def test_a_stage_left_over_from_a_longer_run_is_no_part_of_the_lineage(project):
    """First both stages run; then the gate is moved, and the run ends after the first."""
    run = project([sft(), dpo()], gate=NOT_WORSE, register={"name": "yes"})
    run.run()
    run.values["stop_when"] = "gate_passes"
    run.values["gate"] = gate()
    run.values["register"] = {"name": "shorter"}
    outcome = run.run(on_change="rerun")
    assert outcome.model_dir == run.out / "stages/01-sft/model"
    assert run.state.registered is not None
    assert (run.state.registered["digest"], run.state.registered["alias"]) == (
        run.state.stages[0].output_digest,
        "champion",
    )
    book = run.registry()
    assert [manifest.stage for manifest in book.chain("shorter", 1)] == ["sft"]
    book.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learnin_rate": 1}, "learning_rate"),
        ({"stages": []}, "expected a list"),
        ({"evals": {"yes": "nowhere.jsonl"}}, "nowhere.jsonl does not exist"),
        (
            {"gate": {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.02}]}},
            "min_delta 0.02 needs",
        ),
    ],
)
def test_what_the_user_must_fix_exits_64_before_any_work(project, capsys, change, message):
    run = project([sft()])
    run.values |= change
    assert run.command() == 64
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (run.out / "evals").exists()


def test_the_command_ends_with_the_table_the_registry_and_the_report(project, capsys):
    run = project([sft()], gate=gate(), register={"name": "yes"})
    assert run.command() == 0
    output = capsys.readouterr().out
    assert "yes/gate" in output
    assert "registry  yes v1 → champion" in output
    assert f"report  {run.out / 'report.html'}" in output
    assert json.loads((run.out / "pipeline.json").read_text())["status"] == "passed"
