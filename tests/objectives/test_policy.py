"""Every policy loss against loops written from the papers, value and gradient, in float64."""

import math
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from posttrain.config.rl import GRPOKeys
from posttrain.objectives.advantages import ADVANTAGES, AdvantageSpec
from posttrain.objectives.kl import KL_ESTIMATORS
from posttrain.objectives.policy import (
    POLICY_LOSSES,
    PolicyInputs,
    PolicySpec,
    advantage_estimator_of,
    policy_loss,
)
from posttrain.objectives.ratios import CORRECTIONS
from posttrain.objectives.reduce import Normalizer

LENGTHS = [3, 1, 4, 2]
ADVANTAGE = [1.2, -0.8, -0.5, 0.0]
NORM = Normalizer(tokens=17, sequences=6, max_tokens=8)


def _ragged(seed, low, high):
    generator = torch.Generator().manual_seed(seed)
    return [(low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)).tolist() for n in LENGTHS]


def _shifted(rows, seed, width):
    noise = _ragged(seed, -width, width)
    return [[x + e for x, e in zip(row, es, strict=True)] for row, es in zip(rows, noise, strict=True)]


NEW = _ragged(0, -3.0, -0.1)
OLD = _shifted(NEW, 1, 1.2)
REF = _shifted(NEW, 2, 0.6)
BEHAVIOR = _shifted(OLD, 3, 0.5)
ENTROPY = _ragged(4, 0.2, 2.0)


def _oracle(new, spec, old, stop):
    """The loss from its definition. `stop` are the log-probs wherever the paper stops the gradient."""
    row = POLICY_LOSSES[spec.loss_type]
    high = spec.epsilon_high if spec.epsilon_high is not None else (5.0 if spec.loss_type == "cispo" else spec.epsilon)
    total = 0.0
    for s, length in enumerate(LENGTHS):
        steps = [n - o for n, o in zip(new[s], old[s], strict=True)]
        stopped = [n - o for n, o in zip(stop[s], old[s], strict=True)]
        clipped = steps
        if row.clips_log_ratio:
            edge = min if ADVANTAGE[s] > 0 else max
            clipped = [edge(x, high if ADVANTAGE[s] > 0 else -spec.epsilon) for x in steps]
        gaps = [o - b for o, b in zip(old[s], BEHAVIOR[s], strict=True)]
        in_sequence = 0.0
        for t in range(length):
            ratio, fixed = (_ratio(row, spec, x, t) for x in (steps, stopped))
            bounded = _ratio(row, spec, clipped, t)
            term = _surrogate(row.surrogate, spec, high, bounded, fixed, ADVANTAGE[s], new[s][t])
            term *= _correction(spec, gaps, t)
            term *= _kept(spec, ADVANTAGE[s], BEHAVIOR[s], stop[s])
            if spec.beta:
                term += spec.beta * _kl(spec, new[s][t], REF[s][t], ratio, fixed)
            in_sequence += term
        total += {
            "token_mean": in_sequence / NORM.tokens,
            "sequence_mean_of_token_mean": in_sequence / length / NORM.sequences,
            "sequence_sum_over_constant": in_sequence / (NORM.sequences * NORM.max_tokens),
            "sequence_sum_mean": in_sequence / NORM.sequences,
        }[row.reduction]
    return total - spec.entropy_coef * sum(map(sum, ENTROPY)) / NORM.tokens


def _ratio(row, spec, steps, t):
    level = row.ratio or spec.importance_sampling_level
    if level == "token":
        return math.exp(steps[t])
    return math.exp(sum(steps) / (len(steps) if level == "sequence" else 1))


def _surrogate(name, spec, high, ratio, fixed, advantage, logp):
    if name == "cispo":
        return -min(fixed, high) * advantage * logp
    if name == "unclipped":
        return -ratio * advantage
    if name == "dppo":
        change = math.exp(logp) * (1 - 1 / fixed)
        left = (advantage > 0 and change > high) or (advantage < 0 and change < -spec.epsilon)
        return 0.0 if left else -ratio * advantage
    if name == "sapo":
        tau = spec.sapo_temperature_pos if advantage > 0 else spec.sapo_temperature_neg
        return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    free = ratio if spec.delta is None else min(ratio, spec.delta)
    return -min(free * advantage, min(max(ratio, 1 - spec.epsilon), 1 + high) * advantage)


def _kl(spec, new, ref, ratio, fixed):
    x = new - ref
    kl = {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) + x - 1}[spec.kl_estimator]
    if not spec.use_bias_correction_kl:
        return kl
    return kl * (fixed if spec.kl_estimator == "k2" else ratio)


