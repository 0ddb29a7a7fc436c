"""What leaves a policy is what it computes with, under the names of the base's file, one tensor at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.stages import SFTKeys
from posttrain.models.load import load_policy
from posttrain.models.weights import named_weights

IDS = torch.arange(3, 20)[None]


def policy_of(model_dir, architecture="llama", **options):
    keys = SFTKeys(
        base_model=str(model_dir(architecture)), datasets=[{"path": "x"}], bf16=False, device="cpu", **options
    )
    return load_policy(keys)


def shifted(policy):
    """The policy after a step of training, so to speak."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(policy.trainable()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.02)
    return policy


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": "lora", "lora_r": 4},
        {"adapter": "lora", "lora_r": 4, "use_dora": True},
        {"adapter": "lora", "lora_r": 4, "lora_modules_to_save": ["norm"]},
    ],
    ids=["full", "lora", "dora", "modules to save"],
)
def test_a_base_filled_with_all_weights_is_the_policy(architecture, options, model_dir):
    policy = shifted(policy_of(model_dir, architecture, **options))
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    base = AutoModelForCausalLM.from_pretrained(model_dir(architecture), dtype=torch.float32).eval()
    sent = dict(named_weights(policy, "all"))
    missing, unexpected = base.load_state_dict(sent, strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}
    base.tie_weights()
    with torch.no_grad():
        expected = policy.model.eval()(input_ids=IDS, use_cache=False).logits
        found = base(input_ids=IDS, use_cache=False).logits
    assert float((expected - found).abs().max()) < 1e-4
    after = policy.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_what_is_trained_of_an_adapter(model_dir):
    policy = shifted(policy_of(model_dir, adapter="lora", lora_r=4))
    adapter, trained = dict(named_weights(policy, "adapter")), dict(named_weights(policy, "trained"))
    assert all("lora_" in name for name in adapter) and len(adapter) == len(trained)
    assert sum(tensor.numel() for tensor in adapter.values()) == sum(p.numel() for _, p in policy.trainable())


def test_tied_weights_come_once(model_dir):
    policy = policy_of(model_dir, "qwen3")
    names = [name for name, _ in named_weights(policy, "all")]
    assert len(names) == len(set(names))
    assert ("lm_head.weight" in names) != policy.base.config.tie_word_embeddings
