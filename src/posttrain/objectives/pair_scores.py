"""What losses on pairs compare: one number of each answer, made from log-probs of its tokens.

Knows nothing of the losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.objectives.reduce import segment_lengths, segment_sum

_LARGEST_EXPONENT = 80.0
_ALPHA_IS_ONE = 1e-6


def summed(logp_M: Tensor, seq_M: Tensor, num_sequences: int, ld_alpha: float | None = None) -> Tensor:
    """Log-probs of sequences; chosen and rejected take turns. Shapes: [M] → [S].

    With `ld_alpha` the tokens of an answer beyond the length of the other one count by so much. Source: LD-DPO, arXiv
    2409.06411.
    """
    if ld_alpha is not None:
        lengths_P2 = segment_lengths(seq_M, num_sequences).view(-1, 2)
        shared_S = lengths_P2.amin(1).repeat_interleave(2)
        tokens_M = torch.arange(len(seq_M), device=seq_M.device)
        first_S = tokens_M.new_full((num_sequences,), len(seq_M)).scatter_reduce(0, seq_M, tokens_M, "amin")
        logp_M = torch.where(tokens_M - first_S[seq_M] < shared_S[seq_M], logp_M, ld_alpha * logp_M)
    return segment_sum(logp_M, seq_M, num_sequences)


@torch.no_grad()
def wpo_weights(logp_M: Tensor, log_sum_sq_M: Tensor, seq_M: Tensor, num_sequences: int) -> Tensor:
    """How near each pair is to what the policy itself would sample: ∏ over both answers of e^(mean of log p − log Σ_v p_v²).

    Source: WPO, arXiv 2406.11827 eq. 2, as TRL's use_weighting. Shapes: [M] → [P].
    """
    sums_S = segment_sum(logp_M - log_sum_sq_M, seq_M, num_sequences)
    means_S = sums_S / segment_lengths(seq_M, num_sequences).clamp(min=1)
    return torch.exp(means_S.view(-1, 2).sum(1))


F_SCORES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda log_u, alpha: log_u,
    "forward_kl": lambda log_u, alpha: 1 - _finite_exp(-log_u),
    "js_divergence": lambda log_u, alpha: math.log(2) + logsigmoid(log_u),
    "alpha_divergence": lambda log_u, alpha: (
        (_finite_exp((alpha - 1) * log_u) - 1) / (alpha - 1) if abs(alpha - 1) > _ALPHA_IS_ONE else log_u
    ),
}
"""name → f'(u) of log u = log π − log π_ref. Source: f-DPO, arXiv 2309.16240; α as in TRL: 1 − α of the paper."""


def _finite_exp(x: Tensor) -> Tensor:
    """e^x, flat above e^80: float32 ends at e^88."""
    return torch.exp(x.clamp(max=_LARGEST_EXPONENT))
