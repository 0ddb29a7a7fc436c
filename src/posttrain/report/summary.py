"""The before/after table as plain text, for the end of a run in a terminal."""

from __future__ import annotations

from pathlib import Path

from posttrain.report import words
from posttrain.report.records import RunRecord, read_run
from posttrain.report.tables import before_after, headline


def render_summary(run_dir: Path) -> str:
    """Scores of every model with 95 % intervals, the change, the gate and the registry entry."""
    return summary_of(read_run(run_dir))


def summary_of(run: RunRecord) -> str:
    lines: list[str] = []
    rows = before_after(run)
    if rows:
        usual = next((row.compared for row in rows if row.compared), ())
        table = [["suite", *run.models, f"change {' → '.join(usual)} (95 % interval)" if usual else "change"]]
        for row in rows:
            scores = [words.with_interval(score, row.share) if score else "–" for score in row.scores]
            others = "" if row.compared in (None, usual) else f"   ({' → '.join(row.compared)})"
            table.append([f"{row.suite}/{row.split}", *scores, words.change(row.change, row.share) + others])
        lines += [*_aligned(table), ""]
    gate = run.final_gate
    if gate is not None:
        lines.append(f"gate      {words.verdict_of(gate.verdict)}: {gate.verdict.get('reason', '')}".rstrip(": "))
    if run.registered:
        named = f"{run.registered.get('name')} v{run.registered.get('version')}"
        lines.append(f"registry  {named}{words.alias_of(run.registered, ' → {}')}")
    return "\n".join([*lines, headline(run)])


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
