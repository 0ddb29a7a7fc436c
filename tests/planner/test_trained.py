"""What is trained, counted before it is loaded, against what the stage then trains."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.config.stages import TrainKeys
from posttrain.errors import ModelError
from posttrain.files import read_json
from posttrain.models.freezing import freeze
from posttrain.planner import ModelShape, Workload, estimate_memory
from posttrain.planner.trained import adapter_params, trained_params


def _count(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _planned(model, **keys):
    shape = ModelShape.from_config(read_json(model / "config.json"))
    return shape, Workload(base_model=str(model), bf16=False, **keys)


@pytest.fixture
def model(model_dir):
    return model_dir("qwen3")


@pytest.mark.parametrize(
    ("keys", "slack"),
    [
        ({"unfrozen_layers": 1}, 0.01),
        ({"unfrozen_layers": -1, "unfrozen_layer_modules": ["mlp"]}, 0),
        ({"unfrozen_layers": 1, "unfrozen_parameters": [r"model\.embed_tokens"]}, 0.01),
        ({"unfrozen_parameters": [r"model\.layers\.1\.mlp\.", r"model\.layers\..*\.mlp\."]}, 0),
    ],
)
def test_layers_that_stay_as_they_are_need_no_gradient_in_a_plan(keys, slack, model):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    freeze(loaded, TrainKeys(base_model=str(model), datasets=[{"path": "rows.jsonl"}], **keys))
    shape, workload = _planned(model, **keys)
    assert _count(loaded) <= trained_params(shape, workload) <= (1 + slack) * _count(loaded)
    plan, whole = estimate_memory(shape, workload), estimate_memory(*_planned(model))
    assert plan.part("gradients") == 4 * plan.trained_params < whole.part("gradients")
    assert plan.part("weights") == whole.part("weights")


def test_a_name_that_a_config_does_not_say_counts_as_all(model):
    shape, workload = _planned(model, unfrozen_parameters=["model.layers.0.mlp", "transformer.h.0"])
    assert trained_params(shape, workload) == shape.num_params


def test_an_adapter_that_is_there_is_counted_by_its_file(model, tmp_path):
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        LoraConfig(r=6, rank_pattern={"q_proj": 3}, target_modules=["q_proj", "down_proj"]),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    named = {"adapter_name_or_path": str(tmp_path / "adapter")}
    assert trained_params(*_planned(model, adapter="lora", lora_r=64, **named)) == _count(adapted)
    shape, _ = _planned(model)
    continued = Workload(base_model=str(tmp_path / "model"), adapter="lora", adapter_start="continue")
    assert trained_params(shape, continued) == _count(adapted)


def test_weights_of_an_adapter_that_cannot_be_read_are_named(model, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors cannot be read"):
        trained_params(*_planned(model, adapter="lora", adapter_name_or_path=str(tmp_path)))


def test_modules_of_some_layers_are_counted_in_these_alone():
    shape = ModelShape(num_layers=4, hidden=8, intermediate=16, vocab=10, num_heads=2, num_kv_heads=1, head_dim=4)
    behind = r"(?:[^.]*[^.\d][^.]*\.){2,}(?:2|3)\.(?:.*\.)?(?:q_proj)"
    assert adapter_params(shape, 2, behind) == adapter_params(shape, 2, [behind]) == 2 * 2 * (8 + 8)
    assert adapter_params(shape, 2, [behind, "q_proj"]) == 4 * 2 * (8 + 8)
