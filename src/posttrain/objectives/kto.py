"""KTO: a loss on rows that are each desirable or not.

Knows nothing of where the rows' log-probs come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objectives.preference import PreferenceSpec
from posttrain.objectives.reduce import Normalizer, sequence_sum_mean
from posttrain.objectives.terms import LossTerms, as_ratios
from posttrain.types import Ratio


@dataclass(frozen=True, slots=True)
class LabelledInputs:
    """One micro-batch of S labelled completions: log-probs summed over the trained tokens. `label_S`: True is desirable."""

    logp_S: Tensor
    ref_logp_S: Tensor
    label_S: Tensor


def kto_reference_point(mean_log_ratio: Ratio) -> float:
    """z: the mean of log π − log π_ref over completions paired with *other* rows' prompts, at least 0, a constant.

    Source: KTO, arXiv 2402.01306 sec. 4. The Ratio adds over micro-batches and ranks.
    """
    return max(mean_log_ratio.value, 0.0) if mean_log_ratio.den else 0.0


def kto_loss(inputs: LabelledInputs, z: float, spec: PreferenceSpec, norm: Normalizer) -> LossTerms:
    """λ_D·(1 − σ(β(a − z))) for desirable rows, λ_U·(1 − σ(β(z − b))) for the others; mean over the step's rows.

    Source: KTO, arXiv 2402.01306 sec. 4, whose λ_y − v is the same up to a constant. rewards/margins is the difference of
    two logged means and so is left to the logger.
    """
    log_ratio_S = inputs.logp_S - inputs.ref_logp_S
    desirable_S = inputs.label_S.bool()
    shortfall_S = spec.beta * torch.where(desirable_S, z - log_ratio_S, log_ratio_S - z)
    ones_S = torch.ones_like(log_ratio_S)
    weight_S = torch.where(desirable_S, spec.desirable_weight * ones_S, spec.undesirable_weight * ones_S)
    loss = sequence_sum_mean(weight_S * torch.sigmoid(shortfall_S), norm)
    count = float(log_ratio_S.numel())
    metrics: dict[str, tuple[Tensor, Tensor | float]] = {"kl": (torch.full_like(log_ratio_S, z).sum(), count)}
    for side, rows_S in (("chosen", desirable_S), ("rejected", ~desirable_S)):
        metrics[f"rewards/{side}"] = ((spec.beta * log_ratio_S * rows_S).sum(), rows_S.sum())
        metrics[f"logps/{side}"] = ((inputs.logp_S * rows_S).sum(), rows_S.sum())
    return LossTerms(loss, as_ratios(metrics))
