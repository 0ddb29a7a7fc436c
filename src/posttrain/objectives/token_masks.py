"""Which tokens of an optimizer step the loss treats otherwise: a statistic over all of them, whatever micro-batch or rank they fall into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from posttrain.objectives.spec import PolicySpec

ROUNDING = 1e-5
"""Nats that a token may lie below the threshold: the same context in another micro-batch is scored to rounding."""
_DECIMALS = 5


def entropy_threshold(entropy_M: np.ndarray, share: float) -> float:
    """The entropy that `share` of the tokens have or exceed, interpolated linearly. Source: 80/20, arXiv 2506.01939 eq. 5; TRL's."""
    return float(np.quantile(entropy_M.astype(np.float64), 1 - share))


def is_uncertain(entropy_M: np.ndarray, threshold: float) -> np.ndarray:
    """Tokens at or above the threshold. NaN counts, so that a broken model is not learned around in silence."""
    return ~(entropy_M < threshold - ROUNDING)


@dataclass(frozen=True, slots=True)
class StepTokens:
    """All trained tokens of an optimizer step, in its order: log-probs now and when sampled, and advantages. Shapes: [M] float64."""

    logp_M: np.ndarray
    old_logp_M: np.ndarray
    advantage_M: np.ndarray

    @property
    def covariance_M(self) -> np.ndarray:
        """Each token's share of Cov(log π, A). Source: arXiv 2505.22617 sec. 4.2.

        Example: log π −1 −3, A 1 −1: the means are −2 and 0, the covariances 1 and 1.
        """
        return (self.advantage_M - self.advantage_M.mean()) * (self.logp_M - self.logp_M.mean())


def clip_cov(tokens: StepTokens, spec: PolicySpec, rng: np.random.Generator) -> np.ndarray:
    """⌊`clip_cov_ratio` · M⌋ tokens, one at least, drawn from those with a covariance between the bounds that the clip leaves alone.

    Source: arXiv 2505.22617 sec. 4.2; bounds, and clipped tokens left out, as in verl. Each token has a random number of its own, and
    the lowest are taken: a token that rounding brings into the bounds changes no other's lot. Shapes: → [M] bool.
    """
    ratio_M, covariance_M = np.exp(tokens.logp_M - tokens.old_logp_M), tokens.covariance_M
    clipped_M = np.where(tokens.advantage_M > 0, ratio_M > 1 + spec.high, ratio_M < 1 - spec.epsilon)
    inside_M = (covariance_M > spec.clip_cov_lb) & (covariance_M < spec.clip_cov_ub)
    lots_M = np.where(inside_M & ~(clipped_M & (tokens.advantage_M != 0)), rng.random(len(ratio_M)), np.inf)
    return _first(lots_M, spec.clip_cov_ratio) & np.isfinite(lots_M)


def kl_cov(tokens: StepTokens, spec: PolicySpec, rng: np.random.Generator) -> np.ndarray:
    """The ⌊`kl_cov_ratio` · M⌋ tokens of highest covariance, one at least; of equals, to 1e-5, the first.

    Source: arXiv 2505.22617 sec. 4.2. Shapes: → [M] bool.
    """
    return _first(-np.round(tokens.covariance_M, _DECIMALS), spec.kl_cov_ratio)


def _first(order_M: np.ndarray, share: float) -> np.ndarray:
    chosen_M = np.zeros(len(order_M), np.bool_)
    chosen_M[np.argsort(order_M, kind="stable")[: max(1, int(share * len(order_M)))]] = True
    return chosen_M


TokenSelection = Callable[[StepTokens, PolicySpec, np.random.Generator], np.ndarray]
TOKEN_SELECTIONS: Mapping[str, TokenSelection] = {"clip_cov": clip_cov, "kl_cov": kl_cov}
"""By name in `PolicyLoss.selection`: the first's tokens have no policy gradient, the second's a penalty."""
