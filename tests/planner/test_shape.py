"""Sizes of many families, from the config alone, against the models that transformers makes of it (without weights)."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.errors import ModelError
from posttrain.planner import ModelShape

SIZES = {"vocab_size": 999, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
         "intermediate_size": 512, "max_position_embeddings": 512}  # fmt: skip
GPT = {"vocab_size": 999, "n_embd": 256, "n_layer": 3, "n_head": 8, "n_positions": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
GPT_SIZES = {key: value for key, value in NEOX.items() if key != "intermediate_size"}
STATES = {"vocab_size": 999, "hidden_size": 256, "num_hidden_layers": 3, "state_size": 8}
CONFIGS = {
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 16},
    "gpt_neo": {"vocab_size": 999, "hidden_size": 256, "num_layers": 3, "num_heads": 8, "attention_types": [[["global"], 3]], "max_position_embeddings": 512},
    "gpt_neox": NEOX,
    "bloom": {"vocab_size": 999, "hidden_size": 256, "n_layer": 3, "n_head": 8},
    "falcon": {**GPT_SIZES, "new_decoder_architecture": False, "multi_query": True},
    "mpt": {"vocab_size": 999, "d_model": 256, "n_layers": 3, "n_heads": 8, "max_seq_len": 512},
    "opt": {"vocab_size": 999, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "ffn_dim": 512, "max_position_embeddings": 512, "word_embed_proj_dim": 256},
    "phi": SIZES,
    "phi3": {**SIZES, "pad_token_id": 0},
    "starcoder2": SIZES,
    "stablelm": SIZES,
    "cohere": SIZES,
    "llama": SIZES,
    "mistral": SIZES,
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 64},
    "olmo2": SIZES,
    "granite": SIZES,
    "smollm3": {**SIZES, "pad_token_id": 0},
    "gemma": {**SIZES, "head_dim": 32},
    "gemma2": {**SIZES, "head_dim": 32},
    "gemma3_text": {**SIZES, "head_dim": 32},
    "glm4": {**SIZES, "head_dim": 32, "pad_token_id": 0},
    "mixtral": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**SIZES, **EXPERTS, "shared_expert_intermediate_size": 256, "decoder_sparse_step": 1},
    "qwen3_moe": {**SIZES, **EXPERTS, "mlp_only_layers": [1]},
    "gpt_oss": {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    "deepseek_v3": {**SIZES, **LATENT, "num_key_value_heads": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "mamba": STATES,
    "falcon_mamba": {**STATES, "use_bias": True, "use_conv_bias": False},
    "mamba2": {**STATES, "num_heads": 32, "head_dim": 16, "n_groups": 2},
    "glm4_moe": {**SIZES, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 32, "n_group": 1, "topk_group": 1},
}  # fmt: skip


@pytest.mark.parametrize("model_type", CONFIGS)
def test_parameters_are_those_of_the_model(model_type):
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config.to_dict())
    assert shape.num_params == pytest.approx(model.num_parameters(), rel=0.01)
    linear = sum(m.weight.numel() for name, m in model.named_modules() if type(m).__name__.endswith(("Linear", "Conv1D")) and "head" not in name and "router" not in name)  # fmt: skip
    if not shape.num_experts:
        assert shape.linear_params == linear


@pytest.mark.parametrize("config", ["gpt2", "falcon", "mpt", "opt", "phi", "phi3", "llama", "deepseek_v3"])
def test_linear_modules_have_the_names_that_an_adapter_is_given(config):
    made = AutoConfig.for_model(config, **CONFIGS[config])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    shape = ModelShape.from_config(made.to_dict())
    assert {name.split(".")[-1] for name in shape.linear_shapes if not name.startswith("experts.")} <= names


PUBLIC = {  # published totals and active parameters, in billions; gpt-oss leaves its input embedding out of what is active
    "Qwen3-30B-A3B": ({"model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "vocab_size": 151936, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}, 30.5, 3.3),
    "Qwen3-235B-A22B": ({"model_type": "qwen3_moe", "hidden_size": 4096, "num_hidden_layers": 94, "vocab_size": 151936, "intermediate_size": 12288, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536}, 235, 22),
    "DeepSeek-V3": ({"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "vocab_size": 129280, "intermediate_size": 18432, "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1, "first_k_dense_replace": 3}, 671, 37),
    "gpt-oss-20b": ({"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "vocab_size": 201088, "intermediate_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4}, 20.9, 3.6 + 0.58),
    "Mixtral-8x7B": ({"model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2}, 46.7, 12.9),
    "gpt2": ({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}, 0.124, 0.124),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_total_and_active_parameters_of_public_models(name):
    config, total, active = PUBLIC[name]
    shape = ModelShape.from_config(config)
    assert shape.num_params / 1e9 == pytest.approx(total, rel=0.02)
    assert shape.active_params / 1e9 == pytest.approx(active, rel=0.03)


def test_latent_attention_keeps_576_values_of_a_token_and_layer():
    assert ModelShape.from_config(PUBLIC["DeepSeek-V3"][0]).kv_bytes_per_token() == 61 * (512 + 64) * 2


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            {"model_type": "t5", "is_encoder_decoder": True, "d_model": 8},
            "model_type t5; expected a decoder-only model",
        ),
        (
            {"model_type": "rwkv", "hidden_size": 8},
            "model_type rwkv; expected a decoder-only model whose layers are known",
        ),
        ({"model_type": "llama", "vocab_size": 9}, "no hidden_size, num_hidden_layers"),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(config, says):
    with pytest.raises(ModelError, match=says):
        ModelShape.from_config(config)


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)  # fmt: skip


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *EXPERTS,
                *LATENT,
                *SIZES,
                "head_dim",
                "state_size",
                "time_step_rank",
                "expand",
                "sliding_window",
                "layer_types",
                "text_config",
            ]
        ),
        JUNK,
    )
)
def test_a_config_of_no_sizes_is_refused_and_nothing_else_is_raised(changes):
    for model_type in ("llama", "qwen3_moe", "gemma3_text", "deepseek_v3", "mamba", "mamba2"):
        with suppress(ModelError):
            ModelShape.from_config({"model_type": model_type, **SIZES, **changes})
