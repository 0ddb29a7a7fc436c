"""Reads a run folder into plain values. Parts that are absent are empty; parts that are broken are named in `problems`.

Knows the layout of a run, and nothing of how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from posttrain.errors import DataError
from posttrain.evidence import EvalReport, TestResult
from posttrain.files import read_json, read_json_lines
from posttrain.report.steps import LoggedSteps
from posttrain.tracking.jsonl import read_jsonl

T = TypeVar("T")
EvalKey = tuple[str, str]
"""Suite and split."""


@dataclass(frozen=True, slots=True)
class StageRecord:
    """One attempt at one stage. `name` is its folder's name and its models' name in `evals/`."""

    name: str
    kind: str
    status: str
    attempt: int
    wall_s: float | None
    tokens: int | None
    steps: int | None
    entry: Mapping[str, Any]
    result: Mapping[str, Any]
    data: Mapping[str, Any]
    lint: Mapping[str, Any]
    metrics: LoggedSteps
    events: tuple[Mapping[str, Any], ...]
    samples: tuple[Mapping[str, Any], ...]

    @property
    def findings(self) -> list[Mapping[str, Any]]:
        return [event for event in self.events if event.get("kind") in ("finding", "rollback")]

    @property
    def actions(self) -> list[Mapping[str, Any]]:
        """What was changed because of findings, in order."""
        return [event for event in self.events if event.get("kind") in ("action", "rollback")]


@dataclass(frozen=True, slots=True)
class GateRecord:
    """A verdict as it was stored, and after which stage (or `final`)."""

    id: str
    after: str
    verdict: Mapping[str, Any]
    spec: Mapping[str, Any]
    look: int | None = None


@dataclass(frozen=True, slots=True)
class RunRecord:
    folder: Path
    name: str
    status: str
    stages: tuple[StageRecord, ...]
    evals: Mapping[str, Mapping[EvalKey, EvalReport]]
    gates: tuple[GateRecord, ...]
    config_text: str
    config: Mapping[str, Any]
    pins: Mapping[str, Any]
    registered: Mapping[str, Any] | None
    certificates: Mapping[str, Mapping[str, Any]]
    problems: tuple[str, ...] = field(default=())

    @property
    def models(self) -> list[str]:
        """Models that were evaluated: what the last verdict was against, other models from before the run, then the stages'."""
        stages = {stage.name: place for place, stage in enumerate(self.stages)}
        known = stages | {"base": -2} | dict.fromkeys(self._judged("baseline_digest"), -3)
        return sorted(self.evals, key=lambda name: (known.get(name, -1), name))

    def compared(self, key: EvalKey) -> tuple[str, str] | None:
        """The two models between which a suite's change is shown: those of the last verdict, where both were evaluated on it.

        Else the first of `models`, and the last stage's. None if there is only one.
        """
        present = [model for model in self.models if key in self.evals[model]]
        judged = [model for model in self._judged("candidate_digest") if model in present]
        stages = [stage.name for stage in self.stages if stage.name in present]
        last = [*present, *stages, *judged][-1]
        return None if last == present[0] else (present[0], last)

    def _judged(self, side: str) -> list[str]:
        """Models that are the candidate or the baseline of the last verdict, by digest."""
        digest = self.final_gate.verdict.get(side) if self.final_gate is not None else None
        return sorted(
            name for name, suites in self.evals.items() if digest in {r.model_digest for r in suites.values()}
        )

    @property
    def suites(self) -> list[EvalKey]:
        """In the order of the config, others after it by name."""
        found = {key for model in self.models for key in self.evals[model]}
        order = {name: place for place, name in enumerate(as_mapping(self.config.get("evals")))}
        return sorted(found, key=lambda key: (order.get(key[0], len(order)), key))

    @property
    def final_gate(self) -> GateRecord | None:
        """The last verdict that was reached."""
        final = [gate for gate in self.gates if gate.after == "final"]
        return (final or list(self.gates) or [None])[-1]


