import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.app import main
from posttrain.config.resolved import resolved_yaml
from posttrain.config.stages import SFTKeys
from posttrain.files import digest_tree
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.registry.manifest import Manifest
from posttrain.registry.registry import Registry

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


def test_an_adapter_away_from_its_stage_still_says_that_its_base_was_in_4_bits(stage, model_dir, tmp_path, capsys):
    shutil.copytree(stage / "adapter", tmp_path / "moved")
    argv = ("merge", tmp_path / "moved", "--base", model_dir("qwen3"), "--out")
    assert run(*argv, tmp_path / "merged") == 0
    assert "dequantised from 4 bits" in capsys.readouterr().out
    assert run(*argv, tmp_path / "original", "--onto", "original") == 0
    assert "original weights (trained on 4 bits)" in capsys.readouterr().out


@pytest.fixture
def recipe(model_dir, tmp_path):
    """A half of what a sibling of the base learned; the sibling is a version of a registry."""
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(model_dir("qwen3")).save_pretrained(tuned)
    book = Registry(tmp_path / "registry")
    made = {"model": digest_tree(tuned)}
    book.register("words", tuned, Manifest("sft", {"model": digest_tree(model_dir("qwen3"))}, made))
    book.close()
    path = tmp_path / "merge.yaml"
    path.write_text(
        f"merge_method: task_arithmetic\nbase_model: {model_dir('qwen3')}\nmodels:\n- model: words@1\n  parameters: {{weight: 0.5}}\n"
    )
    return path


def test_a_merge_by_a_yaml_is_a_version_with_its_parents_in_the_lineage(recipe, model_dir, tmp_path, capsys):
    out, registry = tmp_path / "merged", tmp_path / "registry"
    assert run("merge", recipe, "--out", out, "--registry", registry, "--register", "soup") == 0
    assert "version  soup@1" in capsys.readouterr().out
    name = "model.layers.0.mlp.up_proj.weight"
    ours, base = (load_file(folder / "model.safetensors")[name] for folder in (out, model_dir("qwen3")))
    torch.testing.assert_close(ours, base + 0.05)
    book = Registry(registry)
    parent, made = book.chain("words", 1)[-1], book.chain("soup", 1)[-1]
    book.verify("soup", 1)
    book.close()
    assert made.inputs["model"] == digest_tree(model_dir("qwen3")) and made.outputs["model"] == digest_tree(out)
    assert made.inputs["parent.1"] == parent.outputs["model"] and made.inputs["parent.1.manifest"] == parent.digest
    assert made.details["parents"][1] == "words@1" and made.details["recipe"] == recipe.read_text()


def test_a_merged_model_is_judged_and_promoted_like_any_other(recipe, model_dir, tmp_path, capsys):
    out, registry, suite = tmp_path / "merged", tmp_path / "registry", tmp_path / "sums.jsonl"
    rows = [{"id": str(n), "prompt": f"What is {n}?", "target": "7", "scorer": "exact"} for n in range(40)]
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("merge", recipe, "--out", out, "--registry", registry, "--register", "soup") == 0
    for model, folder in ((out, "a"), (model_dir("qwen3"), "b")):
        assert run("eval", model, "--suite", suite, "--max-tokens", 2, "--out", tmp_path / folder) == 0
    spec = tmp_path / "gate.yaml"
    spec.write_text("guards: [{suite: sums, margin: 0.6}]\n")
    assert run("gate", tmp_path / "a", tmp_path / "b", "--spec", spec, "--out", tmp_path / "verdict") == 0
    assert run("registry", "promote", "soup@1", "--verdict", tmp_path / "verdict", "--registry", registry) == 0
    assert "[champion]" in capsys.readouterr().out


def test_options_of_the_other_kind_of_merge_are_refused(recipe, adapter, tmp_path, capsys):
    assert run("merge", recipe, "--out", tmp_path / "x", "--onto", "original") == 64
    assert "are about one adapter" in capsys.readouterr().err
    assert run("merge", adapter, "--out", tmp_path / "x", "--register", "soup") == 64
    assert "are about a YAML" in capsys.readouterr().err
    assert run("merge", recipe, "--out", tmp_path / "x", "--registry", tmp_path / "none") == 64
    assert "words@1: no such folder" in capsys.readouterr().err
