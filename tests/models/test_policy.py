import pytest
import torch

from posttrain.models.batch import pack
from posttrain.models.load import freeze_reference
from posttrain.objectives.terms import LossTerms
from posttrain.types import TokenSeq


def test_scores_under_a_temperature_with_entropy_and_top1(model_dir, policy_of, oracle, families):
    policy, single = policy_of("gemma2"), oracle(model_dir("gemma2"))
    scores = policy.score(pack(families), temperature=0.6, entropy=True)
    torch.testing.assert_close(scores.logp_M, single.logp(families, 0.6), atol=1e-4, rtol=1e-4)
    sequence = families[0][0]
    with torch.no_grad():
        logits = single.model(torch.tensor([sequence.ids])).logits[0, :-1].float()[list(sequence.loss_mask[1:])]
    own = slice(0, sequence.num_loss_tokens)
    logp = (logits / 0.6).log_softmax(-1)
    torch.testing.assert_close(scores.entropy_M[own], -(logp.exp() * logp).sum(-1), atol=1e-4, rtol=1e-4)
    best = torch.tensor(sequence.ids[1:])[list(sequence.loss_mask[1:])] == logits.argmax(-1)
    assert torch.equal(scores.top1_M[own], best)


def test_logits_are_computed_at_scored_positions_only(policy_of, monkeypatch):
    policy = policy_of("qwen3")
    seen = []
    import posttrain.models.policy as module

    original = module.chunked_logprobs
    monkeypatch.setattr(
        module, "chunked_logprobs", lambda hidden, *a, **k: seen.append(len(hidden)) or original(hidden, *a, **k)
    )
    policy.score(pack([[TokenSeq(tuple(range(3, 43)), (False,) * 37 + (True,) * 3)]]))
    assert seen == [3]


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text"])
def test_gradient_checkpointing_changes_no_gradient(architecture, policy_of, families):
    gradients = []
    for on in (False, True):
        policy = policy_of(architecture, gradient_checkpointing=on)
        assert policy.base.is_gradient_checkpointing == on
        policy.model.train()
        policy.score(pack(families)).logp_M.sum().backward()
        gradients.append({n: p.grad for n, p in policy.trainable()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_bf16_runs_with_float32_masters(adapter, policy_of, families):
    exact, half = (policy_of("qwen3", adapter=adapter, bf16=on) for on in (False, True))
    assert {p.dtype for _, p in half.trainable()} == {torch.float32}
    scores = half.score(pack(families))
    assert scores.logp_M.dtype == torch.float32
    expected = exact.score(pack(families)).logp_M
    difference = (scores.logp_M - expected).abs()
    assert 0 < difference.max() < 0.3
    scores.logp_M.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for _, p in half.trainable())


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_the_reference_is_the_given_model_however_far_the_policy_moved(adapter, policy_of, families):
    policy = policy_of("llama", adapter=adapter)
    batch = pack(families)
    given = policy.score(batch).logp_M.detach()
    size = freeze_reference(policy)
    assert (size == 0) == (adapter == "lora")
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    assert (policy.score(batch).logp_M - given).abs().max() > 0.1
    reference = policy.reference_logp(batch)
    assert torch.equal(reference, given)
    assert not reference.requires_grad
    assert policy.score(batch).logp_M.requires_grad


def test_without_dropout_training_mode_is_deterministic(policy_of, families):
    batch = pack(families)
    noisy = policy_of("qwen3", adapter="lora", lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in noisy.trainable():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        noisy.model.train()
        assert not torch.equal(noisy.score(batch).logp_M, noisy.score(batch).logp_M)
        quiet = noisy.without_dropout()
        assert torch.equal(quiet.score(batch).logp_M, quiet.score(batch).logp_M)


def test_the_router_loss_of_a_mixture_of_experts_is_added_by_share(policy_of, families):
    policy = policy_of("qwen3_moe")
    policy.model.train()
    scores = policy.score(pack(families))
    assert scores.aux_loss is not None
    with torch.no_grad():
        ids = torch.tensor([families[0][0].ids[:-1]])
        expected = policy.base(
            ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False, output_router_logits=True
        ).aux_loss
    alone = policy.score(pack([families[0]]))
    torch.testing.assert_close(alone.aux_loss, expected, atol=1e-5, rtol=1e-5)
    terms = policy.with_aux_loss(LossTerms(torch.tensor(2.0), {}), alone.aux_loss, share=0.25)
    assert float(terms.loss) == pytest.approx(2.0 + 0.01 * 0.25 * float(expected), rel=1e-5)
    terms.loss.backward()
    router = dict(policy.model.named_parameters())["model.layers.0.mlp.gate.weight"]
    assert router.grad.abs().max() > 0


def test_models_without_a_router_add_nothing(policy_of, families):
    policy = policy_of("qwen3")
    terms = LossTerms(torch.tensor(2.0), {})
    assert policy.with_aux_loss(terms, policy.score(pack(families)).aux_loss, 1.0) is terms
