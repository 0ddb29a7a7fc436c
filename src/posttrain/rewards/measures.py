"""The numbers of a certificate: pure functions of lists of rewards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

_BINS = 4


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def std(values: Sequence[float]) -> float:
    """Sample standard deviation, ddof 1 as in the advantages; 0 below two values."""
    if len(values) < 2:
        return 0.0
    centre = mean(values)
    # Products, for a power that overflows raises: rewards of 1e200 are spread infinitely here.
    return math.sqrt(sum((v - centre) * (v - centre) for v in values) / (len(values) - 1))


def auc(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Chance that a right answer scores above a wrong one, ties counting half (Mann-Whitney)."""
    pairs = len(right) * len(wrong)
    wins = sum((r > w) + 0.5 * (r == w) for r in right for w in wrong)
    return wins / pairs if pairs else math.nan


def separation(right: Sequence[float], wrong: Sequence[float]) -> float:
    """Gap of the means over the pooled standard deviation; infinite when both are constant and differ."""
    gap, spread = mean(right) - mean(wrong), math.sqrt((std(right) ** 2 + std(wrong) ** 2) / 2)
    return gap / spread if spread else math.copysign(math.inf, gap) if gap else 0.0


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, math.ceil(share * len(ordered)) - 1))] if ordered else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = (start + end) / 2
        start = end + 1
    return ranks


def spearman(left: Sequence[float], right: Sequence[float]) -> float:
    """Rank correlation; 0 when either side is constant."""
    a, b = _ranks(left), _ranks(right)
    spread = std(a) * std(b)
    if not spread:
        return 0.0
    mean_a, mean_b = mean(a), mean(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(a) - 1) / spread


def mutual_information(left: Sequence[float], right: Sequence[float]) -> float:
    """Nats that one side says of the other, by up to four bins of equally many values each; at least 0.

    Miller and Madow's correction takes out most of what few values seem to say: bins are rewards' and lengths', so a batch of 64 will do.
    """
    num = len(left)
    if num < 2:
        return 0.0
    pairs = list(zip(_binned(left), _binned(right), strict=True))
    one, other, both = (_entropy(counts.values(), num) for counts in (Counter(a for a, _ in pairs), Counter(b for _, b in pairs), Counter(pairs)))  # fmt: skip
    return max(0.0, one + other - both)


def _binned(values: Sequence[float]) -> list[int]:
    """Equal values share a bin."""
    return [int(_BINS * rank / len(values)) for rank in _ranks(values)]


def _entropy(counts: Iterable[int], num: int) -> float:
    counts = list(counts)
    return -sum(count / num * math.log(count / num) for count in counts) + (len(counts) - 1) / (2 * num)


def spread_shares(columns: Sequence[Sequence[float]]) -> list[float]:
    """What each column adds to the variance of their sum, Cov(column, sum) / Var(sum): shares that add up to 1; 0 where nothing varies."""
    totals = [sum(row) for row in zip(*columns, strict=True)]
    variance = std(totals) ** 2
    if not variance:
        return [0.0] * len(columns)
    centre = mean(totals)
    return [
        sum((value - mean(column)) * (total - centre) for value, total in zip(column, totals, strict=True)) / (len(totals) - 1) / variance
        for column in columns
    ]  # fmt: skip


def group_forecast(groups: Mapping[int, Sequence[float]], right_from: float | None = None) -> dict[str, float]:
    """What GRPO would see of these groups: the share without any signal, and the spread that rewards and advantages have.

    A group without spread counts as right where it earns at least `right_from`, else as wrong.
    """
    usable = [rewards for rewards in groups.values() if len(rewards) > 1]
    if not usable:
        return {}
    spreads = [std(rewards) for rewards in usable]
    flat = [rewards[0] for rewards, spread in zip(usable, spreads, strict=True) if spread == 0]
    num_right = sum(right_from is not None and reward >= right_from for reward in flat)
    return {
        "num_groups": len(usable),
        "group_size": mean([float(len(rewards)) for rewards in usable]),
        "frac_reward_zero_std": len(flat) / len(usable),
        "frac_reward_all_right": num_right / len(usable),
        "frac_reward_all_wrong": (len(flat) - num_right) / len(usable),
        "mean_reward": mean([mean(rewards) for rewards in usable]),
        "mean_reward_std": mean(spreads),
        "advantage_std": std([a for rewards in usable for a in _advantages(rewards)]),
    }


def _advantages(rewards: Sequence[float]) -> list[float]:
    """Centred and divided by the group's standard deviation, as the default of GRPO."""
    centre, spread = mean(rewards), std(rewards)
    return [(reward - centre) / (spread + 1e-4) for reward in rewards]
