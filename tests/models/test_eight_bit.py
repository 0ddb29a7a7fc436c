"""A frozen base in 8 bits: what is trained on it is what is exported, and what PEFT on bitsandbytes computes."""

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models.batch import pack
from posttrain.models.export import merge_adapter, save_policy
from posttrain.models.load import load_policy
from posttrain.models.provenance import recorded_bits
from posttrain.types import TokenSeq

pytest.importorskip("bitsandbytes", reason="8 bits need bitsandbytes")

EIGHT = {"adapter": "lora", "load_in_8bit": True, "lora_r": 4}
IDS = list(range(3, 35))


def moved(policy, std=0.05):
    torch.manual_seed(5)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


def logp(policy):
    return policy.score(pack([[TokenSeq(tuple(IDS), (False,) + (True,) * (len(IDS) - 1))]])).logp_M


def own_logp(model):
    ids = torch.tensor([IDS])
    return model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def test_the_base_lies_in_8_bits_and_evals_compute_what_training_does(policy_of):
    policy = moved(policy_of("llama", **EIGHT))
    layer = policy.base.model.layers[0].mlp.up_proj.base_layer
    assert layer.weight.dtype == torch.int8
    found = []
    for mode in (True, False):
        policy.model.train(mode)
        policy.model.zero_grad()
        logp(policy).sum().backward()
        found.append((logp(policy).detach(), {name: p.grad.clone() for name, p in policy.trainable()}))
    (training, gradients), (scoring, again) = found
    assert torch.equal(training, scoring)
    assert all(torch.equal(gradients[name], again[name]) and gradients[name].abs().max() > 0 for name in gradients)


def test_loss_and_update_are_those_of_peft_on_bitsandbytes(keys_of):
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    keys = keys_of("llama", **EIGHT)
    policy = moved(load_policy(keys))
    base = AutoModelForCausalLM.from_pretrained(
        keys.base_model, quantization_config=BitsAndBytesConfig(load_in_8bit=True), dtype=torch.float32
    )
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    set_peft_model_state_dict(theirs, get_peft_model_state_dict(policy.model))
    theirs.train()
    for ours, loss in ((policy.model, lambda: -logp(policy).mean()), (theirs, lambda: -own_logp(theirs).mean())):
        optimizer = torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
        for _ in range(2):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
        ours.last_loss = float(value.detach())
    assert policy.model.last_loss == pytest.approx(theirs.last_loss, abs=1e-4)
    torch.testing.assert_close(logp(policy), own_logp(theirs), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("onto", ["dequantized", "original"])
def test_it_is_merged_onto_the_base_it_names_and_again_by_its_record(onto, keys_of, tmp_path):
    keys = keys_of("llama", **EIGHT, merge_onto=onto)
    policy = moved(load_policy(keys))
    report = save_policy(policy, tmp_path / "model", keys)
    assert report.base == onto
    assert json.loads((tmp_path / "model/posttrain.json").read_text())["merged_onto"] == onto
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        difference = (own_logp(model) - logp(policy)).abs().max()
    assert difference < 1e-3 if onto == "dequantized" else 1e-4 < difference < 0.5
    told = ModelKeys(base_model=keys.base_model, merge_onto=onto, **recorded_bits(tmp_path / "adapter"))
    assert told.load_in_8bit
    merged = merge_adapter(keys.base_model, tmp_path / "adapter", told)
    saved = load_file(tmp_path / "model/model.safetensors")
    for name, tensor in merged.model.state_dict(keep_vars=True).items():
        torch.testing.assert_close(merged.sharding.whole(tensor).float(), saved[name].float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bf16": True}, {"gradient_checkpointing": True}])
def test_it_is_proven_with_what_lies_beside(options, bf16_dir, keys_of, tmp_path):
    keys = keys_of("llama", **EIGHT, **options).model_copy(update={"base_model": str(bf16_dir("llama"))})
    policy = moved(load_policy(keys))
    logp(policy).sum().backward()
    assert save_policy(policy, tmp_path / "model", keys).relative < 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "none"}, r"load_in_8bit: true with adapter: none would train nothing; set adapter: lora"),
        ({"adapter": "qlora", "load_in_4bit": True}, r"adapter: qlora asks for 4 bits and 8"),
        ({"load_in_4bit": True}, r"load_in_8bit: true with load_in_4bit: true"),
        ({"torch_compile": True}, r"torch_compile: true with load_in_8bit: true"),
        ({"layer_offloading": True, "gradient_checkpointing": True}, r"load_in_8bit: true with layer_offloading: true"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(options, message, keys_of):
    with pytest.raises(ValidationError, match=message):
        keys_of("llama", **EIGHT | options)


def test_processes_that_share_the_weights_are_refused(keys_of):
    class Shared:
        is_sharded, num_shards = True, 2

    with pytest.raises(ModelError, match=r"load_in_8bit: true with 2 processes.* set adapter: qlora"):
        load_policy(keys_of("llama", **EIGHT), sharding=Shared())


def test_an_init_that_moves_the_base_is_refused(policy_of):
    with pytest.raises(ModelError, match="a base in 8 bits"):
        policy_of("llama", **EIGHT, init_lora_weights="olora")
