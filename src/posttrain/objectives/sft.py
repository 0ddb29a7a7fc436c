"""Supervised objectives on log-probs of trained tokens. Knows nothing of batches, models or masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.objectives.reduce import Normalizer, token_mean
from posttrain.objectives.terms import LossTerms, as_ratios


def nll(logp_M: Tensor) -> Tensor:
    """−log p: cross-entropy."""
    return -logp_M


def dft(logp_M: Tensor) -> Tensor:
    """−sg(p)·log p: a token counts as much as the model already believes it. Source: arXiv 2508.05629 sec. 3."""
    return -torch.exp(logp_M.detach()) * logp_M


SFT_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft, "eaft": nll}
"""name → a term per token; eaft's are weighted by `eaft_weight`."""
_TOP_20_NATS = 3.0
"""About the most that 20 tokens can have: ln 20."""


def eaft_weight(entropy_M: Tensor, alpha: float) -> Tensor:
    """(H / 3)^α, H the entropy of the likeliest tokens: what the model is sure of and the row contradicts is pulled at least.

    Source: Entropy-Adaptive Fine-Tuning, arXiv 2601.02151; 3 ≈ ln 20 as in its authors' code.
    """
    return (entropy_M / _TOP_20_NATS) ** alpha


class Smoothing(NamedTuple):
    """`share` of each target lies evenly on the vocabulary, whose mean log-prob at each token is `mean_logp_M`."""

    share: float
    mean_logp_M: Tensor


def sft_loss(
    logp_M: Tensor,
    norm: Normalizer,
    loss_type: str = "nll",
    top1_M: Tensor | None = None,
    entropy_M: Tensor | None = None,
    smoothing: Smoothing | None = None,
    weight_M: Tensor | None = None,
) -> LossTerms:
    """Token mean over the whole optimizer step. Metrics: loss, nll_loss (all but plain nll), mean_token_accuracy, entropy.

    Shapes: logp_M, top1_M, entropy_M, weight_M (what a token's term counts for): one entry per trained token of this micro-batch.
    Source: smoothing of Szegedy et al., arXiv 1512.00567 sec. 7, as in transformers' LabelSmoother.
    """
    term_M = SFT_LOSSES[loss_type](logp_M)
    if smoothing is not None:
        term_M = (1 - smoothing.share) * term_M - smoothing.share * smoothing.mean_logp_M
    if weight_M is not None:
        term_M = weight_M * term_M
    count = float(logp_M.numel())
    sums: dict[str, tuple[Tensor, Tensor | float]] = {"loss": (term_M.sum(), count)}
    if loss_type != "nll" or smoothing is not None:
        sums["nll_loss"] = (-logp_M.sum(), count)
    if top1_M is not None:
        sums["mean_token_accuracy"] = (top1_M.sum(), count)
    if entropy_M is not None:
        sums["entropy"] = (entropy_M.sum(), count)
    return LossTerms(token_mean(term_M, norm), as_ratios(sums))
