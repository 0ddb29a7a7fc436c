"""Supervised rows beside the rollouts of RL: which of them a step takes, and their share of its loss.

Source: PPO-ptx, arXiv 2203.02155 eq. 2. A cross-entropy stream of its own: divided by its own tokens, so that neither the
rollouts' gradient nor its own depends on how many tokens the other one has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial

from posttrain.config.rl import RLKeys
from posttrain.data.dataset import Dataset
from posttrain.models.batch import loss_counts, pack
from posttrain.models.policy import Policy
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.sft import sft_loss
from posttrain.objectives.terms import LossTerms
from posttrain.protocols import Ranks
from posttrain.recipes.batches import in_their_order
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import accumulating
from posttrain.types import TokenSeq


class PtxRows:
    """An endless row of supervised rows, shuffled by (seed, epoch); a step's are a function of its number."""

    def __init__(self, data: Dataset[TokenSeq], keys: RLKeys) -> None:
        self._data, self._keys = data, keys
        self._order = lru_cache(maxsize=2)(partial(data.order, keys.seed))

    def of_step(self, step: int) -> list[TokenSeq]:
        first = step * self._keys.ptx_rows_per_step
        return [self._row(number) for number in range(first, first + self._keys.ptx_rows_per_step)]

    def _row(self, number: int) -> TokenSeq:
        epoch, place = divmod(number, len(self._data))
        return self._data.rows[self._order(epoch)[place]]


def learn_from(
    policy: Policy, rows: Sequence[TokenSeq], coef: float, at_once: int, ranks: Ranks, metrics: StepMetrics, name: str = "ptx_loss"
) -> None:  # fmt: skip
    """Add the gradient of a step's supervised rows, `at_once` at a time, as often on every rank; their loss is logged as `name`."""
    micros, norm = list(in_their_order(rows, at_once, ranks)), ptx_norm(rows)
    for micro in accumulating(policy, micros):
        terms = ptx_loss(policy, micro.rows, norm, coef)
        micro.backward(terms.loss)
        metrics.add({} if micro.idle else {name: terms.metrics["ptx_loss"]})


def ptx_loss(policy: Policy, rows: Sequence[TokenSeq], norm: Normalizer, coef: float) -> LossTerms:
    """This micro-batch's share, weighted. Metric: ptx_loss (nats per token, unweighted)."""
    terms = sft_loss(policy.score(pack([[row] for row in rows], least_shared=math.inf)).logp_M, norm)
    return LossTerms(coef * terms.loss, {"ptx_loss": terms.metrics["loss"]})


def ptx_norm(rows: Sequence[TokenSeq]) -> Normalizer:
    """Counted over the step's supervised rows alone."""
    return Normalizer.of(loss_counts(rows))