def _correction(spec, gaps, t):
    if spec.importance_sampling_correction == "off":
        return 1.0
    level, action = spec.importance_sampling_correction.split("_")
    if level == "geometric":
        mean = math.exp(sum(gaps) / len(gaps))
        return float(1 / spec.importance_sampling_cap <= mean <= spec.importance_sampling_cap)
    weight = math.exp(gaps[t] if level == "token" else sum(gaps))
    if weight <= spec.importance_sampling_cap:
        return weight
    return spec.importance_sampling_cap if action == "truncate" else 0.0


def _kept(spec, advantage, sampled, now):
    if spec.off_policy_mask_threshold is None or advantage >= 0:
        return 1.0
    drift = sum(b - n for b, n in zip(sampled, now, strict=True)) / len(now)
    return float(drift <= spec.off_policy_mask_threshold)


def _tensor(rows):
    return torch.tensor([x for row in rows for x in row], dtype=torch.float64)


def _inputs(on_policy=False):
    return PolicyInputs(
        policy_logp_M=_tensor(NEW).requires_grad_(),
        advantage_M=torch.tensor(ADVANTAGE, dtype=torch.float64).repeat_interleave(torch.tensor(LENGTHS)),
        seq_M=torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
        num_sequences=4,
        old_logp_M=None if on_policy else _tensor(OLD),
        ref_logp_M=_tensor(REF),
        behavior_logp_M=_tensor(BEHAVIOR),
        entropy_M=_tensor(ENTROPY).requires_grad_(),
    )


def _check(spec, on_policy=False):
    inputs = _inputs(on_policy)
    terms = policy_loss(inputs, spec, NORM)
    old = NEW if on_policy else OLD
    assert terms.loss.item() == pytest.approx(_oracle(NEW, spec, old, NEW), rel=1e-12, abs=1e-14)
    (gradient,) = torch.autograd.grad(terms.loss, inputs.policy_logp_M)
    h, index = 1e-6, 0
    for s, length in enumerate(LENGTHS):
        for t in range(length):
            moved = [[[*row] for row in NEW] for _ in range(2)]
            moved[0][s][t] += h
            moved[1][s][t] -= h
            slope = (_oracle(moved[0], spec, old, NEW) - _oracle(moved[1], spec, old, NEW)) / (2 * h)
            assert gradient[index].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)
            index += 1


def _spec(loss_type, **knobs):
    if loss_type == "luspo":
        knobs["importance_sampling_level"] = "sequence"
    return PolicySpec(loss_type=loss_type, **knobs)


OPTIONS = {
    "default": {},
    "clip-higher": {"epsilon": 0.1, "epsilon_high": 1.05},
    "two-sided": {"delta": 1.3},
    "k1": {"beta": 0.3, "kl_estimator": "k1"},
    "k2": {"beta": 0.3, "kl_estimator": "k2"},
    "k3": {"beta": 0.3, "kl_estimator": "k3"},
    "k3 plain": {"beta": 0.3, "use_bias_correction_kl": False},
    "entropy": {"entropy_coef": 0.01},
    "sequence": {"importance_sampling_level": "sequence"},
    "token_truncate": {"importance_sampling_correction": "token_truncate", "importance_sampling_cap": 1.2},
    "token_mask": {"importance_sampling_correction": "token_mask", "importance_sampling_cap": 1.2},
    "sequence_truncate": {"importance_sampling_correction": "sequence_truncate", "importance_sampling_cap": 1.2},
    "sequence_mask": {"importance_sampling_correction": "sequence_mask", "importance_sampling_cap": 1.2},
    "geometric_mask": {"importance_sampling_correction": "geometric_mask", "importance_sampling_cap": 1.1},
    "off-policy mask": {"off_policy_mask_threshold": -0.5},
    "all": {"beta": 0.1, "delta": 4.0, "entropy_coef": 0.1, "importance_sampling_correction": "sequence_truncate"},
}


def _is_defined(loss_type, option):
    return loss_type not in ("gmpo", "dppo", "kl_cov") or "delta" not in OPTIONS[option]


@pytest.mark.parametrize(
    ("loss_type", "option"),
    [(loss_type, option) for loss_type in POLICY_LOSSES for option in OPTIONS if _is_defined(loss_type, option)],
)
def test_oracle(loss_type, option):
    _check(_spec(loss_type, **OPTIONS[option]))


@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_oracle_on_policy(loss_type):
    """Away from the clip's edges the value is that of ratio 1 and the gradient is not zero."""
    _check(_spec(loss_type, beta=0.1), on_policy=True)


