"""What is refused of a model without weights is what loading it refuses, in the same words."""

import json
import shutil

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.errors import ModelError
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.skeleton import check_loads

LORA = {"adapter": "lora"}
REFUSED = {
    "pissa_dora": ({**LORA, "init_lora_weights": "pissa", "use_dora": True}, "cannot be taken apart again"),
    "olora_qlora": ({"adapter": "qlora", "init_lora_weights": "olora"}, "a base in 4 bits cannot be taken apart"),
    "odd_orthogonal": ({**LORA, "init_lora_weights": "orthogonal", "lora_r": 3}, "PEFT refuses this adapter"),
    "target": ({**LORA, "lora_target": ["nothing"]}, "lora_target: 'nothing' matches no module"),
    "saved": ({**LORA, "lora_modules_to_save": ["nope"]}, "lora_modules_to_save: 'nope' is no module"),
    "rank": ({**LORA, "rank_pattern": {"nope": 3}}, "rank_pattern: 'nope' matches no adapted module"),
    "layers": ({"unfrozen_layers": 9}, "unfrozen_layers: 9: the model has 2 layers"),
    "parameters": ({"unfrozen_parameters": ["zzz"]}, "unfrozen_parameters: zzz matches no parameter"),
    "modules": ({"unfrozen_layers": 1, "unfrozen_layer_modules": ["q"]}, "unfrozen_layer_modules: q is no module"),
}
TAKEN = {
    "whole": {}, "lora": LORA, "dora": {**LORA, "use_dora": True}, "pissa": {**LORA, "init_lora_weights": "pissa"},
    "grown": {**LORA, "added_tokens": ["<zz>"]}, "frozen": {"unfrozen_layers": 1},
}  # fmt: skip


def _asked(model, **keys):
    made = SFTKeys.model_validate({"base_model": str(model), "datasets": [{"path": "rows.jsonl"}], **keys})
    tokenizer = load_tokenizer(made)
    return [_said(check_loads, made, tokenizer), _said(lambda *_: load_policy(made, tokenizer=tokenizer))]


def _said(ask, *given):
    try:
        ask(*given)
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", REFUSED)
def test_what_loading_refuses_is_refused_without_weights(name, model_dir):
    keys, says = REFUSED[name]
    asked, loaded = _asked(model_dir("qwen3"), **keys)
    assert asked == loaded and says in asked


def test_an_adapter_on_experts_between_processes_is_refused_before_a_stage_is_trained(model_dir):
    """Loading refuses it as soon as there are several processes."""
    keys = {**LORA, "sharding": {"tensor_parallel_size": 2}}
    model = model_dir("qwen3_moe")
    asked, _ = _asked(model, **keys, lora_target=["q_proj", "gate_up_proj"])
    assert "sharding.tensor_parallel_size: with an adapter" in asked and "take it out of the adapter" in asked
    assert _asked(model, **keys, lora_target=["q_proj"])[0] == ""


@pytest.mark.parametrize("name", TAKEN)
def test_what_loads_is_not_refused(name, model_dir):
    assert _asked(model_dir("qwen3"), **TAKEN[name]) == ["", ""]


@pytest.fixture(scope="module")
def adapter(model_dir, tmp_path_factory):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters") / "made"
    base = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, ""),
        ({"target_modules": ["nope"]}, "does not fit its base"),
        ({"target_modules": ["q_proj", "k_proj"]}, "weights missing"),
        ({"r": 8}, "does not fit its base"),
        ({"r": 0}, "does not fit its base"),
        ({"task_type": "SEQ_CLS"}, "head"),
    ],
)
def test_an_adapter_is_held_against_the_model_before_it_is_read(change, says, adapter, model_dir, tmp_path):
    mine = shutil.copytree(adapter, tmp_path / "mine")
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps(config | change))
    asked, loaded = _asked(model_dir("qwen3"), adapter="lora", adapter_name_or_path=str(mine))
    assert asked == loaded and says in asked and bool(asked) == bool(says)
