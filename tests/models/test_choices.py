"""Choices of experts, taken down and made again: a router's own change nothing, another sampler's bring log-probs nearer to its own."""

import copy
from functools import partial

import numpy as np
import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.distributed.sequence import SequenceGroup
from posttrain.errors import ModelError
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.models.routing import ONE_CHOICE
from posttrain.recipes.experience.collector import _sample
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import (
    Prompt,
    Request,
    RewardBreakdown,
    Rollout,
    RolloutGroup,
    Sample,
    SamplingParams,
    in_order,
)

PROMPTS = [(5, 9, 40, 41, 42), (7,), tuple(range(60, 73))]


class Alone:
    def gather(self, value):
        return [value]

    def sum(self, values):
        return list(values)


@pytest.fixture
def load(model_dir):
    def make(architecture="qwen3_moe", routed="replay", config=(), **options):
        keys = SFTKeys(
            base_model=str(model_dir(architecture, **dict(config))), datasets=[{"path": "unused.jsonl"}], **options
        )
        return load_policy(keys, routed=routed)

    return make


def sampled(policy, max_tokens=12):
    """Groups of three samples of each prompt, from this policy."""
    engine = EmbeddedEngine(policy, stop_token_ids=(2,), batch_size=4)
    requests = [Request(prompt, seed) for prompt in PROMPTS for seed in range(3)]
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens)))
    rollouts = [Rollout(completion, "", RewardBreakdown(1.0, {})) for completion in completions]
    prompt = Prompt(origin=None, prompt="")
    groups = [
        RolloutGroup(prompt, ids, tuple(rollouts[3 * place : 3 * place + 3])) for place, ids in enumerate(PROMPTS)
    ]
    return [tuple(_sample(group, rollout) for rollout in group.rollouts) for group in groups]


def without(groups):
    return [tuple(Sample(s.ids, s.loss_mask, s.behavior_logp) for s in group) for group in groups]


def scored(policy, groups):
    """Log-probs, their gradient, and what was compared."""
    policy.model.zero_grad()
    with policy.routing.counting(on=True):
        logp_M = policy.score(pack(groups)).logp_M
        (logp_M**2).sum().backward()
    return logp_M.detach(), {n: p.grad for n, p in policy.trainable()}, policy.routing.metrics(Alone())


def perturbed(policy, std=0.01):
    """A copy whose routers choose a little differently, as another engine's do."""
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    other.choices = next(m.forward.func.__self__ for m in other.model.modules() if isinstance(m.forward, partial))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if name.endswith(("mlp.gate.weight", "mlp.gate.base_layer.weight")):
                parameter.add_(torch.randn_like(parameter) * std)
    return other


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a == "qwen3_moe" else pytest.mark.slow) for a in sorted(ONE_CHOICE)]
)
def test_a_routers_own_choices_replayed_are_none_to_the_bit(architecture, load):
    policy = load(architecture)
    groups = sampled(policy)
    logp, slopes, metrics = scored(policy, groups)
    plain, plain_slopes, _ = scored(policy, without(groups))
    assert torch.equal(logp, plain) and all(torch.equal(slopes[name], plain_slopes[name]) for name in slopes)
    assert metrics["router/mismatch"] == 0.0


def test_replay_brings_log_probs_nearer_to_those_of_a_sampler_that_chose_otherwise(load):
    """Not all the way: the weights of the experts that are chosen are another router's too."""
    policy = load()
    groups = sampled(perturbed(policy), max_tokens=24)
    behavior = torch.cat([torch.from_numpy(s.behavior_logp) for group in groups for s in group])
    gap = {}
    for replaces in (True, False):
        policy.choices._replaces = replaces
        logp, slopes, metrics = scored(policy, groups)
        gap[replaces] = float((logp - behavior).abs().mean())
        assert 0.02 < metrics["router/mismatch"] < 0.5
        assert all(torch.isfinite(slope).all() for slope in slopes.values())
    assert gap[True] < 0.7 * gap[False]


def test_layers_that_are_run_again_choose_the_same(load):
    """Else their activations would be those of other experts than the forward's."""
    groups = sampled(perturbed(load()))
    plain, again = (scored(load(gradient_checkpointing=checkpointing), groups) for checkpointing in (False, True))
    assert torch.equal(plain[0], again[0])
    for name, slope in plain[1].items():
        torch.testing.assert_close(again[1][name], slope, atol=1e-6, rtol=1e-5)


def oracle(x_TD, weights, chosen_TK, normed):
    """A layer of experts in float64 loops: softmax over all experts, of it the chosen ones, which `normed` makes add up to 1."""
    router_ED, gate_up, down = weights
    rows = []
    for x_D, chosen_K in zip(x_TD, chosen_TK.tolist(), strict=True):
        share_E = torch.softmax(router_ED @ x_D, 0)
        total = sum(share_E[expert] for expert in chosen_K) if normed else 1.0
        out = torch.zeros_like(x_D)
        for expert in chosen_K:
            gate, up = (gate_up[expert] @ x_D).chunk(2)
            out = out + share_E[expert] / total * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("normed", [False, True])
