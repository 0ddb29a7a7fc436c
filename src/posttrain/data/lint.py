"""Lint a stage's data: run the rules, count, refuse above their thresholds, and write the set without the offenders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.datasets import DatasetKeys
from posttrain.config.schema import did_you_mean_or_one_of
from posttrain.config.stages import ExampleKeys, TrainKeys
from posttrain.data.dataset import Dataset, sequences
from posttrain.data.lint_input import GOLD_ROWS, LintInput
from posttrain.data.lint_rules import RULES, Action, Offence
from posttrain.data.load import read_nouns
from posttrain.data.opened import read_rows
from posttrain.data.rows import MappedRows
from posttrain.errors import ConfigError, DataError
from posttrain.files import write_atomic, write_json
from posttrain.types import Origin, Prompt

_FIRST = 3


@dataclass(frozen=True, slots=True)
class LintFinding:
    """One rule that fired. `offences` are all its rows with what is wrong with each."""

    rule: str
    meaning: str
    count: int
    share: float
    action: Action
    limit: float
    removable: bool
    offences: tuple[Offence, ...]

    @property
    def refuses(self) -> bool:
        return self.action == "refuse" and self.share > self.limit

    def line(self) -> str:
        first = "; ".join(f"{origin} {detail}" for origin, detail in self.offences[:_FIRST])
        limit = f", refused above {100 * self.limit:g}%" if self.action == "refuse" else ""
        return f"{self.rule}: {self.count:,} rows ({self.share:.1%}{limit}): {self.meaning}: {first}"


@dataclass(frozen=True, slots=True)
class LintReport:
    findings: tuple[LintFinding, ...]
    num_rows: int

    @property
    def refused(self) -> bool:
        return any(finding.refuses for finding in self.findings)

    @property
    def removable(self) -> dict[Origin, list[str]]:
        """Rows that `write_clean` takes out, each with why."""
        rows: dict[Origin, list[str]] = {}
        for finding in self.findings:
            for origin, detail in finding.offences if finding.removable else ():
                rows.setdefault(origin, []).append(f"{finding.rule}: {detail}")
        return rows

    def notes(self) -> list[str]:
        """What is worth knowing; what refuses the data is said by `raise_if_refused`."""
        return [finding.line() for finding in self.findings if not finding.refuses]

    def raise_if_refused(self) -> None:
        """Raises: DataError listing the rules above their threshold."""
        bad = [finding.line() for finding in self.findings if finding.refuses]
        if bad:
            advice = "fix the rows, or write a clean set with `posttrain data CONFIG --write-clean DIR`, or change a limit under `lint:`"
            one = f"the data is refused: {bad[0]}; {advice}"
            raise DataError(one if len(bad) == 1 else "\n".join(["the data is refused:", *bad, advice]))

    def to_json(self) -> dict[str, Any]:
        rows = [
            {
                "rule": f.rule,
                "meaning": f.meaning,
                "count": f.count,
                "share": f.share,
                "action": f.action,
                "limit": f.limit,
                "refuses": f.refuses,
                "first": [f"{origin}: {detail}" for origin, detail in f.offences[:_FIRST]],
            }
            for f in self.findings
        ]
        return {"num_rows": self.num_rows, "refused": self.refused, "findings": rows}


@dataclass(frozen=True, slots=True)
class RuleLimit:
    """What is done about a rule: `action` above a share of `limit` of the rows."""

    action: Action
    limit: float


def limits_of(changes: Mapping[str, Mapping[str, Any]]) -> dict[str, RuleLimit]:
    """The limits of every rule that is on, with the changes of the key `lint`: rule → {`limit`, `action`}.

    A limit alone refuses above it. Raises: ConfigError for an unknown rule, key, action or limit.
    """
    for name, change in changes.items():
        if name not in RULES:
            raise ConfigError(f"lint.{name}: no such rule{did_you_mean_or_one_of(name, RULES)}")
        if unknown := [key for key in change if key not in ("limit", "action")]:
            raise ConfigError(
                f"lint.{name}.{unknown[0]}: no such key{did_you_mean_or_one_of(unknown[0], ('limit', 'action'))}"
            )
        action, limit = change.get("action", "refuse"), change.get("limit", 0.0)
        if action not in ("warn", "refuse", "off"):
            raise ConfigError(f"lint.{name}.action: got {action!r}, expected warn, refuse or off")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit <= 1:
            raise ConfigError(f"lint.{name}.limit: got {limit!r}, expected a share of the rows from 0 to 1")
    limits = {}
    for name, rule in RULES.items():
        change = changes.get(name, {})
        action = change.get("action", "refuse" if "limit" in change else rule.action)
        if action != "off":
            limits[name] = RuleLimit(action, float(change.get("limit", rule.limit)))
    return limits


def lint(given: LintInput, changes: Mapping[str, Mapping[str, Any]] | None = None) -> LintReport:
    """Run every rule of the stage that is on. `changes` are those of the key `lint`. Raises: ConfigError."""
    limits = limits_of(changes or {})
    num_rows = given.num_rows
    findings = []
    for name, rule in RULES.items():
        if given.row_kind not in rule.rows or name not in limits:
            continue
        offences = tuple(dict(rule.check(given)).items())
        share = len(offences) / max(1, num_rows if rule.looks_at is None else len(rule.looks_at(given)))
        row = limits[name]
        if offences and (row.action == "refuse" or share > row.limit):
            finding = LintFinding(
                name, rule.meaning, len(offences), share, row.action, row.limit, rule.removable, offences
            )
            findings.append(finding)
    return LintReport(tuple(findings), num_rows)


def lint_stage(
    keys: TrainKeys,
    tokenizer: Any,
    dataset: Dataset[Any],
    *,
    suites: Mapping[str, Sequence[str]] | None = None,
    check_golds: Callable[[Sequence[Prompt]], Sequence[str | None]] | None = None,
    gold_rows: int | None = GOLD_ROWS,
    own_template: str | None = None,
) -> LintReport:
    """Lint what a stage would train on: `dataset` is what its loader gave for `keys`. Raises: DataError, ConfigError."""
    skipped: dict[str, list[Origin]] = {}
    for source in dataset.summary.sources:
        for reason, rows in source.skipped.items():
            skipped.setdefault(reason, []).extend(Origin(source.path, line) for line in rows.lines)
    return lint(
        LintInput(
            row_kind=keys.row_kind,
            nouns=read_nouns(keys.datasets, keys.row_kind, keys.rows_looked_at),
            rendered=MappedRows(dataset.rows, sequences),
            tokenizer=tokenizer,
            sequence_len=keys.sequence_len,
            train_on=keys.train_on if isinstance(keys, ExampleKeys) else "assistant",
            eval_nouns=read_nouns(keys.eval_datasets, keys.row_kind),
            suites=suites or {},
            skipped=skipped,
            check_golds=check_golds,
            gold_rows=gold_rows,
            own_template=own_template,
        ),
        keys.lint,
    )


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A source written without its offenders."""

    source: str
    path: Path
    num_kept: int
    num_removed: int


