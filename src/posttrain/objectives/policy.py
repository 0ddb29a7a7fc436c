"""Policy-gradient objectives: a loss is a row, ratio × surrogate × reduction, and `policy_loss` reads in that order.

It is the sum of two token streams: `rl` (surrogate × advantage) and `kl` (to a reference), each reduced and divided on its own;
`rl` by the row's reduction unless `loss_reduction` names another, `kl` as `rl` unless `kl_reduction` does. The third one, `ce`, is `sft_loss`.

Ragged: per-token tensors hold the M trained tokens of S sequences, those of a sequence contiguous and in order.
Knows nothing of models, rewards or how advantages came about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objectives.kl import kl_in_loss
from posttrain.objectives.ratios import (
    RATIOS,
    SEQUENCE_LEVEL,
    clip_one_side,
    correction_weights,
    log_ratios,
    off_policy_keep,
)
from posttrain.objectives.reduce import REDUCTIONS, LossSegments, Normalizer, segment_lengths, token_mean
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.surrogates import SURROGATES
from posttrain.objectives.terms import LossTerms, as_ratios


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """`ratio=None` leaves it to `importance_sampling_level`, `advantage=None` to `advantage_estimator`."""

    surrogate: str
    reduction: str
    source: str
    ratio: str | None = None
    advantage: str | None = None
    clips_log_ratio: bool = False
    selection: str | None = None
    """Which tokens of the step it treats otherwise: a row of `TOKEN_SELECTIONS`."""


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": PolicyLoss("clipped", "sequence_mean_of_token_mean", "arXiv 2402.03300 eq. 3"),
    "bnpo": PolicyLoss("clipped", "token_mean", "arXiv 2506.02864, its loss without its beta-normalised advantage"),
    "dapo": PolicyLoss("clipped", "token_mean", "arXiv 2503.14476 eq. 8"),
    "dr_grpo": PolicyLoss("clipped", "sequence_sum_over_constant", "arXiv 2503.20783 sec. 3"),
    "luspo": PolicyLoss("clipped", "sequence_sum_mean", "arXiv 2602.05261"),
    "gspo": PolicyLoss("clipped", "sequence_mean_of_token_mean", "arXiv 2507.18071 eq. 5", ratio="sequence"),
    "cispo": PolicyLoss("cispo", "token_mean", "arXiv 2506.13585 eq. 4"),
    "sapo": PolicyLoss("sapo", "sequence_mean_of_token_mean", "arXiv 2511.20347"),
    "gmpo": PolicyLoss(
        "unclipped", "sequence_mean_of_token_mean", "arXiv 2507.20673 eq. 4", ratio="sequence", clips_log_ratio=True
    ),
    "dppo": PolicyLoss("dppo", "token_mean", "arXiv 2602.04879, binary total variation", ratio="token"),
    "clip_cov": PolicyLoss("clipped", "token_mean", "arXiv 2505.22617 sec. 4.2", ratio="token", selection="clip_cov"),
    "kl_cov": PolicyLoss("unclipped", "token_mean", "arXiv 2505.22617 sec. 4.2", ratio="token", selection="kl_cov"),
    "rloo": PolicyLoss(
        "clipped", "sequence_mean_of_token_mean", "arXiv 2402.14740", ratio="sequence_product", advantage="rloo"
    ),
    "reinforce_pp": PolicyLoss("clipped", "token_mean", "arXiv 2501.03262", advantage="reinforce_pp"),
}


def advantage_estimator_of(loss_type: str, configured: str) -> str:
    """The estimator a loss is defined with, or else the one configured."""
    return POLICY_LOSSES[loss_type].advantage or configured


@dataclass(frozen=True, slots=True)
class PolicyInputs:
    """One micro-batch.

    old_logp_M: trainer log-probs at the weights that sampled; None when those are the present weights (ratio 1).
    behavior_logp_M: the sampler's own log-probs; NaN where it had none.
    entropy_M: differentiable if `entropy_coef` is used.
    penalty_M: weight of |log π − log π_old| at each token, which kl_cov sets.
    prompt_tokens_S: trained tokens of all completions of a sequence's prompt, for a mean inside of prompts.
    """

    policy_logp_M: Tensor
    advantage_M: Tensor
    seq_M: Tensor
    num_sequences: int
    old_logp_M: Tensor | None = None
    ref_logp_M: Tensor | None = None
    behavior_logp_M: Tensor | None = None
    entropy_M: Tensor | None = None
    penalty_M: Tensor | None = None
    prompt_tokens_S: Tensor | None = None


def policy_loss(inputs: PolicyInputs, spec: PolicySpec, norm: Normalizer) -> LossTerms:
    """This micro-batch's share of the step's loss: surrogate · correction + beta · KL − entropy_coef · entropy."""
    row = POLICY_LOSSES[spec.loss_type]
    surrogate = SURROGATES[row.surrogate]
    level = row.ratio or spec.importance_sampling_level
    logp_M, seq_M = inputs.policy_logp_M, inputs.seq_M
    lengths_S = segment_lengths(seq_M, inputs.num_sequences)
    segments = LossSegments(seq_M, lengths_S, inputs.prompt_tokens_S)
    advantage_M = inputs.advantage_M.to(logp_M.dtype)

    log_ratio_M = log_ratios(logp_M, inputs.old_logp_M)
    ratio_M = bounded_M = RATIOS[level](log_ratio_M, seq_M, inputs.num_sequences)
    if row.clips_log_ratio:
        clipped_M = clip_one_side(log_ratio_M, advantage_M, spec.epsilon, spec.high)
        bounded_M = RATIOS[level](clipped_M, seq_M, inputs.num_sequences)
    term_M = surrogate.term(bounded_M, advantage_M, logp_M, spec)
    if inputs.penalty_M is not None:
        term_M = term_M + inputs.penalty_M * log_ratio_M.abs()
    weight_M = _sampler_weights(inputs, spec)
    if weight_M is not None:
        term_M = weight_M * term_M
    keep_M = _kept(inputs, spec, advantage_M)
    if keep_M is not None:
        term_M = keep_M * term_M
    kl_M = _kl(inputs, spec, ratio_M)
    reduction = spec.loss_reduction or row.reduction
    kl_reduction = spec.kl_reduction or reduction
    if kl_M is not None and kl_reduction == reduction:
        # After the correction, as in TRL: a token the sampler disagrees on is still held to the reference.
        term_M = term_M + spec.beta * kl_M
    loss = REDUCTIONS[reduction](term_M, segments, norm)
    if kl_M is not None and kl_reduction != reduction:
        loss = loss + spec.beta * REDUCTIONS[kl_reduction](kl_M, segments, norm)
    policy = loss
    if spec.entropy_coef:
        assert inputs.entropy_M is not None, "entropy_coef needs entropy_M"
        loss = loss - spec.entropy_coef * token_mean(inputs.entropy_M, norm)

    ones_M = torch.ones_like(logp_M)
    share_M = ones_M / lengths_S[seq_M] if level in SEQUENCE_LEVEL else ones_M
    sums = {name: (flag_M * share_M, share_M) for name, flag_M in surrogate.flags(ratio_M, advantage_M, spec).items()}
    sums["importance_ratio/mean"] = (ratio_M * share_M, share_M)
    if keep_M is not None:
        sums["off_policy_mask/kept_mean"] = _kept_share(keep_M, inputs)
    sums |= _token_metrics(inputs, kl_M, weight_M)
    totals: dict[str, tuple[Tensor, Tensor | float]] = {name: (a.sum(), b.sum()) for name, (a, b) in sums.items()}
    totals["policy_loss"] = (policy * norm.sequences, float(inputs.num_sequences))
    return LossTerms(loss, as_ratios(totals))


def _sampler_weights(inputs: PolicyInputs, spec: PolicySpec) -> Tensor | None:
    if spec.importance_sampling_correction == "off":
        return None
    assert inputs.behavior_logp_M is not None, "importance_sampling_correction needs behavior_logp_M"
    old_logp_M = inputs.policy_logp_M.detach() if inputs.old_logp_M is None else inputs.old_logp_M
    return correction_weights(
        spec.importance_sampling_correction,
        spec.importance_sampling_cap,
        old_logp_M,
        inputs.behavior_logp_M,
        inputs.seq_M,
        inputs.num_sequences,
    )


def _kept(inputs: PolicyInputs, spec: PolicySpec, advantage_M: Tensor) -> Tensor | None:
    """Which tokens count under `off_policy_mask_threshold`; what was sampled is known best from the sampler itself."""
    sampled_M = inputs.old_logp_M if inputs.behavior_logp_M is None else inputs.behavior_logp_M
    if spec.off_policy_mask_threshold is None or sampled_M is None:
        return None
    where = (inputs.seq_M, inputs.num_sequences)
    return off_policy_keep(spec.off_policy_mask_threshold, advantage_M, inputs.policy_logp_M, sampled_M, *where)


def _kept_share(keep_M: Tensor, inputs: PolicyInputs) -> tuple[Tensor, Tensor]:
    """Each sequence counts once, by those of its tokens that have a policy gradient otherwise."""
    has_M = (inputs.advantage_M != 0).double()
    count_S = torch.zeros(inputs.num_sequences, dtype=has_M.dtype, device=has_M.device).index_add(
        0, inputs.seq_M, has_M
    )
    share_M = has_M / count_S[inputs.seq_M].clamp(min=1)
    return keep_M * share_M, share_M


def _kl(inputs: PolicyInputs, spec: PolicySpec, ratio_M: Tensor) -> Tensor | None:
    if not spec.beta:
        return None
    assert inputs.ref_logp_M is not None, "beta > 0 needs ref_logp_M"
    weight_M = ratio_M if spec.use_bias_correction_kl else None
    return kl_in_loss(spec.kl_estimator, inputs.policy_logp_M, inputs.ref_logp_M, weight_M)


def _token_metrics(
    inputs: PolicyInputs, kl_M: Tensor | None, weight_M: Tensor | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Per-token metrics as (values, weights)."""
    ones_M = torch.ones_like(inputs.policy_logp_M)
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    if kl_M is not None:
        metrics["kl"] = (kl_M, ones_M)
    if inputs.entropy_M is not None:
        metrics["entropy"] = (inputs.entropy_M, ones_M)
    if weight_M is not None:
        metrics["sampling/importance_sampling_ratio/mean"] = (weight_M, ones_M)
    if inputs.behavior_logp_M is not None:
        old_logp_M = inputs.policy_logp_M if inputs.old_logp_M is None else inputs.old_logp_M
        difference_M = (old_logp_M - inputs.behavior_logp_M).abs()
        known_M = ~difference_M.isnan()
        metrics["sampling/sampling_logp_difference/mean"] = (difference_M.nan_to_num(nan=0.0), known_M)
    return metrics
