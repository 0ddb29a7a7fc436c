"""Supervised objectives on log-probs of trained tokens. Knows nothing of batches, models or masks."""

from __future__ import annotations

from collections.abc import Callable

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


SFT_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}


def sft_loss(
    logp_M: Tensor,
    norm: Normalizer,
    loss_type: str = "nll",
    top1_M: Tensor | None = None,
    entropy_M: Tensor | None = None,
) -> LossTerms:
    """Token mean over the whole optimizer step. Metrics: loss, nll_loss (dft), mean_token_accuracy, entropy.

    Shapes: logp_M, top1_M, entropy_M: one entry per trained token of this micro-batch.
    """
    term_M = SFT_LOSSES[loss_type](logp_M)
    count = float(logp_M.numel())
    sums: dict[str, tuple[Tensor, Tensor | float]] = {"loss": (term_M.sum(), count)}
    if loss_type != "nll":
        sums["nll_loss"] = (-logp_M.sum(), count)
    if top1_M is not None:
        sums["mean_token_accuracy"] = (top1_M.sum(), count)
    if entropy_M is not None:
        sums["entropy"] = (entropy_M.sum(), count)
    return LossTerms(token_mean(term_M, norm), as_ratios(sums))
