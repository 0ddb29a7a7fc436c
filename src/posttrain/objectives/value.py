"""What a critic is trained on: squared distance of its values to the returns, clipped around what they were; how much they explain."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.objectives.reduce import Normalizer, token_mean
from posttrain.objectives.terms import LossTerms, as_ratios


def value_loss(
    value_M: Tensor, old_value_M: Tensor, return_M: Tensor, cliprange_value: float | None, norm: Normalizer
) -> LossTerms:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), a token mean over the step: a step that leads far from V_old has no gradient.

    Source: the value loss of OpenAI's baselines, described in arXiv 2005.12729 sec. 2; TRL, verl and OpenRLHF have the same.
    """
    return_M = return_M.to(value_M.dtype)
    square_M = (value_M - return_M) ** 2
    clipped_M = torch.zeros_like(square_M, dtype=torch.bool)
    if cliprange_value is not None:
        old_M = old_value_M.to(value_M.dtype)
        bounded_M = (torch.clamp(value_M, old_M - cliprange_value, old_M + cliprange_value) - return_M) ** 2
        clipped_M = bounded_M > square_M
        square_M = torch.maximum(square_M, bounded_M)
    loss = 0.5 * token_mean(square_M, norm)
    count = float(value_M.numel())
    sums = {"critic/vf_loss": 0.5 * square_M.sum(), "critic/vf_clipfrac": clipped_M.sum()}
    return LossTerms(loss, as_ratios({name: (total, count) for name, total in sums.items()}))


def explained_variance(value_M: Tensor, return_M: Tensor) -> float | None:
    """1 − Var(R − V) / Var(R): 1 for values that are the returns, 0 for any constant; None where the returns do not vary."""
    spread = float(return_M.var(correction=0)) if return_M.numel() else 0.0
    return 1.0 - float((return_M - value_M).var(correction=0)) / spread if spread > 0 else None