def test_a_layer_whose_choice_is_given_is_the_papers(normed, load):
    """Value and gradient, the router's too; a token without a given choice keeps its own. Source: arXiv 2510.11370 sec. 3.2."""
    policy = load(config={"norm_topk_prob": normed})
    block = policy.base.get_decoder().layers[1].mlp
    x_TD = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    names = {"gate.weight": block.gate.weight, "gate_up_proj": block.experts.gate_up_proj, "down_proj": block.experts.down_proj}  # fmt: skip
    given = torch.full((6, 2, 2), -1, dtype=torch.int16)
    given[:4, 1] = torch.tensor([[0, 1], [3, 1], [2, 3], [1, 0]])
    own = block.gate(x_TD)[2]
    chosen = torch.where(given[:, 1] >= 0, given[:, 1].long(), own)
    assert (chosen.sort(-1).values != own.sort(-1).values).any()
    policy.model.zero_grad()
    with policy.choices.given(given):
        found = block(x_TD[None])[0]
    found.square().sum().backward()
    doubles = [weight.detach().double().requires_grad_() for weight in names.values()]
    expected = oracle(x_TD.double(), doubles, chosen, normed)
    expected.square().sum().backward()
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    for weight, exact in zip(names.values(), doubles, strict=True):
        torch.testing.assert_close(weight.grad.double(), exact.grad, atol=1e-4, rtol=1e-3)
    assert doubles[0].grad.abs().max() > 0


def test_the_engine_says_what_a_forward_of_the_whole_chooses(load):
    policy = load()
    for group in sampled(policy):
        for sample in group:
            with policy.choices.recording() as found, torch.no_grad():
                policy.base(torch.from_numpy(sample.ids[:-1])[None].long())
            [routed_TLK] = found
            at = np.flatnonzero(sample.loss_mask) - 1
            assert sample.routed_experts.dtype == np.uint8
            np.testing.assert_array_equal(np.sort(routed_TLK[at]), np.sort(sample.routed_experts))


def test_the_mismatch_is_counted_by_sets_of_experts(load):
    """Of 2 tokens in 2 layers one has another set; the order of experts is none."""
    policy = load(routed="compare")
    [group] = [group[:1] for group in sampled(policy, max_tokens=2)[:1]]
    (sample,) = group
    other = sample.routed_experts[:, :, ::-1].copy()
    missing = next(expert for expert in range(4) if expert not in other[1, 0])
    other[1, 0, 0] = missing
    changed = Sample(sample.ids, sample.loss_mask, sample.behavior_logp, routed_experts=other)
    logp, _, metrics = scored(policy, [(changed,)])
    assert metrics["router/mismatch"] == pytest.approx(1 / (2 * sample.num_loss_tokens))
    # Comparing replaces nothing.
    assert torch.equal(logp, scored(policy, without([group]))[0])


def test_a_reference_goes_its_own_way(load):
    policy = load(adapter="lora", lora_r=4, lora_target=["q_proj"])
    groups = sampled(perturbed(policy))
    assert torch.equal(policy.reference_logp(pack(groups)), policy.reference_logp(pack(without(groups))))


def test_choices_stand_at_the_tokens_behind_which_one_was_sampled():
    """A prompt of 2 tokens, answered by 2 and 3: packed 5 6 | 7 | 8 9, of which 6, 7 and 6, 8, 9 are followed by a sampled one."""
    experts = [np.arange(2, dtype=np.uint8).reshape(2, 1, 1), np.array([0, 5, 6], np.uint8).reshape(3, 1, 1)]
    answers = [(7, 3), (8, 9, 3)]
    samples = [
        Sample(np.array([5, 6, *ids], np.int32), np.array([False] * 2 + [True] * len(ids)), routed_experts=routed)
        for ids, routed in zip(answers, experts, strict=True)
    ]
    batch = pack([samples])
    assert batch.input_ids_N.tolist() == [5, 6, 7, 8, 9]
    assert batch.routed_N[:, 0, 0].tolist() == [-1, 0, 1, 5, 6]
    assert pack([[samples[0].untrained()]]).routed_N[:, 0, 0].tolist() == [-1] * 3


@pytest.mark.parametrize("ranks", [2, 7])
def test_a_rank_that_holds_some_tokens_has_their_choices(ranks):
    """Five tokens among two ranks, and among more ranks than there are tokens: those that fill up have none."""
    routed = np.arange(5, dtype=np.uint8).reshape(5, 1, 1)
    sample = Sample(np.arange(5, 11, dtype=np.int32), np.array([False] + [True] * 5), routed_experts=routed)
    batch = pack([[sample]])
    held = [batch.held(SequenceGroup(None, ranks, place).split(5))[0].routed_N[:, 0, 0] for place in range(ranks)]
    assert torch.cat(held).tolist() == [0, 1, 2, 3, 4] + [-1] * max(0, ranks - 5)


@pytest.mark.parametrize(
    ("architecture", "why"), [("qwen3", "is a qwen3"), ("gpt_oss", "is a gpt_oss"), ("llama4_text", "is a llama4")]
)
def test_a_model_whose_choices_are_not_known_is_refused_by_name(architecture, why, load):
    with pytest.raises(
        ModelError, match=rf"routed_experts: replay: .*{why}.*qwen3_moe; set rollout.routed_experts: off"
    ):
        load(architecture)


def test_compiled_layers_do_not_ask(load):
    with pytest.raises(ModelError, match=r"torch_compile: true: .*rollout.routed_experts"):
        load(torch_compile=True)