def write_clean(report: LintReport, sources: Sequence[DatasetKeys], folder: Path) -> list[Cleaned]:
    """Write each source as JSONL (columns as in the file) without the removable rows, and `removed.json`.

    Raises: DataError if nothing would be left of a source.
    """
    removable = report.removable
    written: list[tuple[Cleaned, str]] = []
    removed: dict[str, list[str]] = {}
    for number, source in enumerate(sources, start=1):
        rows = read_rows(source.model_copy(update={"columns": {}, "prompt_format": []}))
        kept = [row for origin, row in rows if origin not in removable]
        if not kept:
            raise DataError(
                f"{source.path}: lint would take out all {len(rows)} rows; expected some to be left; look at the data"
            )
        removed |= {str(origin): removable[origin] for origin, _ in rows if origin in removable}
        stem = Path(source.path).stem
        taken = {cleaned.path.name for cleaned, _ in written}
        name = f"{stem}.jsonl" if f"{stem}.jsonl" not in taken else f"{stem}-{number}.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept)
        written.append((Cleaned(source.path, Path(folder) / name, len(kept), len(rows) - len(kept)), text))
    for cleaned, text in written:
        write_atomic(cleaned.path, text)
    write_json(Path(folder) / "removed.json", {"report": report.to_json(), "removed": removed})
    return [cleaned for cleaned, _ in written]
