"""What was checked before training, in words: the data of each stage, and the rewards. Pure: records in, rows of text out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.report import words
from posttrain.report.records import RunRecord, as_mapping

_KINDS = {
    "E": "right answer rewritten",
    "Z": "wrong answer dressed up",
    "N": "to be survived",
    "A": "attack on a model's opinion",
}
_CERTIFIED = {
    "pass": "The rewards passed: right answers earn the full reward, and nothing that was tried fooled them.",
    "partial": "The rewards passed as far as they could be checked: there were no reference answers to tell right from wrong by.",
    "fail": "The rewards did not pass.",
}


@dataclass(frozen=True, slots=True)
class DataRow:
    """One source of one stage. `left_out` gives counts by reason."""

    stage: str
    source: str
    format: str
    rows_read: int | None
    rows_kept: int | None
    tokens: int | None
    loss_tokens: int | None
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LintRow:
    stage: str
    rule: str
    meaning: str
    count: int
    share: float
    limit: str
    refused: bool
    first: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CertificateView:
    """`measures` are (what, measured, wanted); `mutations` (name, kind, texts, violations, example)."""

    stage: str
    verdict: str
    sentence: str
    measures: tuple[tuple[str, str, str], ...]
    mutations: tuple[tuple[str, str, str, int, str], ...]
    failures: tuple[str, ...]
    warnings: tuple[str, ...]


def data_rows(run: RunRecord) -> list[DataRow]:
    return [
        _data_row(stage.name, source)
        for stage in run.stages
        for dataset in _records(stage.data.get("datasets"))
        for source in _records(dataset.get("sources"))
    ]


def _data_row(stage: str, source: Mapping[str, Any]) -> DataRow:
    skipped = source.get("skipped")
    reasons = [
        f"{words.count(entry.get('count'))} {reason}"
        for reason, entry in (skipped.items() if isinstance(skipped, Mapping) else ())
        if isinstance(entry, Mapping)
    ]
    return DataRow(
        stage=stage,
        source=str(source.get("path", "")),
        format=str(source.get("format", "")).split(" (")[0],
        rows_read=source.get("rows_read"),
        rows_kept=source.get("rows_kept"),
        tokens=source.get("tokens"),
        loss_tokens=source.get("loss_tokens"),
        left_out=tuple(reasons),
    )


def lint_rows(run: RunRecord) -> list[LintRow]:
    """Findings of every stage, those that refuse first."""
    rows = [_lint_row(stage.name, found) for stage in run.stages for found in _records(stage.lint.get("findings"))]
    return sorted(rows, key=lambda row: not row.refused)


def _lint_row(stage: str, found: Mapping[str, Any]) -> LintRow:
    refuses = found.get("action") == "refuse"
    return LintRow(
        stage=stage,
        rule=str(found.get("rule", "")),
        meaning=str(found.get("meaning", "")),
        count=int(found.get("count") or 0),
        share=float(found.get("share") or 0.0),
        limit=f"refused above {100 * float(found.get('limit') or 0.0):g} %" if refuses else "only said",
        refused=bool(found.get("refuses")),
        first=tuple(map(str, found.get("first") or ())),
    )


def certificate_views(run: RunRecord) -> list[CertificateView]:
    return [_certificate(stage, record) for stage, record in run.certificates.items()]


def _certificate(stage: str, record: Mapping[str, Any]) -> CertificateView:
    verdict = str(record.get("verdict") or "unknown")
    config = as_mapping(record.get("config"))
    on = f"Tried on {words.count(_number(config.get('num_cases')))} prompts and {words.count(_number(config.get('num_samples')))} answers of the starting model."
    mutations = _records(record.get("mutations"))
    return CertificateView(
        stage=stage,
        verdict=verdict,
        sentence=f"{_CERTIFIED.get(verdict, '')} {on if config else ''}".strip(),
        measures=tuple(_measures(as_mapping(record.get("measures")), as_mapping(config.get("thresholds")), mutations)),
        mutations=tuple(_mutation(row) for row in mutations),
        failures=tuple(map(str, record.get("failures") or ())),
        warnings=tuple(map(str, record.get("warnings") or ())),
    )


def _mutation(row: Mapping[str, Any]) -> tuple[str, str, str, int, str]:
    kind = str(row.get("kind", ""))
    return (
        str(row.get("name", "")),
        _KINDS.get(kind, kind),
        words.count(_number(row.get("num"))),
        int(row.get("violations") or 0),
        str(row.get("example") or ""),
    )


def _measures(
    measures: Mapping[str, Any], limits: Mapping[str, Any], mutations: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """The lines that a reader asks for; what was not measured is left out."""
    value = {name: number for name, raw in measures.items() if (number := _number(raw)) is not None}
    rows: list[tuple[str, str, str]] = []
    if "recall" in value:
        rows.append(("right answers that earn the full reward", _share(value["recall"]), _at_least(limits, "recall")))
    for kind in _KINDS:
        tried = [row for row in mutations if row.get("kind") == kind]
        if tried:
            texts, bad = (sum(int(row.get(name) or 0) for row in tried) for name in ("num", "violations"))
            rows.append((_TRIED[kind], f"{bad} of {texts} texts, {len(tried)} kinds", _FEW.get(kind, "0")))
    if "auc" in value:
        wanted = f"at least {limits['auc']}" if "auc" in limits else ""
        rows.append(("right told from wrong (area under the curve)", f"{value['auc']:.3f}", wanted))
    policies = {name.split(": ", 1)[1]: number for name, number in value.items() if name.startswith("policy: ")}
    if policies:
        best = max(policies, key=lambda name: policies[name])
        rows.append(("best answer that does not read the question", f"{policies[best]:.3g} ({best})", "low"))
    if "determinism differences" in value:
        rows.append(("scores that changed when asked again", f"{value['determinism differences']:.0f}", "0"))
    times = [name for name in ("latency_p50_s", "latency_p99_s", "latency_max_s") if name in value]
    if times:
        shown = " / ".join(f"{1000 * value[name]:.3g}" for name in times)
        names = " / ".join(
            {"latency_p50_s": "median", "latency_p99_s": "p99", "latency_max_s": "longest"}[n] for n in times
        )
        rows.append((f"time for one answer, ms ({names})", shown, ""))
    if "kill_wall_s" in value:
        rows.append(("a reward that hangs is killed after", f"{value['kill_wall_s']:.1f} s", ""))
    return rows + _forecast(value)


def _forecast(value: Mapping[str, float]) -> list[tuple[str, str, str]]:
    rows = {
        "forecast: mean_reward": ("forecast: mean reward at the start", "{:.3g}"),
        "forecast: mean_reward_std": ("forecast: spread of rewards within a prompt", "{:.3g}"),
        "forecast: frac_reward_zero_std": ("forecast: prompts that teach nothing, all answers alike", "{:.0%}"),
    }
    return [(text, form.format(value[name]), "") for name, (text, form) in rows.items() if name in value]


_TRIED = {
    "E": "right answers rewritten that lose reward",
    "Z": "wrong answers dressed up that gain reward (false passes)",
    "N": "broken or hostile answers that the rewards did not survive",
    "A": "attacks that a reward model or a judge paid for",
}


_FEW = {"A": "at most 10 % of each kind"}
"""Where an error rate is allowed."""


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def _at_least(limits: Mapping[str, Any], name: str) -> str:
    limit = _number(limits.get(name))
    return "" if limit is None else f"at least {_share(limit)}"


def _number(value: Any) -> float | None:
    """A finite number, else None; infinite measures are stored as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _records(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []
