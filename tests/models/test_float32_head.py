"""A head in float32: what the logits are where the rest of the model computes in bfloat16."""

import pytest
import torch

from posttrain.errors import ModelError
from posttrain.models.batch import pack
from posttrain.models.float32_head import put_head_in_float32
from posttrain.models.load import freeze_reference
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams


def _exact(policy, batch, temperature):
    """Log-probs and entropy by a product in float64 of what the model says before its head."""
    with torch.no_grad(), policy.placement.autocast():
        hidden_MD = policy._hidden(batch.to(policy.placement.device)).double()
    logp_MV = (hidden_MD @ policy.base.get_output_embeddings().weight.double().t() / temperature).log_softmax(-1)
    return logp_MV.gather(1, batch.target_M[:, None])[:, 0], -(logp_MV.exp() * logp_MV).sum(1)


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_scores_are_those_of_a_product_that_nothing_rounds(architecture, adapter, policy_of, families):
    policy, batch, errors = policy_of(architecture, adapter=adapter, bf16=True), pack(families), []
    for in_float32 in (False, True):
        if in_float32:
            put_head_in_float32(policy.base)
        scores = policy.score(batch, temperature=0.7, entropy=True)
        for found, wanted in zip((scores.logp_M, scores.entropy_M), _exact(policy, batch, 0.7), strict=True):
            errors.append(float((found.detach().double() - wanted).abs().max()))
    assert max(errors[2:]) < 2e-5 < min(errors[:2]) / 20, errors
    policy.score(batch).logp_M.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in policy.trainable())


def test_the_engine_s_log_probs_are_nearer_to_the_trainer_s(policy_of):
    requests = [Request((5, 6, 7, 8), seed) for seed in range(6)]
    gaps = {}
    for in_float32 in (False, True):
        policy = policy_of("qwen3", bf16=True)
        if in_float32:
            put_head_in_float32(policy.base)
        engine = EmbeddedEngine(policy, stop_token_ids=[])
        found = list(engine.generate(requests, SamplingParams(max_tokens=12)))
        scored = engine.score([(requests[c.request].prompt_ids + c.ids, 4) for c in found])
        gaps[in_float32] = max(
            abs(a - b) for c, logps in zip(found, scored, strict=True) for a, b in zip(c.logp, logps, strict=True)
        )
    assert gaps[True] <= gaps[False], gaps


def test_in_float32_it_changes_no_bit(policy_of, families):
    policy, batch = policy_of("llama"), pack(families)
    before = policy.score(batch).logp_M
    put_head_in_float32(policy.base)
    assert torch.equal(policy.score(batch).logp_M, before)


def test_the_reference_has_it_too(policy_of, families):
    policy, batch = policy_of("qwen3", bf16=True), pack(families)
    put_head_in_float32(policy.base)
    freeze_reference(policy)
    assert torch.equal(policy.reference_logp(batch), policy.score(batch).logp_M.detach())


def test_a_head_under_an_adapter_is_refused(policy_of):
    policy = policy_of("llama", adapter="lora", lora_modules_to_save=["lm_head"])
    with pytest.raises(ModelError, match=r"cast_lm_head_to_fp32: true with a head that is .*leave the head out of"):
        put_head_in_float32(policy.base)
