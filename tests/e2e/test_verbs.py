"""`posttrain sft|dpo|grpo CONFIG` with the flat YAML as users write it, on a tiny local model in 4 bits."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.app import main
from posttrain.files import read_json
from posttrain.report.records import read_run

VERBATIM = """\
base_model: Qwen/Qwen3-8B
adapter: qlora
load_in_4bit: true
lora_r: 16
lora_alpha: 32
lora_target: [q_proj, k_proj, v_proj, o_proj]
sequence_len: 4096
gradient_checkpointing: true
bf16: true
datasets: [{ path: ./sft_data.jsonl, type: chat }]
"""
FOR_VERB = {
    "sft": (VERBATIM, "sft"),
    "dpo": (VERBATIM.replace("type: chat", "type: preference"), "pairs"),
    "grpo": (
        VERBATIM.replace("type: chat", "type: prompt") + "reward_funcs: [rewards.py:spread]\nreward_check: off\n",
        "prompts",
    ),
}
"""Verb → its YAML, and the rows that stand in `sft_data.jsonl`."""
FEW = {
    "sft": [],
    "dpo": ["max_steps=2"],
    "grpo": ["max_steps=1", "num_generations=2", "num_prompts_per_step=2", "max_completion_length=4"],
}


def call(verb, *argv):
    with pytest.raises(SystemExit) as caught:
        main([verb, *map(str, argv)])
    return caught.value.code


@pytest.fixture
def config(tmp_path, data_dir):
    def write(verb):
        text, rows = FOR_VERB[verb]
        (tmp_path / "sft_data.jsonl").write_text((data_dir / f"{rows}.jsonl").read_text())
        (tmp_path / "rewards.py").write_text((data_dir / "rewards.py").read_text())
        path = tmp_path / "first.yaml"
        path.write_text(text)
        return path

    return write


def sets(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


@pytest.mark.parametrize("verb", FOR_VERB)
def test_the_verbatim_yaml_trains_a_4_bit_adapter_and_the_result_is_a_plain_model(config, model_dir, verb, capsys):
    path = config(verb)
    base = model_dir("qwen3")
    assert call(verb, path, *sets(f"base_model={base}", *FEW[verb])) == 0
    captured = capsys.readouterr()
    assert "lora_alpha" in captured.err, "what was set is printed, with where it came from"
    assert "weight_decay" not in captured.err and re.search(r"\d+ defaults: --verbose", captured.err)
    assert "Loading weights" not in captured.err, "no bars of the libraries"
    out = path.parent / "runs" / "first"
    run = read_run(out)
    assert run.problems == ()
    assert (run.status, [stage.kind for stage in run.stages]) == ("done", [verb])
    stage = out / "stages" / f"01-{verb}"
    for line in (f"model   {stage / 'model'}", f"report  {out / 'report.html'}"):
        assert line in captured.out
    model = AutoModelForCausalLM.from_pretrained(stage / "model")
    assert getattr(model.config, "quantization_config", None) is None
    tokenizer = AutoTokenizer.from_pretrained(stage / "model")
    ids = torch.tensor([tokenizer("What is 1 plus 2?")["input_ids"]])
    assert model(input_ids=ids).logits.isfinite().all()
    adapter = read_json(stage / "adapter" / "adapter_config.json")
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)
    assert sorted(adapter["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_the_adapter_loads_in_peft_on_the_base(config, model_dir):
    from peft import PeftModel

    path, base = config("sft"), model_dir("qwen3")
    assert call("sft", path, "--quiet", *sets(f"base_model={base}", "learning_rate=1e-2")) == 0
    stage = path.parent / "runs/first/stages/01-sft"
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(3, 20)[None]
    before = plain(input_ids=ids).logits
    adapted = PeftModel.from_pretrained(plain, stage / "adapter")
    assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-3


def test_started_again_a_stage_is_not_run_again(config, model_dir, capsys):
    path, base = config("sft"), model_dir("qwen3")
    assert call("sft", path, "--quiet", *sets(f"base_model={base}")) == 0
    state = read_json(path.parent / "runs/first/pipeline.json")
    assert call("sft", path, "--quiet", *sets(f"base_model={base}")) == 0
    assert read_json(path.parent / "runs/first/pipeline.json") == state
    assert "not run again" in capsys.readouterr().err


def test_any_key_can_be_overridden_from_the_command_line(config, model_dir):
    path, base = config("sft"), model_dir("qwen3")
    given = sets(
        f"base_model={base}", "adapter=none", "load_in_4bit=false", "learning_rate=1e-3", "output_dir=elsewhere"
    )
    assert call("sft", path, "--quiet", *given, *sets("max_steps=1")) == 0
    out = path.parent / "elsewhere"
    assert read_run(out).stages[0].metrics[0]["learning_rate"] == pytest.approx(1e-3)
    assert not (out / "stages/01-sft/adapter").exists()


def test_without_hub_the_verbatim_yaml_says_so_in_one_line(config, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = config("sft")
    assert call("sft", path, "--quiet") == 64
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert error[0].startswith("error: base_model: Qwen/Qwen3-8B is not a local folder and could not be fetched")
    assert not (path.parent / "runs/first/stages").exists()


def test_where_8b_does_not_fit_it_says_so_in_one_line(config, model_dir, tmp_path, monkeypatch, capsys):
    """The sizes of the 8B model, with a file of one weight, on a machine with 4 GiB left."""
    sizes = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 4096,
        "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    big = tmp_path / "Qwen3-8B"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(sizes))
    save_file({"lm_head.weight": torch.zeros(1)}, big / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (big / name).write_bytes((model_dir("qwen3") / name).read_bytes())
    monkeypatch.setattr("posttrain.pipeline.checks.available_bytes", lambda: 4 << 30)
    path = config("sft")
    capsys.readouterr()
    assert call("sft", path, "--quiet", *sets(f"base_model={big}")) == 64
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "(8.2B) does not fit: QLoRA needs" in error[0]
    assert "this machine has 4.0 GiB free" in error[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--set", "lora_rank=true"), "lora_r"),
        (("--set", "lerning_rate=1"), "did you mean learning_rate?"),
        (("--on-change", "maybe"), "--on-change"),
        (("--set", "datasets=[{path: nowhere.jsonl}]"), "nowhere.jsonl does not exist"),
    ],
)
def test_wrong_usage_exits_64(config, model_dir, capsys, argv, message):
    path = config("sft")
    assert call("sft", path, "--quiet", *sets(f"base_model={model_dir('qwen3')}"), *argv) == 64
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
