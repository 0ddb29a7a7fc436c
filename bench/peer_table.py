"""The table of bench/peers.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

HEAD = (
    "| work | beside | ratio in processor's seconds (min–max) | ratio in seconds (min–max) | ours, a processor's second | theirs | peak memory | equal | others' CPUs |",
    "|---|---|---|---|---|---|---|---|---|",
)


class Named(Protocol):
    """A row of the bench."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def peer(self) -> str: ...


@dataclass(frozen=True)
class Found:
    """Both sides' records of `Turns`, turn by turn; `equal`: what was compared, and how well it agrees. A turn's `tokens` are counted in `unit`."""

    ours: Sequence[Mapping[str, Any]]
    theirs: Sequence[Mapping[str, Any]]
    equal: str
    unit: str = "tok"


def render(rows: Sequence[Named], results: Mapping[str, Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    """Measured rows as a table; below it those that were left out, each with its reason, and those that were not asked for."""
    done = [row for row in rows if "equal" in results.get(row.name, ())]
    below = [
        f"Left out: {row.title}, beside {row.peer}: {results[row.name]['left_out']}"
        for row in rows
        if "left_out" in results.get(row.name, ())
    ]
    if asked := [row.name for row in rows if row.name not in results]:
        below.append(f"Not measured: {', '.join(asked)}.")
    pairs = sorted({results[row.name]["pairs"] for row in done})
    median = f"; median of {' or '.join(map(str, pairs))} pairs" if pairs else ""
    lines = [f"{facts['packages']}; {facts['machine']}{median}.", "", *HEAD]
    return "\n".join(
        [*lines, *(line(row, results[row.name]) for row in done), *(part for one in below for part in ("", one))]
    )


def line(row: Named, result: Mapping[str, Any]) -> str:
    """A ratio is our work in a second by theirs, in each pair of turns."""
    if "left_out" in result:
        return f"{row.name}: left out: {result['left_out']}"
    ours, theirs, unit = result["ours"], result["theirs"], result["unit"]
    cells = [
        row.title, row.peer, f"**{spread(ours, theirs, 'cpu_seconds')}", spread(ours, theirs, "seconds").replace("**", ""),
        *(f"{statistics.median(rate(turn, 'cpu_seconds') for turn in side):,.0f} {unit}" for side in (ours, theirs)),
        f"{ours[-1]['peak_mb'] / theirs[-1]['peak_mb']:.2f}×", result["equal"],
        f"{max(turn['others_cpus'] for turn in (*ours, *theirs)):.2f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def spread(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], clock: str) -> str:
    ratios = [rate(a, clock) / rate(b, clock) for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):.2f}×** ({min(ratios):.2f}–{max(ratios):.2f})"


def rate(turn: Mapping[str, Any], clock: str) -> float:
    return turn["tokens"] / turn[clock]