def test_oracle_data_reaches_every_branch():
    metrics = policy_loss(_inputs(), PolicySpec(), NORM).metrics
    assert metrics["clip_ratio/low_mean"].num > 0 and metrics["clip_ratio/high_mean"].num > 0
    below, above = (policy_loss(_inputs(), PolicySpec(delta=d), NORM).loss.item() for d in (1.3, None))
    assert below < above
    masked = policy_loss(_inputs(), PolicySpec(**OPTIONS["sequence_mask"]), NORM).metrics
    ratio = masked["sampling/importance_sampling_ratio/mean"]
    kept = policy_loss(_inputs(), PolicySpec(**OPTIONS["sequence_truncate"]), NORM).metrics
    assert 0 < ratio.num < kept["sampling/importance_sampling_ratio/mean"].num
    for option, name in (
        ("geometric_mask", "sampling/importance_sampling_ratio/mean"),
        ("off-policy mask", "off_policy_mask/kept_mean"),
    ):
        share = policy_loss(_inputs(), PolicySpec(**OPTIONS[option]), NORM).metrics[name].value
        assert 0 < share < 1, option
    free, bound = (policy_loss(_inputs(), PolicySpec(loss_type="dppo", epsilon=e), NORM).loss for e in (1.0, 0.2))
    assert free != bound


def test_the_off_policy_mask_counts_each_completion_once_by_the_tokens_that_teach():
    """Two of an advantage below 0, one far from what sampled it; of one and a third, half of the tokens are left out otherwise."""
    seq_M = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2])
    advantage_M = torch.tensor([-1.0, -1.0, 0.0, -1.0, 0.0, -1.0, 1.0, 0.0])
    logp_M = torch.full((8,), -1.0)
    sampled_M = logp_M + torch.tensor([0.0, 0.0, 2.0, 2.0, 2.0, 2.0, 5.0, 5.0])
    inputs = PolicyInputs(logp_M, advantage_M, seq_M, 3, behavior_logp_M=sampled_M)
    share = policy_loss(inputs, PolicySpec(off_policy_mask_threshold=1.0), NORM).metrics["off_policy_mask/kept_mean"]
    assert (share.num, share.den) == (2.0, 3.0)


def test_entropy_bonus_gradient():
    inputs = _inputs()
    policy_loss(inputs, PolicySpec(entropy_coef=0.5), NORM).loss.backward()
    assert inputs.entropy_M is not None and inputs.entropy_M.grad is not None
    assert inputs.entropy_M.grad.tolist() == pytest.approx([-0.5 / 17] * 10)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "gspo"])
def test_on_policy_ratio_is_one_nothing_is_clipped(loss_type):
    metrics = policy_loss(_inputs(on_policy=True), PolicySpec(loss_type=loss_type), NORM).metrics
    assert metrics["importance_ratio/mean"].value == 1.0
    assert metrics["clip_ratio/region_mean"].num == 0


def test_on_policy_losses_share_the_policy_gradient():
    """At ratio 1 the clip does not act: token-mean losses have gradient −A/N, GSPO spreads the same over its tokens."""
    for loss_type, scale in (("dapo", [1 / 17] * 4), ("gspo", [1 / (6 * n) for n in LENGTHS])):
        inputs = _inputs(on_policy=True)
        policy_loss(inputs, PolicySpec(loss_type=loss_type), NORM).loss.backward()
        expected = [-a * k for a, k, n in zip(ADVANTAGE, scale, LENGTHS, strict=True) for _ in range(n)]
        assert inputs.policy_logp_M.grad is not None
        assert inputs.policy_logp_M.grad.tolist() == pytest.approx(expected)


def _select(inputs, keep):
    """The micro-batch of the sequences in `keep`, in that order."""
    index = torch.cat([(inputs.seq_M == s).nonzero().squeeze(1) for s in keep])
    pick: dict[str, Any] = {
        name: None if getattr(inputs, name) is None else getattr(inputs, name)[index]
        for name in ("policy_logp_M", "advantage_M", "old_logp_M", "ref_logp_M", "behavior_logp_M", "entropy_M")
    }
    seq_M = torch.repeat_interleave(torch.arange(len(keep)), torch.tensor([LENGTHS[s] for s in keep]))
    return PolicyInputs(seq_M=seq_M, num_sequences=len(keep), **pick)


