import pytest
import torch
from transformers import AutoConfig

from posttrain.errors import ModelError
from posttrain.forms.export.families import GGUF_FAMILIES, family_of, numbers_of, rope_factors, stored


def test_llamas_scaled_frequencies_are_factors_by_frequency():
    """Short wavelengths stay, long ones are divided by `factor`, between them is a slope. Source: the Llama 3.1 release."""
    scaling = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = AutoConfig.for_model("llama", head_dim=128, rope_parameters=scaling, max_position_embeddings=131072)
    factors = rope_factors(config)
    wavelength = 2 * torch.pi * 500000.0 ** (torch.arange(0, 128, 2) / 128)
    torch.testing.assert_close(factors[wavelength < 8192 / 4], torch.ones(int((wavelength < 8192 / 4).sum())))
    torch.testing.assert_close(factors[wavelength > 8192], torch.full((int((wavelength > 8192).sum()),), 8.0))
    assert bool((factors.diff() >= -1e-4).all())


def test_queries_are_stored_with_the_pairs_of_a_rotation_side_by_side():
    """One head of four numbers: halves (0, 1) and (2, 3) rotate as pairs (0, 2) and (1, 3)."""
    config = AutoConfig.for_model("llama", num_attention_heads=2, num_key_value_heads=1)
    rows = torch.arange(8.0)[:, None]
    found = stored(GGUF_FAMILIES["llama"], config, "model.layers.0.self_attn.q_proj.weight", rows)
    assert found[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    same = stored(GGUF_FAMILIES["qwen3"], config, "model.layers.0.self_attn.q_proj.weight", rows)
    assert torch.equal(same, rows)


def test_gemmas_norms_are_stored_as_one_plus_w_and_its_caps_are_said():
    config = AutoConfig.for_model("gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
    found = stored(GGUF_FAMILIES["gemma2"], config, "model.norm.weight", torch.zeros(3))
    assert found.tolist() == [1, 1, 1]
    numbers = numbers_of(config)
    assert numbers["attn_logit_softcapping"] == ("float32", 5.0) and numbers["final_logit_softcapping"] == (
        "float32",
        8.0,
    )


def test_the_scale_of_gemmas_queries_is_what_llama_cpp_takes():
    """Gemma 2 27B: 4608 / 32 heads = 144, beside a head_dim of 128; its smaller ones: head_dim."""
    largest = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    assert family_of(AutoConfig.for_model("gemma2", query_pre_attn_scalar=144, **largest)).arch == "gemma2"
    for scalar, shape in ((128, largest), (144, {**largest, "num_hidden_layers": 42})):
        with pytest.raises(ModelError, match=f"query_pre_attn_scalar {scalar}, where llama.cpp takes"):
            family_of(AutoConfig.for_model("gemma2", query_pre_attn_scalar=scalar, **shape))
