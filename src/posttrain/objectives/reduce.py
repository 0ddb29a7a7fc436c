"""Where losses are divided: once, by counts of the whole optimizer step, known before its first backward.

Every reduction returns this micro-batch's share of the step's loss, so shares of micro-batches and ranks add up to it
however the step was split. Knows nothing of what the terms mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.types import Counts


@dataclass(frozen=True, slots=True)
class Normalizer:
    """Counts over the whole optimizer step: all micro-batches, all ranks.

    tokens: trained tokens. sequences: completions (or pairs), also those without a trained token and those left out of
    the forward because their advantage is 0: they are part of the mean. max_tokens: longest completion allowed. prompts: their groups.
    """

    tokens: float
    sequences: float
    max_tokens: float = 0.0
    prompts: float = 0.0

    @classmethod
    def of(cls, counts: Counts, max_tokens: float = 0.0) -> Normalizer:
        return cls(float(counts.tokens), float(counts.sequences), float(max_tokens))


@dataclass(frozen=True, slots=True)
class LossSegments:
    """Which sequence each trained token is of, and how many there are. Shapes: M tokens, S sequences.

    prompt_tokens_S: trained tokens of all completions of the sequence's prompt, wherever in the step those are.
    """

    seq_M: Tensor
    lengths_S: Tensor
    prompt_tokens_S: Tensor | None = None


def segment_sum(x_M: Tensor, seq_M: Tensor, num_sequences: int) -> Tensor:
    """Sum per sequence, accumulated in float64; a sequence without tokens gives 0. Shapes: [M] → [S]."""
    zeros_S = torch.zeros(num_sequences, dtype=torch.float64, device=x_M.device)
    return zeros_S.index_add(0, seq_M, x_M.double()).to(x_M.dtype)


def segment_lengths(seq_M: Tensor, num_sequences: int) -> Tensor:
    """Trained tokens per sequence. Shapes: [M] → [S] int64."""
    return torch.bincount(seq_M, minlength=num_sequences)


def segment_mean(x_M: Tensor, seq_M: Tensor, num_sequences: int) -> Tensor:
    """Mean per sequence; a sequence without tokens gives 0. Shapes: [M] → [S]."""
    return segment_sum(x_M, seq_M, num_sequences) / segment_lengths(seq_M, num_sequences).clamp(min=1)


def token_mean(term_M: Tensor, norm: Normalizer) -> Tensor:
    """Every trained token of the step weighs the same. Source: DAPO, arXiv 2503.14476 eq. 8."""
    return term_M.sum() / max(norm.tokens, 1.0)


def sequence_mean_of_token_mean(term_M: Tensor, segments: LossSegments, norm: Normalizer) -> Tensor:
    """Every sequence weighs the same, whatever its length. Source: GRPO, arXiv 2402.03300 eq. 3."""
    return (term_M / segments.lengths_S[segments.seq_M]).sum() / max(norm.sequences, 1.0)


def prompt_mean_of_token_mean(term_M: Tensor, segments: LossSegments, norm: Normalizer) -> Tensor:
    """Every prompt weighs the same, and so does every token of its completions. Source: ScaleRL, arXiv 2510.13786."""
    assert segments.prompt_tokens_S is not None, "a mean inside of prompts needs prompt_tokens_S"
    return (term_M / segments.prompt_tokens_S[segments.seq_M]).sum() / max(norm.prompts, 1.0)


def sequence_sum_over_constant(term_M: Tensor, norm: Normalizer) -> Tensor:
    """Divide by a constant, so that length carries no weight. Source: Dr. GRPO, arXiv 2503.20783 sec. 3."""
    assert norm.max_tokens > 0, "Dr. GRPO divides by max_completion_length: give Normalizer.max_tokens"
    return term_M.sum() / max(norm.sequences * norm.max_tokens, 1.0)


def sequence_sum_mean(term_M: Tensor, norm: Normalizer) -> Tensor:
    """Mean over sequences of the sum of their terms. Source: LUSPO, arXiv 2602.05261; also pairs, where M = P."""
    return term_M.sum() / max(norm.sequences, 1.0)


Reduction = Callable[[Tensor, LossSegments, Normalizer], Tensor]
"""(term_M, segments, norm) → scalar."""

REDUCTIONS: dict[str, Reduction] = {
    "token_mean": lambda term_M, segments, norm: token_mean(term_M, norm),
    "sequence_mean_of_token_mean": sequence_mean_of_token_mean,
    "prompt_mean_of_token_mean": prompt_mean_of_token_mean,
    "sequence_sum_over_constant": lambda term_M, segments, norm: sequence_sum_over_constant(term_M, norm),
    "sequence_sum_mean": lambda term_M, segments, norm: sequence_sum_mean(term_M, norm),
}
