"""The results as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rows import BY_NAME, Row

HEAD = (
    "| work | TRL as | ratio (min–max) | at least | aim | ours | TRL | peak memory | loss difference | others' CPUs |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
MEMORY_LEAST, MEMORY_AIM = 0.5, 0.33


def render(results: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> str:
    """Speed rows, then the peak memory of those that compare with padded batches."""
    lines = [f"{facts['packages']}; {facts['machine']}; median of {facts['pairs']} pairs.", "", *HEAD]
    lines += [line(BY_NAME[result["row"]], result) for result in results]
    padded = [result for result in results if BY_NAME[result["row"]].setup == "padded batches"]
    lines += [memory_line(BY_NAME[result["row"]], result) for result in padded]
    return "\n".join(lines)


def line(row: Row, result: Mapping[str, Any]) -> str:
    low, high = min(result["ratios"]), max(result["ratios"])
    upto = "≤ " if row.task == "startup" else ""
    cells = [
        row.title,
        row.setup,
        f"**{result['ratio']:.2f}×** ({low:.2f}–{high:.2f})",
        goal(row.least, upto),
        goal(row.aim, upto),
    ]
    if row.task == "startup":
        cells += [f"{result['ours_s']:.1f} s", f"{result['trl_s']:.1f} s", "", ""]
    else:
        difference = result["loss_difference"]
        cells += [
            f"{result['ours_tok_s']:,.0f} tok/s", f"{result['trl_tok_s']:,.0f} tok/s",
            f"{result['ours_peak_mb'] / result['trl_peak_mb']:.2f}×",
            "" if difference is None else f"{difference:.1e}" + ("" if row.same_batches else " (means)"),
        ]  # fmt: skip
    return "| " + " | ".join([*cells, f"{result['others_cpus']:.2f}"]) + " |"


def memory_line(row: Row, result: Mapping[str, Any]) -> str:
    ours, trl = result["ours_peak_mb"], result["trl_peak_mb"]
    cells = [f"peak memory: {row.title}", row.setup, f"**{ours / trl:.2f}×**", f"≤ {MEMORY_LEAST}×", f"≤ {MEMORY_AIM}×"]
    return "| " + " | ".join([*cells, f"{ours:,.0f} MB", f"{trl:,.0f} MB", "", "", ""]) + " |"


def goal(value: float | None, prefix: str) -> str:
    return "" if value is None else f"{prefix}{value:g}×"
