"""What a run refuses before it reads a row, `plan` refuses in the same words: a table of configurations that cannot be trained."""

import json
import shutil

import pytest
from tests.pipeline.conftest import Project

from posttrain.cli.plan import make_plan, target_of
from posttrain.errors import PosttrainError

SFT = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1}
DPO = {"datasets": [{"path": "pairs.jsonl"}], "max_steps": 1}
GRPO = {
    "datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:spread"], "reward_check": "off", "max_steps": 1,
    "num_generations": 2, "num_prompts_per_step": 1, "max_completion_length": 8,
}  # fmt: skip
LORA = {"adapter": "lora"}

REFUSED = {
    "layers": ([{"sft": {**SFT, "unfrozen_layers": 9}}], "unfrozen_layers: 9: the model has 2 layers"),
    "layers_of_a_later_stage": ([{"sft": SFT}, {"dpo": {**DPO, "unfrozen_layers": 9}}], "unfrozen_layers: 9"),
    "parameters": ([{"sft": {**SFT, "unfrozen_parameters": ["zzz"]}}], "unfrozen_parameters: zzz"),
    "tokenizer": ([{"sft": {**SFT, "tokenizer_name_or_path": "larger"}}], "has ids up to"),
    "tokenizer_broken": ([{"sft": {**SFT, "tokenizer_name_or_path": "broken"}}], "has no tokenizer that loads"),
    "token": ([{"sft": {**SFT, "special_tokens": {"eos_token": "<zz>"}}}], "special_tokens.eos_token"),
    "pissa": ([{"sft": {**SFT, **LORA, "init_lora_weights": "pissa", "use_dora": True}}], "cannot be taken apart"),
    "target": ([{"sft": {**SFT, **LORA, "lora_target": ["zzz"]}}], "lora_target: 'zzz'"),
    "adapter_is_not_there": ([{"sft": {**SFT, **LORA, "adapter_name_or_path": "broken"}}], "broken has no adapter_config.json"),
    "adapter_is_damaged": ([{"sft": {**SFT, **LORA, "adapter_name_or_path": "damaged"}}], "damaged/adapter_config.json cannot be read"),
    "adapter_of_no_stage": ([{"sft": {**SFT, **LORA, "adapter_start": "continue"}}], "there is no adapter to train on"),
    "adapter_of_a_whole_stage": ([{"sft": SFT}, {"dpo": {**DPO, **LORA, "adapter_start": "continue"}}], "trains all weights"),
    "given_twice": ([{"sft": SFT}, {"dpo": {**DPO, "init_seed": 3}}], "it is about the model that the pipeline starts"),
    "gates": ([{"sft": {**SFT, "gate": {"baseline": "stage:base", "primary": [{"suite": "yes"}]}}}], "two verdicts"),
    "baseline": ([{"sft": SFT}], "needs `register:`"),
    "health": ([{"sft": {**SFT, "health": {"zzz": "off"}}}], "zzz"),
    "lint": ([{"sft": {**SFT, "lint": {"zzz": "off"}}}], "zzz"),
    "loss": ([{"sft": SFT}, {"grpo": {**GRPO, "loss_type": "dapo", "delta": 1.1}}], "delta"),
    "kto": ([{"dpo": {"datasets": [{"path": "pairs.jsonl", "type": "kto"}], "loss_type": "kto", "per_device_train_batch_size": 1}}], "one row per optimizer step"),
    "engine": ([{"grpo": {**GRPO, "added_tokens": ["<zz>"], "rollout": {"engine": "vllm"}}}], "which has no rows for added_tokens"),
    "teacher": ([{"distill": {"datasets": [{"path": "prompts.jsonl"}], "max_steps": 1, "teachers": [{"model": "other"}]}}], "has another vocabulary"),
    "critic": ([{"ppo": {**{k: v for k, v in GRPO.items() if k != "num_generations"}, "value_model": "other"}}], "has another vocabulary"),
    "environment": ([{"grpo": {**GRPO, "env": "rewards.py:Nobody"}}], "has no 'Nobody'"),
    "ends_of_layers_alone": ([{"sft": {**SFT, "unfrozen_parameters": [".*mlp.*"], "embedding_lr_scale": 0.1}}], "embedding_lr_scale: neither embedding nor head is trained here"),
    "ends_beside_a_pattern": ([{"sft": {**SFT, **LORA, "lora_target": ".*q_proj", "embedding_lr_scale": 0.1}}], "embedding_lr_scale: neither embedding nor head"),
    "head_that_is_adapted": ([{"grpo": {**GRPO, **LORA, "lora_modules_to_save": ["embed_tokens", "lm_head"], "cast_lm_head_to_fp32": True}}], "cast_lm_head_to_fp32: true with a head that is"),
    "exact_with_an_odd_rank": ([{"grpo": {**GRPO, **LORA, "lora_r": 3, "rollout": {"exact": True}}}], "has 3 inputs, no multiple of 4"),
    "calls_that_are_not_read": ([{"grpo": {**GRPO, "tools": ["rewards.py:spread"]}}], "tools: the chat template says no form in which tools are called"),
    "reward": ([{"grpo": {**GRPO, "reward_funcs": ["rewards.py:nobody"]}}], "no function 'nobody' (it defines"),
    "tracker": ([{"sft": {**SFT, "report_to": ["mlflow"]}}], "report_to: mlflow"),
    "experts": ([{"grpo": {**GRPO, "rollout": {"routed_experts": "compare"}}}], "is a qwen3, and choices of experts are known of"),
    "experts_of_vllm": ([{"grpo": {**GRPO, "rollout": {"routed_experts": "replay", "engine": "vllm"}}}], "engine: vllm on a CPU"),
    "experts_compiled": ([{"grpo": {**GRPO, "torch_compile": True, "rollout": {"routed_experts": "replay"}}}], "looks into the layers"),
    "device": ([{"sft": {**SFT, "device": "cuda"}}], "torch sees no CUDA device here"),
}  # fmt: skip


