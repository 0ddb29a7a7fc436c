"""Who gets which rows of a step, so that no rank waits long for another: by what they cost, not by how many they are."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate

_ATTENTION_LENGTH = 24_576
"""Tokens at which attention costs as much as all else: six times the width of a model 4,096 wide."""
_GOOD_ENOUGH = 0.005


def family_cost(lengths: Sequence[int], shared: int = 0) -> float:
    """What sequences cost that begin with the same `shared` tokens, in tokens of a sequence without attention.

    One sequence of n tokens costs n + n² / 24,576; a shared prefix is computed once, and every branch attends to it.
    """
    return tree_cost([(shared, 0), *((length - shared, shared) for length in lengths)])


def tree_cost(segments: Sequence[tuple[int, int]]) -> float:
    """The same of a tree of any depth: of each of its segments the tokens, and how many come before it in a sequence."""
    attended = sum(size * (size + 2 * before) for size, before in segments)
    return sum(size for size, _ in segments) + attended / _ATTENTION_LENGTH


def deal(costs: Sequence[float], num_shares: int, capacity: int, sizes: Sequence[int] | None = None) -> list[list[int]]:
    """The places of `costs` in shares of nearly equal cost and of at most `capacity` (by `sizes`, else by number); each ascending.

    The dearest first, each to the cheapest share that has room; then places are exchanged while that helps. What fits nowhere
    goes to the cheapest share all the same. A pure function: every rank deals alike.
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sizes = sizes or [1] * len(costs)
    room = [capacity] * num_shares
    cheapest = [(0.0, share) for share in range(num_shares)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        passed_over: list[tuple[float, int]] = []
        while cheapest and room[cheapest[0][1]] < sizes[place]:
            passed_over.append(heapq.heappop(cheapest))
        load, share = heapq.heappop(cheapest if cheapest else passed_over)
        shares[share].append(place)
        room[share] -= sizes[place]
        for entry in (*passed_over, (load + costs[place], share)):
            heapq.heappush(cheapest, entry)
    _exchange(shares, costs, sizes)
    return [sorted(share) for share in shares]


def _exchange(shares: list[list[int]], costs: Sequence[float], sizes: Sequence[int]) -> None:
    """Swap places between the dearest and the cheapest share while both come closer to each other, in place."""
    loads = [sum(costs[place] for place in share) for share in shares]
    for _ in range(8 * len(shares)):
        high, low = max(range(len(loads)), key=loads.__getitem__), min(range(len(loads)), key=loads.__getitem__)
        gap = loads[high] - loads[low]
        if gap <= _GOOD_ENOUGH * loads[high]:
            return
        found = _best_swap(shares[high], shares[low], costs, sizes, gap)
        if found is None:
            return
        give, take = found
        shares[high][shares[high].index(give)], shares[low][shares[low].index(take)] = take, give
        moved = costs[give] - costs[take]
        loads[high] -= moved
        loads[low] += moved


def _best_swap(
    high: list[int], low: list[int], costs: Sequence[float], sizes: Sequence[int], gap: float
) -> tuple[int, int] | None:
    """The two places of equal size whose costs differ by nearest to half the gap, and by less than all of it."""
    givers, takers = (sorted(share, key=lambda place: (costs[place], place)) for share in (high, low))
    best: tuple[float, int, int] | None = None
    at = 0
    for give in givers:
        while at + 1 < len(takers) and costs[give] - costs[takers[at + 1]] >= gap / 2:
            at += 1
        for take in takers[at : at + 2]:
            moved = costs[give] - costs[take]
            if 0 < moved < gap and sizes[give] == sizes[take] and (best is None or abs(moved - gap / 2) < best[0]):
                best = (abs(moved - gap / 2), give, take)
    return None if best is None else best[1:]


def imbalance(loads: Sequence[float]) -> float:
    """(max − mean) / mean: the share of its time that an average rank waits for the dearest one."""
    mean = sum(loads) / len(loads)
    return max(loads) / mean - 1.0 if mean else 0.0


def imbalance_bound(costs: Sequence[float], num_shares: int, capacity: int) -> float:
    """An imbalance that remains however the places are dealt: some share holds ⌈k / shares⌉ of the k dearest, and no fewer
    places than the others have no room for."""
    if not sum(costs):
        return 0.0
    ordered = sorted(costs, reverse=True)
    up_to = [0.0, *accumulate(ordered)]
    fewest = max(0, len(costs) - capacity * (num_shares - 1))
    dearest = 0.0
    for k in range(1, len(costs) + 1):
        held = -(-k // num_shares)
        filled = max(0, min(fewest - held, len(costs) - k))
        dearest = max(dearest, up_to[k] - up_to[k - held] + up_to[-1] - up_to[len(costs) - filled])
    return max(0.0, dearest * num_shares / up_to[-1] - 1.0)


def rank_metrics(costs: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of the families of each rank: `ranks/imbalance`, and the bound that the dearest family alone sets to it."""
    loads, largest = [sum(rank) for rank in costs], max((cost for rank in costs for cost in rank), default=0.0)
    mean = sum(loads) / len(loads)
    bound = max(0.0, largest / mean - 1.0) if mean else 0.0
    return {"ranks/imbalance": imbalance(loads), "ranks/imbalance_bound": bound}
