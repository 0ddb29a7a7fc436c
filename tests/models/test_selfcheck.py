import logging

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.models import attention
from posttrain.models.batch import pack
from posttrain.models.selfcheck import ragged_is_exact

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
