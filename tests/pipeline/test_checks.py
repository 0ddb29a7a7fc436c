"""What is refused before any work, in one clear line."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from posttrain.errors import ConfigError, DataError, EvalError, GateError, ModelError


def dpo(**keys):
    return {"dpo": {"datasets": [{"path": "pairs.jsonl"}], "max_steps": 1, **keys}}


def grpo(**keys):
    values = {"datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:spread"], "reward_check": "off"}
    return {
        "grpo": {
            **values,
            "max_steps": 1,
            "num_generations": 2,
            "num_prompts_per_step": 1,
            "max_completion_length": 4,
            **keys,
        }
    }


def sft(**keys):
    return {"sft": {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, **keys}}


@pytest.fixture
def raw_base(make_project, model_dir, tmp_path):
    """A project on the tiny model without its chat template."""
    import shutil

    base = tmp_path / "raw"
    shutil.copytree(model_dir("qwen3"), base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    return lambda stages, **keys: make_project(tmp_path / "project", stages, **({"base_model": str(base)} | keys))


@pytest.mark.parametrize("stage", [dpo(), grpo()], ids=["dpo", "grpo"])
def test_preferences_and_rl_do_not_start_on_a_raw_base(raw_base, stage):
    run = raw_base([stage])
    with pytest.raises(ConfigError) as refusal:
        run.run()
    kind = next(iter(stage))
    assert str(refusal.value).startswith(
        f"{kind} would start on a raw base: {run.values['base_model']} has no chat template"
    )
    assert "put an sft stage first, or set allow_raw_base: true" in str(refusal.value)
    assert not run.out.joinpath("stages").exists()


def test_allow_raw_base_lets_it_start(raw_base):
    rows = [{"prompt": f"{n} is", "chosen": f" {n}", "rejected": " none"} for n in range(8)]
    run = raw_base([dpo(datasets=[{"path": "text.jsonl"}], allow_raw_base=True)], evals={})
    (run.folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.run().status == "done"


def test_allow_raw_base_may_stand_at_the_top(raw_base):
    rows = [{"prompt": f"{n} is", "chosen": f" {n}", "rejected": " none"} for n in range(8)]
    run = raw_base([dpo(datasets=[{"path": "text.jsonl"}])], evals={}, allow_raw_base=True)
    (run.folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.run().status == "done"


def test_a_template_without_our_record_is_taken_as_tuned_with_a_warning(project, caplog):
    with caplog.at_level(logging.WARNING, "posttrain"):
        project([dpo()], evals={}).run()
    assert any(
        "has a chat template but no record of ours; taken as tuned, dpo starts on it" in m for m in caplog.messages
    )


def test_a_model_of_ours_needs_no_warning(finished, make_project, tmp_path, caplog):
    tuned = finished.out / "stages/01-sft/model"
    run = make_project(tmp_path / "next", [dpo()], evals={}, base_model=str(tuned))
    with caplog.at_level(logging.WARNING, "posttrain"):
        run.run()
    assert not any("taken as tuned" in message for message in caplog.messages)


def test_a_gate_that_cannot_decide_is_refused_with_the_number_it_needs(project):
    run = project([sft()], gate={"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.05}]})
    with pytest.raises(GateError, match=r"primary yes has 40 items, and min_delta 0\.05 needs \d{3,} "):
        run.run()
    assert not (run.out / "stages").exists()


def test_a_gate_inside_a_stage_is_planned_as_well(project):
    run = project([sft(gate={"baseline": "stage:base", "guards": [{"suite": "yes", "margin": 0.01}]}), dpo()])
    with pytest.raises(GateError, match=r"guard yes has 40 items, and margin 0\.01 needs"):
        run.run()


def test_a_gate_on_a_split_without_items_is_refused(project):
    run = project(
        [sft()], gate={"baseline": "stage:base", "split": "test", "primary": [{"suite": "yes", "min_delta": 0.4}]}
    )
    with pytest.raises(EvalError, match=r"no items with split 'test'; it has"):
        run.run()


BIG = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 4096,
    "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


def test_a_model_that_does_not_fit_is_refused_in_one_line(project, model_dir, tmp_path):
    """The sizes of an 8B model 3,600 layers deep, with a file of one weight: full fine-tuning fits nowhere near here."""
    big = tmp_path / "big"
    big.mkdir()
    for path in model_dir("qwen3").iterdir():
        if path.suffix in (".json", ".jinja") and path.name != "config.json":
            (big / path.name).write_bytes(path.read_bytes())
    (big / "config.json").write_text(json.dumps(BIG | {"num_hidden_layers": 3600}))
    save_file({"lm_head.weight": torch.zeros(1)}, big / "model.safetensors")
    run = project([sft()], base_model=str(big))
    with pytest.raises(ConfigError) as refusal:
        run.run()
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(f"sft: {big} (")
    assert "does not fit: full fine-tuning needs" in message
    assert "GiB free" in message
    assert not (run.out / "evals").exists()


def test_a_hub_that_is_not_reachable_is_said_in_one_line(project, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = project([sft()], base_model="nobody/no-such-model-8B")
    assert run.command() == 64
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith(
        "error: base_model: nobody/no-such-model-8B is not a local folder and could not be fetched"
    )
    assert "give a local folder, or connect to the hub" in error[-1]
    assert not (run.out / "evals").exists()


def test_a_folder_without_a_model_is_said_in_one_line(project, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty has no config\.json; expected a Hugging Face model folder"):
        project([sft()], base_model=str(tmp_path / "empty")).run()


def test_data_with_the_prompts_of_a_suite_is_refused(project):
    run = project([sft()])
    rows = [json.loads(line) for line in (run.folder / "yes.jsonl").read_text().splitlines()]
    with open(run.folder / "sft.jsonl", "a") as file:
        for row in rows[-3:]:
            file.write(json.dumps({"messages": [*row["messages"], {"role": "assistant", "content": "Yes."}]}) + "\n")
    with pytest.raises(DataError, match=r"contamination: 3 rows \(11\.1%, refused above 1%\)"):
        run.run()
    assert not run.out.exists(), "a start that is refused leaves nothing behind"


def test_the_data_of_a_later_stage_is_read_before_the_first_stage_runs(project):
    run = project([sft(), dpo(datasets=[{"path": "empty.jsonl"}])])
    (run.folder / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        run.run()
    assert not (run.out / "stages").exists()


def test_data_is_linted_for_every_stage_before_the_first_and_kept_beside_each(make_project, tmp_path):
    run = make_project(tmp_path / "project", [sft(), dpo()])
    pairs = tmp_path / "project" / "pairs.jsonl"
    good = pairs.read_text()
    first = json.loads(good.splitlines()[0])
    pairs.write_text(good + json.dumps(first | {"chosen": first["rejected"], "rejected": first["chosen"]}) + "\n")
    with pytest.raises(
        DataError, match=r"contradiction: 1 rows .* refused above 2%.*prefers the answer that .*pairs\.jsonl:1 "
    ):
        run.run("stages.2.lint={contradiction: {limit: 0.02}}")
    assert not (run.out / "stages").exists() and not (run.out / "evals").exists()
    pairs.write_text(good)
    run.run("stages.2.lint={contradiction: {limit: 0.02}}", on_change="rerun")
    found = json.loads((run.out / "stages" / "02-dpo" / "lint.json").read_text())
    assert found["refused"] is False and found["num_rows"] == len(good.splitlines())
    assert (run.out / "stages" / "01-sft" / "lint.json").exists()


def test_a_lint_that_does_not_exist_is_refused_before_anything(make_project, tmp_path):
    run = make_project(tmp_path / "project", [sft(lint={"duplicat": {"action": "off"}})])
    with pytest.raises(ConfigError, match=r"lint\.duplicat: no such rule; did you mean duplicate\?"):
        run.run()
    assert not run.out.exists() or not (run.out / "pipeline.json").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (grpo(delta=1.1), r"delta=1.1 with epsilon_high=0.2"),
        (grpo(loss_type="cispo", epsilon_high=0.28), "caps the ratio itself"),
        (dpo(loss_type="exo_pair"), "needs label_smoothing"),
    ],
)
def test_a_loss_that_is_not_defined_is_refused_before_the_first_stage_runs(project, stage, message):
    run = project([sft(), stage], evals={})
    with pytest.raises(ConfigError, match=message):
        run.run()
    assert not run.out.joinpath("stages").exists()


def test_an_adapter_on_a_bf16_file_is_planned_in_bf16_where_the_cpu_has_it(make_local_model, project, monkeypatch):
    from posttrain.config.load_pipeline import load_pipeline
    from posttrain.pipeline import checks

    base = make_local_model("llama")
    config = json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"}
    (base / "config.json").write_text(json.dumps(config))
    made = project([{"sft": {"datasets": [{"path": "sft.jsonl"}]}}], adapter="lora", base_model=str(base))
    keys, planned = load_pipeline(made.path).keys, []
    real = checks.estimate_memory
    monkeypatch.setattr(checks, "estimate_memory", lambda *given: planned.append(real(*given)) or planned[-1])
    for native in (False, True):
        monkeypatch.setattr("posttrain.models.device.has_bf16", lambda kind, native=native: native)
        checks.check_memory(keys)
    assert [plan.workload.bf16 for plan in planned] == [False, True]
    assert planned[1].parts["weights"] * 2 == planned[0].parts["weights"]


def test_a_base_that_is_stored_quantised_is_refused_before_the_first_stage_runs(make_local_model, project):
    base = make_local_model("llama")
    config = json.loads((base / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (base / "config.json").write_text(json.dumps(config))
    run = project([sft()], base_model=str(base))
    with pytest.raises(ModelError, match=r"quantised \(gptq in config.json\)"):
        run.run()
    assert not run.out.joinpath("stages").exists() and not run.out.joinpath("evals").exists()


def test_a_model_whose_memory_cannot_be_counted_is_trained_all_the_same(make_local_model, project, caplog):
    from posttrain.config.load_pipeline import load_pipeline
    from posttrain.pipeline import checks

    model = make_local_model("qwen3")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"model_type": "qwen3"', '"model_type": "rwkv"'))
    made = project([dpo(beta=0.001)], base_model=str(model))
    checks.check_memory(load_pipeline(made.path).keys)
    assert "model_type rwkv" in caplog.text and "not known before it is loaded" in caplog.text
    assert "dpo: advice dpo_beta: beta 0.001 is outside" in caplog.text


@pytest.mark.parametrize("of", ["reward", "suite"])
@pytest.mark.parametrize(
    ("judge", "why"),
    [
        ("model: m\nulr: http://127.0.0.1:9/v1\n", "rubric.yaml:2: ulr: unknown key"),
        ("model: m\nurl: http://127.0.0.1:9/v1\ntoken_env: MY_KEY\n", "MY_KEY: got an API key with line breaks"),
        ("- no keys\n", "rubric.yaml"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_before_the_first_stage(
    of, judge, why, make_project, tmp_path, monkeypatch
):
    monkeypatch.setenv("MY_KEY", "one\ntwo")
    stages = [sft(), grpo(reward_funcs=["rewards.py:spread", "judge:rubric.yaml"])] if of == "reward" else [sft()]
    run = make_project(tmp_path / "project", stages, evals={"own": {"path": "own.jsonl"}} if of == "suite" else {})
    row = {"id": "a", "prompt": "1 is", "target": "1", "scorer": "judge:rubric.yaml"}
    (run.folder / "own.jsonl").write_text(json.dumps(row) + "\n")
    (run.folder / "rubric.yaml").write_text(judge)
    with pytest.raises(ConfigError, match=why):
        run.run()
    assert not run.out.joinpath("stages").exists()