def read_run(folder: Path, *, with_metrics: bool = True) -> RunRecord:
    """Without metrics for who reads them as they grow (`report/series.py`). Raises: DataError if `folder` does not look like a run at all."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("pipeline.json", "stages", "config.yaml", "metrics.jsonl")):
        raise DataError(
            f"{folder} is not a run folder (got neither pipeline.json, stages/ nor config.yaml); give the folder that `posttrain run` printed"
        )
    problems: list[str] = []
    pipeline = as_mapping(_try(folder / "pipeline.json", read_json, {}, problems))
    config_text = _try(folder / "config.yaml", lambda path: path.read_text(errors="replace"), "", problems)
    return RunRecord(
        folder=folder,
        name=str(pipeline.get("name") or folder.resolve().name),
        status=str(pipeline.get("status") or "unknown"),
        stages=_stages(folder, pipeline, problems, with_metrics),
        evals=_evals(folder, problems),
        gates=_gates(folder, pipeline, problems),
        config_text=config_text,
        config=as_mapping(
            _try(folder / "config.yaml", lambda path: yaml.safe_load(path.read_text(errors="replace")), {}, problems)
        ),
        pins=as_mapping(pipeline.get("pins")),
        registered=_registered(pipeline.get("registered")),
        certificates=_certificates(folder, problems),
        problems=tuple(problems),
    )


def _certificates(folder: Path, problems: list[str]) -> dict[str, Mapping[str, Any]]:
    """Stage → the certificate it was started on; under the run's own name what `posttrain rewards check` left."""
    paths = [folder / "certificate.json", *sorted((folder / "stages").glob("*/certificate.json"))]
    found = {path.resolve().parent.name: as_mapping(_try(path, read_json, {}, problems)) for path in paths}
    return {name: record for name, record in found.items() if record}


def _stages(
    folder: Path, pipeline: Mapping[str, Any], problems: list[str], with_metrics: bool
) -> tuple[StageRecord, ...]:
    """Those the pipeline lists; without a list, those that have a folder; at last the run folder itself."""
    listed = _objects(pipeline.get("stages"))
    if not listed:
        listed = [{"folder": f"stages/{path.name}"} for path in sorted((folder / "stages").glob("*")) if path.is_dir()]
    if not listed and (folder / "metrics.jsonl").exists():
        listed = [{"folder": "."}]
    return tuple(_stage(folder, entry, problems, with_metrics) for entry in listed)


def _stage(folder: Path, entry: Mapping[str, Any], problems: list[str], with_metrics: bool) -> StageRecord:
    where = folder / str(entry.get("folder") or "missing")
    name = where.resolve().name
    result = as_mapping(_try(where / "result.json", read_json, {}, problems))
    tail = name.split("-", 1)[-1]
    read = partial(_logged_steps, problems=problems)
    metrics = _try(where / "metrics.jsonl", read, LoggedSteps(), problems) if with_metrics else LoggedSteps()
    return StageRecord(
        name=name,
        kind=str(entry.get("kind") or result.get("kind") or tail),
        status=str(entry.get("status") or ("done" if result else "unfinished")),
        attempt=attempt if isinstance(attempt := entry.get("attempt"), int) else 1,
        wall_s=_first(entry, result, "wall_s"),
        tokens=_first(entry, result, "tokens"),
        steps=_first(entry, result, "steps") or (int(metrics[-1]["step"]) if metrics else None),
        entry=entry,
        result=result,
        data=as_mapping(_try(where / "summary.json", read_json, {}, problems)),
        lint=as_mapping(_try(where / "lint.json", read_json, {}, problems)),
        metrics=metrics,
        events=tuple(_try(where / "events.jsonl", read_jsonl, [], problems)),
        samples=tuple(_try(where / "samples.jsonl", read_jsonl, [], problems)),
    )


