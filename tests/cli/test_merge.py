import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.app import main
from posttrain.config.resolved import resolved_yaml
from posttrain.config.stages import SFTKeys
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy

PROBE = torch.arange(3, 40)[None]


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


def move(model):
    """A fresh adapter is a no-op: give B something to say."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=PROBE).logits


@pytest.fixture
def adapter(tmp_path, model_dir):
    """Made by PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"]))
    move(model)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def test_the_merged_model_is_base_plus_adapter(adapter, model_dir, tmp_path, capsys):
    out = tmp_path / "merged"
    assert run("merge", adapter, "--base", model_dir("qwen3"), "--out", out) == 0
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))
    before = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert "logits   differ by at most" in capsys.readouterr().out


def test_the_base_is_the_one_the_adapter_names(adapter, model_dir, tmp_path, capsys):
    assert run("merge", adapter, "--out", tmp_path / "merged") == 0
    assert f"base     {model_dir('qwen3')}\n" in capsys.readouterr().out
    record = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(record | {"base_model_name_or_path": None}))
    assert run("merge", adapter, "--out", tmp_path / "again") == 64
    assert "does not name its base; add --base MODEL" in capsys.readouterr().err


def test_nothing_is_overwritten(adapter, model_dir, tmp_path, capsys):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("years of work")
    assert run("merge", adapter, "--base", model_dir("qwen3"), "--out", tmp_path / "kept") == 64
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "years of work"


def test_another_base_is_refused(adapter, model_dir, tmp_path, capsys):
    (adapter / "posttrain.json").write_text(json.dumps({"base_digest": "sha256:" + "0" * 64}))
    assert run("merge", adapter, "--base", model_dir("qwen3"), "--out", tmp_path / "merged") == 64
    assert "give the base it was trained on" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_wrong_usage_says_what_to_do(adapter, model_dir, tmp_path, capsys):
    assert run("merge", model_dir("qwen3"), "--out", tmp_path / "merged") == 64
    assert "is a whole model: there is nothing to merge" in capsys.readouterr().err
    assert run("merge", tmp_path, "--out", tmp_path / "merged") == 64
    assert "has no adapter_config.json" in capsys.readouterr().err
    assert run("merge", adapter, "--out", tmp_path / "merged", "--onto", "original") == 64
    assert "--onto original is about a 4-bit base" in capsys.readouterr().err


@pytest.fixture
def stage(tmp_path, model_dir, data_dir):
    """The folder a QLoRA stage leaves behind."""
    keys = SFTKeys.model_validate(
        {"base_model": str(model_dir("qwen3")), "adapter": "qlora", "lora_r": 4, "datasets": [{"path": str(data_dir / "sft.jsonl")}]}
    )  # fmt: skip
    policy = load_policy(keys)
    move(policy.model)
    save_policy(policy, tmp_path / "stage" / "model", keys)
    (tmp_path / "stage" / "config.yaml").write_text(resolved_yaml(keys))
    return tmp_path / "stage"


def test_a_stage_says_how_its_adapter_was_trained(stage, tmp_path, capsys):
    assert run("merge", stage / "adapter", "--out", tmp_path / "merged") == 0
    assert "dequantised from 4 bits" in capsys.readouterr().out
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", stage / "model"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6)


def test_onto_the_original_weights(stage, model_dir, tmp_path, capsys):
    assert run("merge", stage / "adapter", "--out", tmp_path / "merged", "--onto", "original") == 0
    assert "original weights (trained on 4 bits)" in capsys.readouterr().out
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base, adapter = (
        load_file(model_dir("qwen3") / "model.safetensors"),
        load_file(stage / "adapter" / "adapter_model.safetensors"),
    )
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 32 / 4 * b @ a, atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "merged" / "posttrain.json").read_text())["merged_onto"] == "original"
