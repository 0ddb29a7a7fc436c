import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.models import attention
from posttrain.models.batch import pack
from posttrain.models.selfcheck import cache_is_exact, ragged_is_exact

RAGGED = ("qwen3", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe")
ONE_BY_ONE = ("mamba", "gpt_oss")


@pytest.mark.parametrize("architecture", RAGGED + ONE_BY_ONE)
def test_answer_by_architecture(architecture, model_dir):
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_dir(architecture))
    before = model.config._attn_implementation
    assert ragged_is_exact(model) == (architecture in RAGGED)
    assert model.config._attn_implementation == before


def test_attention_that_leaks_is_found(model_dir, monkeypatch):
    """An attention that ignores the layout lets the second document see the first."""
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"))

    def leaky(module, query, key, value, mask, layout=None, **options):
        whole = attention.Layout((attention.Tree(0, query.shape[2]),))
        return attention.ragged_attention(module, query, key, value, mask, layout=whole, **options)

    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, leaky)
    try:
        assert not ragged_is_exact(model)
    finally:
        AttentionInterface.register(attention.NAME, attention.ragged_attention)
    assert ragged_is_exact(model)


def other_shape(architecture):
    from tests.docs.test_families import SHAPES

    return SHAPES.get(architecture, {})


@pytest.mark.parametrize(
    "architecture",
    [
        *ONE_BY_ONE,
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_h1", "lfm2", "qwen3_next", "stablelm")),
    ],
)
def test_the_cache_of_a_model_is_exact_until_it_forgets_or_comes_late(architecture, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir(architecture, **other_shape(architecture))).eval()
    assert cache_is_exact(model)

    def forget(_, args, given):
        return args, {name: value for name, value in given.items() if name not in ("past_key_values", "cache_params")}

    hook = model.register_forward_pre_hook(forget, with_kwargs=True)
    assert not cache_is_exact(model)
    hook.remove()
    seen = []

    def repeat_one(_, args, given):
        if given["use_cache"] and given["input_ids"].shape[1] == 1:
            seen.append(given["input_ids"])
            given["input_ids"] = seen[max(0, len(seen) - 2)]
        return args, given

    hook = model.register_forward_pre_hook(repeat_one, with_kwargs=True)
    assert not cache_is_exact(model)
    hook.remove()


def test_the_cache_of_frequencies_that_depend_on_length_is_not_exact(model_dir):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama", rope_parameters=rope, max_position_embeddings=64))
    assert not cache_is_exact(model.eval())


@pytest.mark.parametrize("architecture", ONE_BY_ONE)
def test_other_models_run_one_by_one_with_one_notice(architecture, model_dir, policy_of, oracle, turns, caplog):
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        policy = policy_of(architecture)
    notices = [r.getMessage() for r in caplog.records if "one by one" in r.getMessage()]
    assert len(notices) == 1
    single = oracle(model_dir(architecture))
    scores = policy.score(pack(turns, least_shared=1), temperature=0.7, entropy=True)
    torch.testing.assert_close(scores.logp_M, single.logp(turns, 0.7), atol=1e-4, rtol=1e-4)
    assert scores.entropy_M.shape == scores.logp_M.shape
    loss = -scores.logp_M.mean()
    loss.backward()
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.05)
    optimizer.step()
    assert -policy.score(pack(turns), temperature=0.7).logp_M.mean() < loss
