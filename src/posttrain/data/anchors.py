"""Places in a rendered row from which a policy goes on, and how far the row's own tokens there are its answer."""

from __future__ import annotations

import numpy as np

from posttrain.types import TokenSeq

AnswerSpan = tuple[int, int]
"""Of a row's ids the answer: `ids[begin:end]` behind `ids[:begin]`, which is never empty."""


def answer_spans(row: TokenSeq) -> list[AnswerSpan]:
    """Each run of trained tokens, whole. One that nothing stands before begins with its second token."""
    mask = np.array((False, *row.loss_mask[1:], False))
    begins, ends = np.flatnonzero(~mask[:-1] & mask[1:]) + 1, np.flatnonzero(mask[:-1] & ~mask[1:]) + 1
    return list(zip(begins.tolist(), ends.tolist(), strict=True))


def strided_spans(
    row: TokenSeq, length: int, stride: int, context_length: int, min_completion_prefix: int
) -> list[AnswerSpan]:
    """Every `stride` tokens the next `length`, where all of them are trained. The first is `min_completion_prefix` behind the first
    trained token, and `context_length` from the row's start at least. Source: arXiv 2603.12248, strided sampling."""
    if not any(row.loss_mask):
        return []
    first = max(row.loss_mask.index(True) + min_completion_prefix, context_length)
    starts = range(first, len(row.ids) - length + 1, stride)
    return [(at, at + length) for at in starts if all(row.loss_mask[at : at + length])]
