"""The rules applied to recorded runs, and what that says of them: detection, delay, false alarms, with exact intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cases import HEALTHY, Case
from scipy.stats import beta

from posttrain.health.monitor import Monitor
from posttrain.health.rules import rules_for
from posttrain.types import Severity, StepReport

DOC = Path(__file__).resolve().parents[2] / "docs" / "failure-modes.md"
START, END = "<!-- detection: start -->", "<!-- detection: end -->"
STOPPED = "the loop itself"
"""Where a run ends with an error before its last step, without any rule."""
TITLES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO"}


def interval(count: int, number: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a proportion."""
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(beta.ppf(tail, count, number - count + 1))
    high = 1.0 if count == number else float(beta.ppf(1 - tail, count + 1, number - count))
    return low, high


def fired(run: Mapping[str, Any]) -> dict[str, int]:
    """Rule → the first step at which it fires, with default thresholds; `info` rows report no fault."""
    monitor = Monitor(run["kind"], [rule for rule in rules_for(run["kind"]) if rule.severity is not Severity.INFO])
    found: dict[str, int] = {}
    for report in run["reports"]:
        metrics = {name: float(value) for name, value in report.items() if name != "step"}
        for finding in monitor.observe(StepReport(int(report["step"]), metrics)):
            found.setdefault(finding.rule, finding.step)
    if run["ended"] != "done" and not found:
        found[STOPPED] = int(run["reports"][-1]["step"]) + 1 if run["reports"] else 1
    return found


def judged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Per kind and case: seeds, the steps at which each rule fired, and the longest run in seconds."""
    cases: dict[str, dict[str, Any]] = {}
    for run in runs:
        row = cases.setdefault(
            f"{run['kind']}/{run['case']}", {"seeds": [], "first": [], "rules": {}, "longest_s": 0.0}
        )
        found = fired(run)
        row["seeds"].append(run["seed"])
        row["first"].append(min(found.values()) if found else None)
        for rule, step in found.items():
            row["rules"].setdefault(rule, []).append(step)
        row["longest_s"] = max(row["longest_s"], run["wall_s"])
    return {"cases": cases, "thresholds": thresholds()}


def thresholds() -> dict[str, dict[str, float]]:
    return {rule.name: dict(rule.thresholds) for kind in TITLES for rule in rules_for(kind)}


def share(count: int, number: int) -> str:
    low, high = interval(count, number)
    return f"{count}/{number} ({100 * low:.0f}–{100 * high:.0f} %)"


def render(result: Mapping[str, Any], tuned: Mapping[str, Any], faults: Sequence[Case]) -> str:
    """`tuned` is the result on the tuning seeds: its healthy runs are shown beside those of `result`."""
    cases, before = result["cases"], tuned.get("cases", {})
    lines = [
        "| stage | fault | what was done | seen by any rule | delay | by rule: runs @ median step |",
        "|" + "---|" * 6,
    ]
    lines += [fault_line(case, row) for case in faults if (row := cases.get(f"{case.kind}/{case.name}"))]
    lines += ["", "| stage | healthy runs with any alarm | by rule | on the tuning seeds |", "|" + "---|" * 4]
    keys = [f"{kind}/{HEALTHY}" for kind in TITLES]
    lines += [healthy_line(key.split("/")[0], cases[key], before.get(key)) for key in keys if key in cases]
    lines += ["", *per_rule(cases)]
    return "\n".join(lines)


def fault_line(case: Case, row: Mapping[str, Any]) -> str:
    number, seen = len(row["seeds"]), [step for step in row["first"] if step is not None]
    delay = f"{statistics.median(seen):.0f}" if seen else "–"
    order = sorted(row["rules"].items(), key=lambda item: (-len(item[1]), statistics.median(item[1])))
    rules = ", ".join(f"{_name(rule)} {len(steps)}/{number} @ {statistics.median(steps):.0f}" for rule, steps in order)
    cells = [TITLES[case.kind], case.name, case.what, share(len(seen), number), delay, rules or "**none**"]
    return "| " + " | ".join(cells) + " |"


def healthy_line(kind: str, row: Mapping[str, Any], tuned: Mapping[str, Any] | None) -> str:
    rules = ", ".join(f"{_name(rule)} {len(steps)}" for rule, steps in sorted(row["rules"].items()))
    cells = [TITLES[kind], alarms(row), rules or "none", alarms(tuned) if tuned else "–"]
    return "| " + " | ".join(cells) + " |"


def alarms(row: Mapping[str, Any]) -> str:
    return share(sum(step is not None for step in row["first"]), len(row["seeds"]))


def per_rule(cases: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Each rule's false alarms over the healthy runs of its stages, and what it saw."""
    lines = ["| rule | false alarms, healthy runs | faults it saw in at least half of the runs |", "|---|---|---|"]
    for name in thresholds():
        kinds = [
            kind for kind in TITLES if name in {r.name for r in rules_for(kind) if r.severity is not Severity.INFO}
        ]
        rows = [cases[key] for kind in kinds if (key := f"{kind}/{HEALTHY}") in cases]
        if not rows:
            continue
        count = sum(len(row["rules"].get(name, ())) for row in rows)
        saw = [
            f"{TITLES[key.split('/')[0]]} {key.split('/', 1)[1]}"
            for key, row in cases.items()
            if not key.endswith(HEALTHY) and 2 * len(row["rules"].get(name, ())) >= len(row["seeds"])
        ]
        lines.append(f"| `{name}` | {share(count, sum(len(row['seeds']) for row in rows))} | {', '.join(saw) or '–'} |")
    return lines


def write_doc(text: str) -> None:
    page = DOC.read_text()
    head, rest = page.split(START, 1)
    DOC.write_text(f"{head}{START}\n{text}\n{END}{rest.split(END, 1)[1]}")


def _name(rule: str) -> str:
    return rule if rule == STOPPED else f"`{rule}`"