def write_models(folder, model_dir):
    """Beside the project: a tokenizer that is larger, one that is broken, a model with another vocabulary, a damaged adapter."""
    from transformers import AutoTokenizer

    base = model_dir("qwen3")
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens([f"<t{number}>" for number in range(4000)])
    larger.save_pretrained(folder / "larger")
    shutil.copytree(base, folder / "other")
    other = AutoTokenizer.from_pretrained(base)
    other.add_tokens(["<other>"])
    other.save_pretrained(folder / "other")
    for name, file in (("broken", "tokenizer.json"), ("damaged", "adapter_config.json")):
        (folder / name).mkdir()
        (folder / name / file).write_text('{"model": ')
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"")


def _said(ask):
    try:
        ask()
    except PosttrainError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.fixture(scope="module")
def folder(make_project, model_dir, tmp_path_factory):
    """A project none of whose rows can be read."""
    made = make_project(tmp_path_factory.mktemp("refused") / "project", []).folder
    for path in made.glob("*.jsonl"):
        path.write_text("no row")
    write_models(made, model_dir)
    return made


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses_what_the_run_refuses(name, folder, model_dir, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    stages, says = REFUSED[name]
    gate = {"gates": "stage:base", "baseline": "alias:champion"}.get(name)
    more = {} if gate is None else {"gate": {"baseline": gate, "primary": [{"suite": "yes"}]}}
    base = "qwen3_moe" if name.startswith("experts_") else "qwen3"
    values = {"name": name, "base_model": str(model_dir(base)), "sequence_len": 64, "stages": stages, **more}
    run = Project(folder, values | {"evals": {"yes": {"path": "yes.jsonl", "max_tokens": 6}}})
    ran = _said(run.run)
    planned = _said(lambda: make_plan(run.path, target_of(None, "this", 1, False), None, []))
    assert says in ran[1], ran
    assert planned == ran
    assert not run.out.exists()


@pytest.mark.parametrize(("broken", "says"), [
    (lambda base: (base / "model.safetensors").unlink(), "has no weights (model.safetensors, or"),
    (lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9]), "model.safetensors is not there whole"),
    (lambda base: _indexed(base, {"weight_map": {"a": "model-1.safetensors"}}), "model-1.safetensors is not there whole"),
    (lambda base: _indexed(base, {"weights": 1}), "index.json names no files of weights"),
])  # fmt: skip
def test_weights_that_are_not_here_are_missed_before_the_data(broken, says, folder, model_dir, tmp_path):
    base = shutil.copytree(model_dir("qwen3"), tmp_path / "base")
    broken(base)
    run = Project(folder, {"name": "weights", "base_model": str(base), "stages": [{"sft": SFT}], "evals": {}})
    ran = _said(run.run)
    assert says in ran[1]
    assert _said(lambda: make_plan(run.path, target_of(None, "this", 1, False), None, [])) == ran
    assert make_plan(run.path, target_of("1xH100", "this", 1, False), None, []).forecasts
    run.values["stages"] = [{"sft": {**SFT, "init_seed": 1}}]
    assert make_plan(run.path, target_of(None, "this", 1, False), None, []).forecasts


def _indexed(base, index):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["sft", "lora", "dpo", "grpo"])
def test_plan_takes_what_the_run_takes(name, project):
    stages = {"sft": {"sft": SFT}, "lora": {"sft": {**SFT, **LORA}}, "dpo": {"dpo": DPO}, "grpo": {"grpo": GRPO}}
    run = project([stages[name]], evals={})
    (made,) = make_plan(run.path, target_of(None, "this", 1, False), None, []).forecasts
    assert not made.refused


def test_of_what_is_installed_only_the_machine_itself_is_asked(project):
    run = project([{"sft": {**SFT, "device": "cuda"}}], evals={})
    assert make_plan(run.path, target_of("1xH100", "this", 1, False), None, []).forecasts


def test_a_config_alone_is_planned_and_says_what_was_not_asked(project, model_dir):
    run = project([{"sft": {**SFT, **LORA, "lora_target": ["zzz"]}}], evals={}, base_model="./bare")
    (run.folder / "bare").mkdir()
    shutil.copy(model_dir("qwen3") / "config.json", run.folder / "bare")
    assert "is asked when the run starts" in make_plan(run.path, target_of(None, "h100", 1, False), None, []).notes[-1]
    run.values["stages"] = [{"sft": {**SFT, "unfrozen_layers": 9}}]
    with pytest.raises(PosttrainError, match="unfrozen_layers: 9: the model has 2 layers"):
        make_plan(run.path, target_of(None, "h100", 1, False), None, [])


def test_import_asks_the_model_where_it_is_here(tmp_path, model_dir, capsys):
    from posttrain.cli.app import main

    theirs = {"base_model": str(model_dir("qwen3")), "adapter": "lora", "lora_target_modules": ["zzz"], "datasets": [{"path": "rows.jsonl", "type": "chat_template"}]}  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("no row")
    (tmp_path / "axolotl.yaml").write_text(json.dumps(theirs))
    with pytest.raises(SystemExit) as ended:
        main(["import", str(tmp_path / "axolotl.yaml"), "--tool", "axolotl"])
    said = capsys.readouterr()
    assert ended.value.code == 64 and "lora_target: 'zzz' matches no module" in said.err + said.out
    assert (tmp_path / "axolotl.posttrain.yaml").exists()
