"""Which rows leave a set, each with why: repeats, eval prompts, what is too many of one kind. Knows no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from posttrain.config.synth import Repeats
from posttrain.data import overlap
from posttrain.files import digest_json

Leaving = dict[int, str]
"""Place of a row that leaves → why: `kind: detail`."""


def repeats(texts: Sequence[str], names: Sequence[str], how: Repeats, near: float = overlap.NEAR) -> Leaving:
    """Rows that say what an earlier one says, which is told by its name; `near` ones at a Jaccard index of `near` or above."""
    if how == "off":
        return {}
    hashed = overlap.hash_words(texts)
    found = {later: f"duplicate: the same as {names[first]}" for later, first in overlap.exact_duplicates(hashed)}
    if how == "near":
        # Of those that stay: a repeat of a repeat is none of its own.
        places = [place for place in range(len(texts)) if place not in found]
        pairs = overlap.near_duplicates([hashed[place] for place in places], near)
        found |= {
            places[later]: f"near duplicate: of {names[places[first]]}, Jaccard index {index:.2f}"
            for later, first, index in pairs
        }
    return found


def eval_prompts(prompts: Sequence[str], wholes: Sequence[str], suites: Mapping[str, Sequence[str]]) -> Leaving:
    """Rows that hold a prompt of a suite."""
    if not suites:
        return {}
    rows = list(zip(overlap.hash_words(prompts), overlap.hash_words(wholes), strict=True))
    return {
        row: f"contaminated: holds a prompt of suite {name}"
        for row, name in reversed(overlap.contaminated(rows, suites))
    }


def too_many(values: Sequence[str], ratio: float, seed: int) -> Leaving:
    """Rows of values that are more than `ratio` times as many as those of the rarest; which ones stay follows from the seed."""
    counts = Counter(values)
    most = int(ratio * min(counts.values(), default=0))
    taken, found = Counter[str](), Leaving()
    for place in sorted(range(len(values)), key=lambda place: digest_json([seed, place])):
        taken[value := values[place]] += 1
        if taken[value] > most:
            found[place] = f"balance: one of {counts[value]} rows of {value!r}, of which {most} stay"
    return found


def without(
    rows: Sequence[int], filters: Sequence[Callable[[Sequence[int]], Leaving]]
) -> tuple[list[int], dict[int, str]]:
    """The places that stay and those that leave, through one filter after the other; each sees what the ones before left."""
    staying, left = list(rows), dict[int, str]()
    for apply in filters:
        leaving = apply(staying)
        left |= {staying[place]: why for place, why in leaving.items()}
        staying = [row for place, row in enumerate(staying) if place not in leaving]
    return staying, left
