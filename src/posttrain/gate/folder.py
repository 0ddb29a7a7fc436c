"""A verdict on disk: what was asked, what was decided, and which stored items it follows from.

`spec.json`, `verdict.json`, and `evidence.json` with the report folders (relative paths) and their digests, so that
anyone can recompute the verdict without a model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import GateError
from posttrain.evidence import EvalReport, GateVerdict, TestResult, Verdict
from posttrain.files import read_record, write_folder, write_json
from posttrain.gate.decide import decide
from posttrain.gate.spec import GateSpec

_NUMBERS = ("baseline_mean", "candidate_mean", "estimate", "low", "high", "bound", "line", "p_value")

_GO_ON = "put a copy of it back, or move {folder} away and judge again: the verdict follows from the stored items"


def load_reports(folder: Path, split: str) -> dict[str, tuple[Path, EvalReport]]:
    """Every eval report at or below `folder` that is on `split`, by suite.

    Raises: GateError if there is none, a report does not match its items, or a suite has two.
    """
    folder = Path(folder)
    found: dict[str, tuple[Path, EvalReport]] = {}
    other_splits: set[str] = set()
    for path in sorted(folder.rglob("report.json")):
        if not (path.parent / "items.jsonl").exists():
            continue
        report = _load_report(path.parent)
        if report.split != split:
            other_splits.add(report.split)
            continue
        if report.suite in found:
            raise GateError(
                f"{path.parent} and {found[report.suite][0]} are both on suite {report.suite!r}: name one of them"
            )
        found[report.suite] = (path.parent, report)
    if not found:
        has = f" (found split {', '.join(sorted(other_splits))})" if other_splits else ""
        raise GateError(
            f"{folder}: got no eval report on split {split!r}{has}, expected <suite>/report.json with items.jsonl"
        )
    return found


def save_verdict(
    folder: Path,
    verdict: GateVerdict,
    spec: GateSpec,
    candidate: Mapping[str, Path],
    baseline: Mapping[str, Path],
    *,
    look: int = 1,
) -> None:
    """Write `folder`, all or nothing; `candidate` and `baseline` are the report folders by suite."""
    base = Path(folder).resolve()
    sides = {"candidate": candidate, "baseline": baseline}
    evidence = {
        "look": look,
        "reports": {
            suite: {
                side: {"path": os.path.relpath(Path(paths[suite]).resolve(), base), "digest": digests[place]}
                for place, (side, paths) in enumerate(sides.items())
            }
            for suite, digests in verdict.report_digests.items()
        },
    }

    def fill(temporary: Path) -> None:
        write_json(temporary / "spec.json", spec.to_json())
        write_json(temporary / "verdict.json", verdict.to_json() | {"digest": verdict.digest})
        write_json(temporary / "evidence.json", evidence)

    write_folder(folder, fill)


def load_verdict(folder: Path) -> GateVerdict:
    """Raises: GateError if the file is missing or is not what was written."""
    path = Path(folder) / "verdict.json"
    if not path.exists():
        raise GateError(f"{path}: no verdict here; `posttrain gate A B --spec … --out {folder}` writes one")
    verdict, expected = read_record(path, _verdict_and_digest, _GO_ON.format(folder=folder))
    if verdict.digest != expected:
        why = f"has been changed (got {verdict.digest}, expected {expected})"
        raise GateError(f"{path}: {why}; {_GO_ON.format(folder=folder)}")
    return verdict


def _verdict_and_digest(record: dict[str, Any]) -> tuple[GateVerdict, str]:
    expected = record.pop("digest")
    return verdict_from_json(record), expected


def load_spec(folder: Path) -> GateSpec:
    """Raises: DamagedFileError."""
    return read_record(Path(folder) / "spec.json", _spec, _GO_ON.format(folder=folder))


def _spec(record: Mapping[str, Any]) -> GateSpec:
    try:
        return GateSpec.from_mapping(record)
    except GateError as error:  # of a file that was written whole: it names no file of its own
        raise ValueError(str(error)) from error


def load_evidence(folder: Path) -> dict[str, Any]:
    """Which look it was, and where the reports are. Raises: DamagedFileError."""

    def checked(record: dict[str, Any]) -> dict[str, Any]:
        return {"look": int(record["look"]), "reports": dict(record["reports"])}

    return read_record(Path(folder) / "evidence.json", checked, _GO_ON.format(folder=folder))


def recompute(folder: Path) -> GateVerdict:
    """Decide again from the stored items alone. Raises: GateError if they changed or the verdict differs."""
    folder = Path(folder)
    stored, spec = load_verdict(folder), load_spec(folder)
    evidence = load_evidence(folder)
    sides: dict[str, dict[str, EvalReport]] = {"candidate": {}, "baseline": {}}
    for suite, entry in evidence["reports"].items():
        for side, reports in sides.items():
            path = (folder.resolve() / entry[side]["path"]).resolve()
            report = _load_report(path)
            if report.digest != entry[side]["digest"]:
                raise GateError(f"{path}: got {report.digest}, expected {entry[side]['digest']}: not what was judged")
            reports[suite] = report
    again = decide(spec, sides["candidate"], sides["baseline"], look=evidence["look"])
    if again.digest != stored.digest:
        raise GateError(
            f"{folder}: recomputed {again.verdict.value} ({again.reason}), stored {stored.verdict.value} ({stored.reason})"
        )
    return again


def verdict_from_json(record: Mapping[str, Any]) -> GateVerdict:
    """The inverse of `GateVerdict.to_json`; a null number is NaN."""
    fields = dict(record)
    fields["verdict"] = Verdict(fields["verdict"])
    fields["tests"] = tuple(_test_from_json(test) for test in fields["tests"])
    fields["report_digests"] = {suite: (pair[0], pair[1]) for suite, pair in fields["report_digests"].items()}
    return GateVerdict(**fields)


def _test_from_json(record: Mapping[str, Any]) -> TestResult:
    fields = dict(record)
    fields["verdict"] = Verdict(fields["verdict"])
    fields.update({name: float("nan") for name in _NUMBERS if fields[name] is None})
    if fields["discordant"] is not None:
        fields["discordant"] = tuple(fields["discordant"])
    return TestResult(**fields)


def _load_report(folder: Path) -> EvalReport:
    try:
        return EvalReport.load(folder)
    except FileNotFoundError as error:
        raise GateError(f"{folder}: the eval report is gone ({error.filename}), so nothing can be judged") from error
    except (ValueError, TypeError, KeyError) as error:
        raise GateError(f"{folder}: not a readable eval report: {error}") from error
