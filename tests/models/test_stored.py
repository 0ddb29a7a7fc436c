"""A checkpoint whose weights are stored in MXFP4 is unpacked; another way of storing is refused by name."""

import json
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.conftest import keys_for
from transformers import AutoModelForCausalLM, Mxfp4Config

from posttrain.errors import ModelError
from posttrain.models.load import load_policy

KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


@pytest.fixture
def packed_model(make_local_model):
    """A tiny gpt-oss as it is published: experts in blocks of 32 four-bit numbers with a scale each."""
    folder = make_local_model("gpt_oss", hidden_size=64, intermediate_size=64)
    made, stored = torch.Generator().manual_seed(0), {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = weight.shape
            blocks = (experts, outer, inner // 32)
            stored[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), generator=made, dtype=torch.uint8)
            stored[f"{name}_scales"] = torch.randint(114, 120, blocks, generator=made, dtype=torch.uint8)
        else:
            stored[name] = weight.to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    say_stored(folder, {"quant_method": "mxfp4", "modules_to_not_convert": KEPT})
    return folder


def say_stored(folder, how):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16", "quantization_config": how}))


def unpacked(folder):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True), dtype="auto")


def test_mxfp4_is_unpacked_as_transformers_does(packed_model):
    ours = dict(load_policy(keys_for(packed_model), trainable=False).model.named_parameters())
    theirs = dict(unpacked(packed_model).named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].float(), theirs[name].float()) for name in theirs)


def test_what_was_unpacked_has_float32_masters(packed_model):
    trained = load_policy(keys_for(packed_model)).model
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_what_was_unpacked_is_trained_and_exported_as_floats(packed_model, train, adapter):
    folder = train("sft", base_model=str(packed_model), adapter=adapter, max_steps=1)
    assert "quantization_config" not in json.loads((folder / "model" / "config.json").read_text())
    weights = load_file(next((folder / "model").glob("*.safetensors")))
    assert not [name for name in weights if name.endswith(("_blocks", "_scales"))]
    before, after = (dict(model.named_parameters()) for model in (unpacked(packed_model), reloaded(folder)))
    experts = "model.layers.0.mlp.experts.down_proj"
    assert torch.allclose(before[experts].float(), after[experts].float(), atol=0.05)
    assert any(not torch.equal(before[name], after[name].to(before[name].dtype)) for name in before)


def reloaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model")


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_another_way_of_storing_is_refused_by_name(make_local_model, method):
    folder = make_local_model("qwen3")
    say_stored(folder, {"quant_method": method, "bits": 4})
    with pytest.raises(
        ModelError, match=rf"quantised \({method} in config.json\).*name the model that it was made from"
    ):
        load_policy(keys_for(folder))


@pytest.mark.skipif(find_spec("optimum") is not None, reason="optimum is installed, which reads GPTQ")
def test_a_way_of_storing_whose_library_is_missing_is_one_line_where_it_is_only_scored(make_local_model):
    folder = make_local_model("qwen3")
    say_stored(folder, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match=r"did not load: Loading a GPTQ quantized model requires optimum"):
        load_policy(keys_for(folder), trainable=False)


def test_what_is_packed_is_not_quantised_once_more(packed_model):
    with pytest.raises(ModelError, match=r"MXFP4.*set adapter: lora"):
        load_policy(keys_for(packed_model, adapter="qlora"))
