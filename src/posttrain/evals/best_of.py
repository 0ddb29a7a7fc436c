"""Best-of-N from N' ≥ N samples of each item, without sampling again: what the sample that a verifier ranks first is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from posttrain.errors import EvalError


def best_of_n(ranked_by: Sequence[float], worth: Sequence[float], n: int) -> float:
    """Expected worth of the one of n samples that ranks highest, over all choices of n of them; of equal ranks any is as likely.

    Unbiased. Source: Nakano et al. 2021, arXiv 2112.09332 appendix I; ties are ours. Raises: EvalError for fewer than n samples.
    """
    total = len(ranked_by)
    if not 1 <= n <= total:
        raise EvalError(f"best of {n} from {total} samples: needs at least so many; raise --best-of")
    order = sorted(range(total), key=lambda place: ranked_by[place])
    below, expected, ways = 0, 0.0, math.comb(total, n)
    for _, tied in groupby(order, key=lambda place: ranked_by[place]):
        values = [worth[place] for place in tied]
        # Some sample of the tie is among the n, and none of a higher rank.
        chance = (math.comb(below + len(values), n) - math.comb(below, n)) / ways
        expected += chance * sum(values) / len(values)
        below += len(values)
    return expected


def kl_bound(n: int) -> float:
    """Most nats by which best of n can differ from the policy: log n − (n − 1)/n. Source: Beirami et al. 2024, arXiv 2401.01879."""
    return math.log(n) - (n - 1) / n


@dataclass(frozen=True, slots=True)
class VerifiedItem:
    """An item's samples as each looks to the verifier and to each grader by name. The verifier never chooses what it could not score."""

    id: str
    verifier: tuple[float | None, ...]
    graders: dict[str, tuple[float | None, ...]]
    cluster: str | None = None


@dataclass(frozen=True, slots=True)
class BestOf:
    """One n: per item, what the verifier gives its choice and what each grader does."""

    n: int
    verifier: tuple[float, ...]
    graders: dict[str, tuple[float, ...]]

    @property
    def kl(self) -> float:
        return kl_bound(self.n)


def best_of_curve(items: Sequence[VerifiedItem], most: int) -> list[BestOf]:
    """For n = 1, 2, 4 … and `most`. A grader gives 0 to what it could not score, as a suite does."""
    ns = sorted({2**power for power in range(most.bit_length())} | {most})
    return [_at(items, n) for n in ns if n <= most]


def _at(items: Sequence[VerifiedItem], n: int) -> BestOf:
    ranks = [tuple(-math.inf if score is None else score for score in item.verifier) for item in items]
    own = [tuple(score or 0.0 for score in item.verifier) for item in items]
    names = items[0].graders
    return BestOf(
        n,
        tuple(best_of_n(rank, worth, n) for rank, worth in zip(ranks, own, strict=True)),
        {
            name: tuple(
                best_of_n(rank, [score or 0.0 for score in item.graders[name]], n)
                for rank, item in zip(ranks, items, strict=True)
            )
            for name in names
        },
    )


def turns_down(curve: Sequence[BestOf], grader: str) -> int | None:
    """The n from which more choice by the verifier makes the grader's mean worse; None where its best is the last."""
    means = [sum(at.graders[grader]) / len(at.graders[grader]) for at in curve]
    best = max(range(len(means)), key=means.__getitem__)
    return curve[best].n if best < len(curve) - 1 and means[-1] < means[best] - 1e-12 else None