@pytest.mark.parametrize("split", [[[0], [1], [2], [3]], [[0, 1, 2], [3]], [[3, 1], [2, 0]]])
@pytest.mark.parametrize("loss_type", POLICY_LOSSES)
def test_splitting_and_permuting_change_nothing(loss_type, split):
    spec = _spec(loss_type, **OPTIONS["all" if _is_defined(loss_type, "all") else "off-policy mask"])
    inputs = _inputs()
    whole = policy_loss(inputs, spec, NORM)
    (whole_gradient,) = torch.autograd.grad(whole.loss, inputs.policy_logp_M)
    parts = [policy_loss(_select(inputs, keep), spec, NORM) for keep in split]
    loss = torch.stack([part.loss for part in parts]).sum()
    (gradient,) = torch.autograd.grad(loss, inputs.policy_logp_M)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(gradient, whole_gradient, rtol=1e-12, atol=1e-15)
    for name, ratio in whole.metrics.items():
        combined = parts[0].metrics[name]
        for part in parts[1:]:
            combined += part.metrics[name]
        assert combined.value == pytest.approx(ratio.value, rel=1e-12, abs=1e-14), name


def test_leaving_out_zero_advantage_sequences_keeps_the_gradient():
    """Sequence 3 has A = 0: without KL and entropy it may be skipped, as long as the counts still include it."""
    for loss_type in POLICY_LOSSES:
        inputs, spec = _inputs(), _spec(loss_type)
        whole, fewer = (policy_loss(x, spec, NORM).loss for x in (inputs, _select(inputs, [0, 1, 2])))
        torch.testing.assert_close(fewer, whole, rtol=1e-13, atol=1e-15)


def test_metrics_by_hand():
    """Token metrics are means over the 10 tokens; sequence ratios count each sequence once."""
    metrics = policy_loss(_inputs(), PolicySpec(beta=0.1, use_bias_correction_kl=False), NORM).metrics
    pairs = [(n, r) for ns, rs in zip(NEW, REF, strict=True) for n, r in zip(ns, rs, strict=True)]
    assert metrics["kl"].value == pytest.approx(sum(math.exp(r - n) - (r - n) - 1 for n, r in pairs) / 10)
    assert metrics["entropy"].value == pytest.approx(sum(map(sum, ENTROPY)) / 10)
    gaps = [abs(o - b) for os, bs in zip(OLD, BEHAVIOR, strict=True) for o, b in zip(os, bs, strict=True)]
    assert metrics["sampling/sampling_logp_difference/mean"].value == pytest.approx(sum(gaps) / 10)
    ratio = policy_loss(_inputs(), PolicySpec(loss_type="gspo"), NORM).metrics["importance_ratio/mean"]
    steps = [sum(ns) - sum(os) for ns, os in zip(NEW, OLD, strict=True)]
    assert ratio.den == 4
    assert ratio.value == pytest.approx(sum(math.exp(x / n) for x, n in zip(steps, LENGTHS, strict=True)) / 4)


def test_policy_loss_metric_is_the_step_loss_without_the_bonus():
    norm = replace(NORM, sequences=4)
    terms = policy_loss(_inputs(), PolicySpec(), norm)
    bonus = policy_loss(_inputs(), PolicySpec(entropy_coef=0.1), norm)
    assert terms.metrics["policy_loss"].value == pytest.approx(terms.loss.item())
    assert bonus.metrics["policy_loss"].value == pytest.approx(terms.loss.item())


def test_unknown_sampler_log_probs_are_not_counted():
    inputs = replace(_inputs(), behavior_logp_M=torch.full((10,), math.nan, dtype=torch.float64))
    spec = PolicySpec(importance_sampling_correction="sequence_mask")
    corrected, plain = policy_loss(inputs, spec, NORM), policy_loss(_inputs(), PolicySpec(), NORM)
    assert corrected.loss.item() == pytest.approx(plain.loss.item(), rel=1e-14)
    assert corrected.metrics["sampling/sampling_logp_difference/mean"].den == 0


def test_runaway_token_stays_finite():
    """Without a bound exp(900) · 0 would be NaN for the sequence whose advantage is 0."""
    inputs = _inputs()
    far = replace(inputs, old_logp_M=_tensor(NEW) - 900, ref_logp_M=_tensor(NEW) + 900)
    for loss_type in POLICY_LOSSES:
        loss = policy_loss(far, _spec(loss_type, beta=0.1), NORM).loss
        (gradient,) = torch.autograd.grad(loss, inputs.policy_logp_M)
        assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("kl_reduction", ["token_mean", "sequence_sum_mean"])
