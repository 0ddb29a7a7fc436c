"""What is counted of a mixture of experts while it is trained."""

import math

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.models.routing import load_metrics, router_loads
from posttrain.types import TokenSeq


def test_loads_by_hand():
    """Two layers of four experts, two a token, ten tokens: one even, one in which the same two get all."""
    load_LE = torch.tensor([[5.0, 5, 5, 5], [10, 10, 0, 0]], dtype=torch.float64)
    found = load_metrics(load_LE, torch.tensor([10 * math.log(4), 0.0], dtype=torch.float64), per_token=2)
    assert found == pytest.approx(
        {"router/max_load": 2.0, "router/balance": 0.0, "router/idle": 0.25, "router/entropy": 0.5}
    )
    even = load_metrics(load_LE[:1], torch.tensor([10 * math.log(4)]), per_token=2)
    assert even == pytest.approx(
        {"router/max_load": 1.0, "router/balance": 1.0, "router/idle": 0.0, "router/entropy": 1.0}
    )


def test_experts_of_which_a_token_takes_all_are_even():
    assert load_metrics(torch.ones(1, 2), torch.zeros(1), per_token=2)["router/balance"] == 1.0


class Alone:
    def gather(self, value):
        return [value]


def _counted(policy, rows, on=True):
    with policy.routing.counting(on=on):
        policy.score(pack([[row] for row in rows]))
    return policy.routing.metrics(Alone())


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"])
def test_every_token_of_a_step_is_counted_once(architecture, runner, model_dir, data_dir):
    policy = load_policy(runner.keys_of("sft", model_dir(architecture), data_dir))
    assert policy.routing is not None
    rows = [TokenSeq(tuple(range(3 + i, 20 + i)), (True,) * 17) for i in range(3)]
    with policy.routing.counting(on=True):
        policy.score(pack([[row] for row in rows]))
    per_token = policy.base.config.get_text_config().num_experts_per_tok
    assert {float(load.sum()) for load in policy.routing._loads.values()} == {3 * 16 * per_token}
    found = policy.routing.metrics(Alone())
    assert 0 < found["router/balance"] <= 1 <= found["router/max_load"] and 0 < found["router/entropy"] <= 1
    # Neither rows that weigh nothing nor what is scored without a gradient is trained on.
    assert _counted(policy, rows, on=False) == {}
    with torch.no_grad():
        assert _counted(policy, rows) == {}


def test_routers_that_tell_no_tokens_apart_are_seen_to_have_collapsed(runner, model_dir, data_dir):
    policy = load_policy(runner.keys_of("sft", model_dir("qwen3_moe"), data_dir))
    rows = [TokenSeq(tuple(range(3, 60)), (True,) * 57)]
    assert _counted(policy, rows)["router/balance"] > 0.3
    policy.base.get_decoder().layers[1].mlp.gate.weight.data.zero_()
    found = _counted(policy, rows)
    assert (found["router/balance"], found["router/max_load"]) == (pytest.approx(0.0, abs=1e-9), 2.0)
    assert found["router/idle"] >= 0.25


def test_a_dense_model_has_nothing_to_count(runner, model_dir, data_dir):
    assert load_policy(runner.keys_of("sft", model_dir("llama"), data_dir)).routing is None


def _made(model_type, **sizes):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    } | sizes
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes))


def test_of_a_class_that_is_no_routers_own_only_routers_are_counted():
    """Jamba's are plain linear layers, and have one output."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "use_mamba_kernels": False}
    model = _made(
        "jamba", expert_layer_period=2, expert_layer_offset=1, attn_layer_period=1, attn_layer_offset=0, **sizes
    )
    loads = router_loads(model)
    assert loads is not None
    with loads.counting(on=True):
        model(input_ids=torch.arange(10)[None])
    assert [float(load.sum()) for load in loads._loads.values()] == [10 * model.config.num_experts_per_tok]


@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        ("jetmoe", {"num_key_value_heads": 2, "kv_channels": 8}),
        (
            "gemma4_text",
            {
                "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "hidden_size_per_layer_input": 0,
            },
        ),
    ],
)  # fmt: skip
def test_what_records_no_logits_of_one_choice_is_not_counted(model_type, sizes):
    assert router_loads(_made(model_type, **sizes)) is None
