"""Which tokens of an optimizer step have a policy gradient: a statistic over all of them, whatever micro-batch or rank they fall into."""

from __future__ import annotations

import numpy as np

ROUNDING = 1e-5
"""Nats that a token may lie below the threshold: the same context in another micro-batch is scored to rounding."""


def entropy_threshold(entropy_M: np.ndarray, share: float) -> float:
    """The entropy that `share` of the tokens have or exceed, interpolated linearly. Source: 80/20, arXiv 2506.01939 eq. 5; TRL's."""
    return float(np.quantile(entropy_M.astype(np.float64), 1 - share))


def is_uncertain(entropy_M: np.ndarray, threshold: float) -> np.ndarray:
    """Tokens at or above the threshold. NaN counts, so that a broken model is not learned around in silence."""
    return ~(entropy_M < threshold - ROUNDING)