def test_the_kl_has_a_reduction_of_its_own(kl_reduction):
    """Loss and gradient are those of the two streams apart, added up."""
    spec = _spec("grpo", beta=0.3, use_bias_correction_kl=False)
    whole, apart = _inputs(), _inputs()
    together = policy_loss(whole, replace(spec, kl_reduction=kl_reduction), NORM).loss
    logp_M, ref_M = apart.policy_logp_M, apart.ref_logp_M
    assert ref_M is not None
    kl_M = torch.exp(ref_M - logp_M) - (ref_M - logp_M) - 1
    divisor = {"token_mean": NORM.tokens, "sequence_sum_mean": NORM.sequences}[kl_reduction]
    expected = policy_loss(apart, replace(spec, beta=0.0), NORM).loss + 0.3 * kl_M.sum() / divisor
    assert together.item() == pytest.approx(expected.item(), rel=1e-12)
    [found], [wanted] = torch.autograd.grad(together, whole.policy_logp_M), torch.autograd.grad(expected, logp_M)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-12)
    # Naming the loss's own reduction changes nothing, to the bit.
    own = replace(spec, kl_reduction="sequence_mean_of_token_mean")
    assert policy_loss(_inputs(), own, NORM).loss.item() == policy_loss(_inputs(), spec, NORM).loss.item()


PROMPT_TOKENS = [sum(LENGTHS[s // 2 * 2 : s // 2 * 2 + 2]) for s in range(len(LENGTHS))]
"""Two completions a prompt."""


@pytest.mark.parametrize("knobs", [{}, {"beta": 0.3, "use_bias_correction_kl": False}])
def test_the_mean_over_prompts_of_the_mean_inside_of_them(knobs):
    """Loss and gradient of ScaleRL's surrogate, from its definition; they are sums over completions, however those are split."""
    spec = _spec("cispo", loss_reduction="prompt_mean_of_token_mean", epsilon_high=1.1, **knobs)
    inputs = replace(_inputs(), prompt_tokens_S=torch.tensor(PROMPT_TOKENS))
    norm = replace(NORM, prompts=len(LENGTHS) / 2)
    loss = policy_loss(inputs, spec, norm).loss
    (found,) = torch.autograd.grad(loss, inputs.policy_logp_M)
    total, gradient = 0.0, []
    for s, length in enumerate(LENGTHS):
        for t in range(length):
            new, weight = NEW[s][t], min(math.exp(NEW[s][t] - OLD[s][t]), 1.1) * ADVANTAGE[s]
            x = new - REF[s][t]
            kl, slope = math.exp(-x) + x - 1, 1 - math.exp(-x)
            share = 1 / PROMPT_TOKENS[s] / norm.prompts
            total += share * (-weight * new + spec.beta * kl)
            gradient.append(share * (-weight + spec.beta * slope))
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert found.tolist() == pytest.approx(gradient, rel=1e-12)


def test_all_masked_is_zero():
    none = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    inputs = PolicyInputs(none, torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2)
    for loss_type in POLICY_LOSSES:
        loss = policy_loss(inputs, _spec(loss_type), Normalizer(0, 2, 8)).loss
        assert loss.item() == 0
        loss.backward()


def test_missing_inputs_are_named():
    bare = replace(_inputs(), ref_logp_M=None, behavior_logp_M=None, entropy_M=None)
    for spec, name in (
        (PolicySpec(beta=0.1), "ref_logp_M"),
        (PolicySpec(entropy_coef=0.1), "entropy_M"),
        (PolicySpec(importance_sampling_correction="token_mask"), "behavior_logp_M"),
    ):
        with pytest.raises(AssertionError, match=name):
            policy_loss(bare, spec, NORM)


def test_rows_that_bring_their_advantage():
    assert advantage_estimator_of("rloo", "group") == "rloo"
    assert advantage_estimator_of("dapo", "reinforce_pp_baseline") == "reinforce_pp_baseline"


def test_configuration_offers_exactly_the_tables():
    fields = GRPOKeys.model_fields
    assert set(get_args(fields["loss_type"].annotation)) == set(POLICY_LOSSES)
    assert set(get_args(fields["kl_estimator"].annotation)) == set(KL_ESTIMATORS)
    assert set(get_args(fields["advantage_estimator"].annotation)) == set(ADVANTAGES)
    assert set(get_args(fields["importance_sampling_correction"].annotation)) == {"auto", "off", *CORRECTIONS}
    for spec in (PolicySpec(), AdvantageSpec()):
        names = [
            f.name for f in dataclass_fields(spec) if f.name != "importance_sampling_correction"
        ]  # auto is decided at load
        assert all(getattr(spec, name) == fields[name].default for name in names)
