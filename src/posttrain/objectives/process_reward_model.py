"""The loss of a process reward model: the cross-entropy of "this step is right" at the end of each step."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import log_softmax

from posttrain.objectives.reduce import Normalizer, token_mean
from posttrain.objectives.terms import LossTerms, as_ratios


def process_reward_model_loss(logits_M2: Tensor, label_M: Tensor, norm: Normalizer) -> LossTerms:
    """−y·log p − (1 − y)·log(1 − p) with p = softmax(logits)₁, mean over the step ends of the optimizer step; `norm.tokens` counts them.

    y is 0 or 1, or a share in between. Source: Math-Shepherd, arXiv 2312.08935 eq. 2 to 4 (hard and soft estimation), its sigmoid written
    as two labels, as TRL's PRMTrainer; all else than step ends is no part of it, as under label −100 there.
    """
    logp_M2 = log_softmax(logits_M2, dim=-1)
    term_M = -label_M * logp_M2[:, 1] - (1 - label_M) * logp_M2[:, 0]
    is_right_M, found_M = label_M > 0.5, logits_M2[:, 1] > logits_M2[:, 0]
    metrics: dict[str, tuple[Tensor, Tensor | float]] = {
        "accuracy": ((found_M == is_right_M).sum(), float(label_M.numel())),
        "accuracy/right": ((found_M & is_right_M).sum(), is_right_M.sum()),
        "accuracy/wrong": ((~found_M & ~is_right_M).sum(), (~is_right_M).sum()),
    }
    return LossTerms(token_mean(term_M, norm), as_ratios(metrics))
