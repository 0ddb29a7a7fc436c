import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.config.resolved import resolved_yaml
from posttrain.config.stages import SFTKeys
from posttrain.files import digest_tree
from posttrain.forms.export.form_gate import check_merge
from posttrain.forms.found import find_model
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.provenance import source_digest
from posttrain.registry import Manifest, Registry


@pytest.fixture(scope="module")
def stage(model_dir, tmp_path_factory):
    """A QLoRA stage with its adapter, and its model merged onto the dequantised base."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (pip install 'posttrain[qlora]')")
    folder = tmp_path_factory.mktemp("stage")
    keys = SFTKeys(
        base_model=str(model_dir("qwen3")),
        datasets=[{"path": "train.jsonl"}],
        adapter="qlora",
        lora_r=4,
        lora_alpha=8,
        lora_target=["q_proj", "down_proj"],
    )  # pyright: ignore
    policy = load_policy(keys)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    save_policy(policy, folder / "model", keys)
    (folder / "config.yaml").write_text(resolved_yaml(keys))
    return folder


def beside(stage, tmp_path, model, record):
    """The stage with another model in it."""
    folder = tmp_path / "stage"
    shutil.copytree(stage, folder)
    if model is not None:
        save_file(model, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    if record is None:
        (folder / "model" / "posttrain.json").unlink()
    else:
        (folder / "model" / "posttrain.json").write_text(json.dumps(record))
    return folder / "model"


def onto_the_original(stage, base):
    weights, adapter = load_file(base / "model.safetensors"), load_file(stage / "adapter" / "adapter_model.safetensors")
    for key in [key for key in adapter if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weights[f"{name}.weight"] += 8 / 4 * adapter[key.replace("lora_A", "lora_B")] @ adapter[key]
    return weights


def test_an_adapter_of_a_base_in_4_bits_merged_onto_the_original_without_saying_so_fails(stage, model_dir, tmp_path):
    weights = onto_the_original(stage, model_dir("qwen3"))
    for place, record in enumerate(({"merged_onto": "dequantized"}, {}, None)):
        found = check_merge(beside(stage, tmp_path / str(place), weights, record))
        assert not found.passed and "merged onto the original weights, and it says" in found.seen
    said = check_merge(beside(stage, tmp_path / "said", weights, {"merged_onto": "original"}))
    assert said.passed and "merged onto the original weights of a base in 4 bits, as it says" in said.seen


def test_a_merge_that_is_what_it_says_passes(stage, tmp_path):
    assert check_merge(stage / "model").passed
    lying = check_merge(beside(stage, tmp_path, None, {"merged_onto": "original"}))
    assert not lying.passed and "its weights do not" in lying.seen


def test_a_model_without_such_an_adapter_has_nothing_to_say(model_dir):
    assert check_merge(model_dir("llama")).passed


def test_a_version_of_a_registry_is_compared_with_the_adapter_that_it_keeps(stage, model_dir, tmp_path):
    base, book = model_dir("qwen3"), Registry(tmp_path / "registry")
    kept = tmp_path / "adapter_total"
    shutil.copytree(stage / "adapter", kept)
    (kept / "posttrain.json").write_text(
        json.dumps({"base_digest": source_digest(str(base)), "load_in_4bit": True, "rounded": []})
    )
    (tmp_path / "config.yaml").write_text(f"base_model: {base}\n")
    weights = onto_the_original(stage, base)
    for place, record in enumerate(({"merged_onto": "dequantized"}, {"merged_onto": "original"}), start=1):
        made = beside(stage, tmp_path / str(place), weights, record)
        first = Manifest("sft", {"model": source_digest(str(base))}, {"model": digest_tree(made)})
        book.register("words", made, first, evidence={"adapter_total": kept, "config": tmp_path / "config.yaml"})
    book.close()
    lying, honest = (find_model(f"words@{version}", tmp_path / "registry") for version in (1, 2))
    assert lying.base == base
    planted = check_merge(lying.folder, lying.adapter, lying.base)
    assert not planted.passed and "merged onto the original weights, and it says" in planted.seen
    assert check_merge(honest.folder, honest.adapter, honest.base).passed
    assert "is no longer there to compare" in check_merge(honest.folder, honest.adapter).seen
