"""Importance ratios: trainer now over trainer then (in the surrogate), and trainer over sampler (a correction).

All in log space; log ratios are clamped at +20 before exp (e^20 ≈ 5e8), so a single token can never give inf · 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.objectives.reduce import segment_mean, segment_sum

LOG_RATIO_MAX = 20.0


def log_ratios(policy_logp_M: Tensor, old_logp_M: Tensor | None) -> Tensor:
    """log π − log π_old per token; without `old` the policy is its own: the value is 0, the gradient is not."""
    return policy_logp_M - (policy_logp_M.detach() if old_logp_M is None else old_logp_M)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    return torch.exp(log_ratio.clamp(max=LOG_RATIO_MAX))


def token_ratio(log_ratio_M: Tensor, seq_M: Tensor, num_sequences: int) -> Tensor:
    """π/π_old of each token."""
    return bounded_exp(log_ratio_M)


def sequence_ratio(log_ratio_M: Tensor, seq_M: Tensor, num_sequences: int) -> Tensor:
    """Geometric mean of a sequence's token ratios, at each of its tokens. Source: GSPO, arXiv 2507.18071 eq. 7."""
    return bounded_exp(segment_mean(log_ratio_M, seq_M, num_sequences))[seq_M]


def sequence_product_ratio(log_ratio_M: Tensor, seq_M: Tensor, num_sequences: int) -> Tensor:
    """π(sequence)/π_old(sequence), at each of its tokens. Source: RLOO, arXiv 2402.14740."""
    return bounded_exp(segment_sum(log_ratio_M, seq_M, num_sequences))[seq_M]


def clip_one_side(log_ratio_M: Tensor, advantage_M: Tensor, low: float, high: float) -> Tensor:
    """min(x, high) where A > 0, max(x, −low) elsewhere: PPO's clip on log ratios. Source: GMPO, arXiv 2507.20673 eq. 4."""
    return torch.where(advantage_M > 0, log_ratio_M.clamp(max=high), log_ratio_M.clamp(min=-low))


RatioFn = Callable[[Tensor, Tensor, int], Tensor]
RATIOS: dict[str, RatioFn] = {
    "token": token_ratio,
    "sequence": sequence_ratio,
    "sequence_product": sequence_product_ratio,
}
SEQUENCE_LEVEL = frozenset({"sequence", "sequence_product"})


def _truncate(weight: Tensor, cap: float) -> Tensor:
    return weight.clamp(max=cap)


def _mask(weight: Tensor, cap: float) -> Tensor:
    return torch.where(weight > cap, torch.zeros_like(weight), weight)


def _accept(weight: Tensor, cap: float) -> Tensor:
    return ((weight <= cap) & (weight >= 1 / cap)).to(weight.dtype)


CORRECTIONS: dict[str, tuple[RatioFn, Callable[[Tensor, float], Tensor]]] = {
    "token_truncate": (token_ratio, _truncate),
    "token_mask": (token_ratio, _mask),
    "sequence_truncate": (sequence_product_ratio, _truncate),
    "sequence_mask": (sequence_product_ratio, _mask),
    "geometric_mask": (sequence_ratio, _accept),
}
"""name → (ratio of trainer to sampler, what becomes of it at the cap)."""


@torch.no_grad()
def correction_weights(
    mode: str, cap: float, old_logp_M: Tensor, behavior_logp_M: Tensor, seq_M: Tensor, num_sequences: int
) -> Tensor:
    """Constant weights π_old/π_sampler per token, truncated or zeroed above `cap`; unknown (NaN) log-probs weigh 1.

    `geometric_mask` weighs nothing: it leaves out sequences whose ratio per token, as geometric mean, is outside [1/cap, cap].
    Source: TIS, Yao et al. 2025; masked: IcePop, Ring-1T 2025; names and definitions as TRL's; geometric: verl's rollout rejection.
    """
    ratio, at_cap = CORRECTIONS[mode]
    difference_M = torch.nan_to_num(old_logp_M - behavior_logp_M, nan=0.0)
    return at_cap(ratio(difference_M, seq_M, num_sequences), cap)


@torch.no_grad()
def off_policy_keep(
    threshold: float, advantage_M: Tensor, policy_logp_M: Tensor, sampled_logp_M: Tensor, seq_M: Tensor, num_sequences: int
) -> Tensor:  # fmt: skip
    """False at each token of a sequence with A < 0 whose mean log π_sampled − log π is above `threshold`; unknown (NaN) log-probs
    count as equal. Source: DeepSeek-V3.2, arXiv 2512.02556; as TRL's off_policy_mask_threshold."""
    drift_M = torch.nan_to_num(sampled_logp_M - policy_logp_M, nan=0.0)
    return (advantage_M >= 0) | (segment_mean(drift_M, seq_M, num_sequences) <= threshold)[seq_M]