def _logged_steps(path: Path, problems: list[str]) -> LoggedSteps:
    def rows() -> Iterator[Mapping[str, Any]]:
        for line, row in read_json_lines(path, growing=True):
            if type(row.get("step")) is int:
                yield row
            else:
                problems.append(f"{path.name}:{line} in {path.parent.name}/ is no logged step and is left out")

    return LoggedSteps(rows())


def _evals(folder: Path, problems: list[str]) -> dict[str, dict[EvalKey, EvalReport]]:
    found: dict[str, dict[EvalKey, EvalReport]] = {}
    # A name with a dot is a folder that a killed process had not finished writing.
    for path in sorted((folder / "evals").glob("*/[!.]*/report.json")):
        report = _try(path, lambda path: EvalReport.load(path.parent), None, problems)
        if report is not None and report.items:
            found.setdefault(path.parent.parent.name, {})[report.suite, report.split] = report
    return found


def _gates(folder: Path, pipeline: Mapping[str, Any], problems: list[str]) -> tuple[GateRecord, ...]:
    entries = _objects(pipeline.get("gates"))
    if not entries:
        entries = [
            {"folder": f"gates/{path.parent.name}", "after": path.parent.name}
            for path in sorted((folder / "gates").glob("*/verdict.json"))
        ]
    gates: list[GateRecord] = []
    decided: dict[Any, list[Mapping[str, Any]]] = {}
    for line in _try(folder / "decisions.jsonl", read_jsonl, [], problems):
        decided.setdefault(line.get("verdict_digest"), []).append(line)
    for entry in entries:
        where = folder / str(entry.get("folder") or "missing")
        verdict = as_mapping(_try(where / "verdict.json", read_json, {}, problems)) or {
            "verdict": entry.get("verdict"),
            "tests": [],
        }
        verdict = {"reason": "", **verdict, "tests": [_test(test) for test in _objects(verdict.get("tests"))]}
        if said := decided.get(verdict.get("digest")):
            verdict |= _decided(verdict, said)
        if verdict.get("verdict"):
            gates.append(
                GateRecord(
                    where.name,
                    str(entry.get("after", "")),
                    verdict,
                    as_mapping(_try(where / "spec.json", read_json, {}, problems)),
                    as_mapping(_try(where / "evidence.json", read_json, {}, problems)).get("look"),
                )
            )
    return tuple(gates)


def _decided(verdict: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The verdict as people decided it, with what the gate had said; a PASS that they approve stays one."""
    rejected = [decision for decision in decisions if not decision.get("accepted")]
    by = "; ".join(f"{decision.get('by')}: {decision.get('reason')}" for decision in rejected or decisions)
    if verdict.get("verdict") == "PASS" and not rejected:
        return {"reason": f"{verdict['reason']}; approved by {by}"}
    said = f"by {by}; the gate said {verdict.get('verdict')}, {verdict['reason']}"
    return {"verdict": "REJECTED" if rejected else "ACCEPTED", "reason": said}


def _registered(entry: Any) -> Mapping[str, Any] | None:
    return {"name": "–", "version": "–", "alias": "–", **entry} if isinstance(entry, Mapping) else None


def _test(test: Any) -> Mapping[str, Any]:
    """A test of a verdict with every field there is, None where it was not stored."""
    return {field.name: as_mapping(test).get(field.name) for field in fields(TestResult)}


def _try(path: Path, read: Callable[[Path], T], absent: T, problems: list[str]) -> T:
    if not path.exists():
        return absent
    try:
        return read(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"{path.name} in {path.parent.name}/ could not be read: {_one_line(error)}")
        return absent


def _one_line(error: BaseException) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at line {error.lineno}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def as_mapping(value: Any) -> Mapping[str, Any]:
    """A JSON object of a record; empty where something else stands there."""
    return value if isinstance(value, Mapping) else {}


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The objects of a list in a record, what is none being empty; none where something else stands there."""
    return [as_mapping(one) for one in value] if isinstance(value, list) else []


def _first(entry: Mapping[str, Any], result: Mapping[str, Any], name: str) -> Any:
    return entry[name] if entry.get(name) is not None else result.get(name)
