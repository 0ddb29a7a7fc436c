"""What moved between two runs: pins, keys, the metrics of each stage, and the scores. Pure on two records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from posttrain.files import read_json
from posttrain.report import words
from posttrain.report.intervals import difference_interval
from posttrain.report.records import RunRecord, StageRecord, read_run
from posttrain.report.tables import flatten

# What a clock or the machine decides; two equal runs differ in these.
_NOT_COMPARED = frozenset({"time", "step_time", "tokens_per_second"})
_NOT_COMPARED_PREFIXES = ("time/", "memory")
ABSENT = "(absent)"


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not the same; `a` and `b` as text."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, slots=True)
class StageDiff:
    """A stage in both runs: the first step whose metrics differ (None if none does) and the last values."""

    name: str
    first_difference: int | None
    num_steps: tuple[int, int]
    metrics: tuple[Difference, ...]


@dataclass(frozen=True, slots=True)
class RunDiff:
    a: str
    b: str
    pins: tuple[Difference, ...]
    keys: tuple[Difference, ...]
    stages: tuple[StageDiff, ...]
    scores: tuple[Difference, ...]
    environment: tuple[Difference, ...] = ()

    @property
    def is_empty(self) -> bool:
        moved = any(stage.first_difference is not None or stage.metrics for stage in self.stages)
        return not (self.pins or self.environment or self.keys or self.scores or moved)


def diff_runs(run_a: Path, run_b: Path) -> RunDiff:
    """Raises: DataError if either is no run folder."""
    return compare(read_run(run_a), read_run(run_b))


def compare(a: RunRecord, b: RunRecord) -> RunDiff:
    return RunDiff(
        a=str(a.folder),
        b=str(b.folder),
        pins=tuple(_changes(_pins(a), _pins(b))),
        environment=tuple(_changes(_environment(a.folder), _environment(b.folder))),
        keys=tuple(_changes(_leaves(a.config), _leaves(b.config))),
        stages=tuple(_stages(a.stages, b.stages)),
        scores=tuple(_scores(a, b)),
    )


def comparison_text(diff: RunDiff) -> str:
    """The comparison as text."""
    lines = [f"A  {diff.a}", f"B  {diff.b}"]
    if diff.is_empty:
        return "\n".join([*lines, "", "No pin, key, metric or score differs."])
    lines += _section("Pins that moved", diff.pins, "none: same base, data, rewards, suites and code")
    lines += _section(
        "Environment that moved", diff.environment, "none: same Python, processor and packages, as recorded"
    )
    lines += _section("Keys that differ", diff.keys, "none")
    for stage in diff.stages:
        steps = (
            stage.num_steps[0] if len(set(stage.num_steps)) == 1 else f"{stage.num_steps[0]} and {stage.num_steps[1]}"
        )
        title = f"Stage {stage.name} ({steps} logged steps), metrics {_parting(stage.first_difference)}"
        lines += _section(title, stage.metrics, "last values equal")
    lines += _section("Scores", diff.scores, "equal")
    return "\n".join(lines)


def _parting(first_difference: int | None) -> str:
    if first_difference is None:
        return "equal at every step"
    return (
        f"equal until step {first_difference}, where they part"
        if first_difference > 1
        else "differ from the first step"
    )


def _pins(run: RunRecord) -> dict[str, str]:
    return {name: words.short_digest(value) for name, value in flatten(run.pins)}


def _environment(folder: Path) -> dict[str, str]:
    """What `environment.json` says of Python, the processor, the C compiler and the packages; nothing where it is absent or broken."""
    try:
        record = read_json(folder / "environment.json")
    except (OSError, ValueError):
        return {}
    facts = {
        "python": record.get("python"),
        "machine": record.get("machine"),
        "cpu": record.get("cpu", {}).get("model"),
        "compiler": record.get("compiler"),
    }
    return {name: str(value) for name, value in facts.items()} | record.get("packages", {})


def _section(title: str, changes: Sequence[Difference], none: str) -> list[str]:
    if not changes:
        return ["", f"{title}: {none}"]
    width = max(len(change.name) for change in changes)
    return ["", title, *(f"  {change.name.ljust(width)}  {change.a} → {change.b}" for change in changes)]


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> Iterator[Difference]:
    for name in dict.fromkeys([*a, *b]):
        left, right = a.get(name, ABSENT), b.get(name, ABSENT)
        if left != right:
            yield Difference(name, left, right)


def _leaves(value: Any, prefix: str = "") -> dict[str, str]:
    """Dotted names of every leaf; entries of a list are counted from 1."""
    if isinstance(value, Mapping):
        parts = [(str(name), inner) for name, inner in value.items()]
    elif isinstance(value, list) and any(isinstance(inner, (Mapping, list)) for inner in value):
        parts = [(str(place), inner) for place, inner in enumerate(value, 1)]
    else:
        return {prefix: str(value)}
    return {
        name: text
        for step, inner in parts
        for name, text in _leaves(inner, f"{prefix}.{step}" if prefix else step).items()
    }


def _stages(a: Sequence[StageRecord], b: Sequence[StageRecord]) -> Iterator[StageDiff]:
    theirs = {stage.name: stage for stage in b}
    for stage in a:
        if stage.name in theirs:
            yield _stage(stage, theirs.pop(stage.name))
        else:
            yield StageDiff(stage.name, None, (len(stage.metrics), 0), (Difference("stage", "present", ABSENT),))
    for stage in theirs.values():
        yield StageDiff(stage.name, None, (0, len(stage.metrics)), (Difference("stage", ABSENT, "present"),))


def _stage(a: StageRecord, b: StageRecord) -> StageDiff:
    left, right = _ComparedSteps(a), _ComparedSteps(b)
    steps = sorted({*left.places, *right.places})
    parted = next((step for step in steps if left.values(step) != right.values(step)), None)
    last = [{name: f"{value:.6g}" for name, value in side.last_values().items()} for side in (left, right)]
    return StageDiff(a.name, parted, (len(left.places), len(right.places)), tuple(_changes(*last)))


class _ComparedSteps:
    """The compared metrics of a stage by step; of one that was logged twice the last."""

    def __init__(self, stage: StageRecord) -> None:
        self._metrics = stage.metrics
        self.places = {int(step): place for place, step in enumerate(stage.metrics.column("step"))}

    def values(self, step: int) -> dict[str, float] | None:
        return None if (place := self.places.get(step)) is None else _compared(self._metrics[place])

    def last_values(self) -> dict[str, float]:
        """In the order in which they were first logged."""
        steps, names = sorted(self.places), [name for name in self._metrics.names() if _is_compared(name)]
        last = self._first_of_each(reversed(steps), len(names))
        return {name: last[name] for name in self._first_of_each(steps, len(last))}

    def _first_of_each(self, steps: Iterable[int], num_names: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for step in steps:
            if len(found) == num_names:
                break
            found |= {
                name: value for name, value in _compared(self._metrics[self.places[step]]).items() if name not in found
            }
        return found


def _compared(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and _is_compared(name)}


@cache
def _is_compared(name: str) -> bool:
    return name not in _NOT_COMPARED and name != "step" and not name.startswith(_NOT_COMPARED_PREFIXES)


def _scores(a: RunRecord, b: RunRecord) -> Iterator[Difference]:
    """Per model and suite; paired by item where both answered the same suite."""
    for model in dict.fromkeys([*a.models, *b.models]):
        left, right = a.evals.get(model, {}), b.evals.get(model, {})
        for key in dict.fromkeys([*left, *right]):
            before, after = left.get(key), right.get(key)
            if before is not None and after is not None and before.mean == after.mean:
                continue
            share = words.is_share(*[report for report in (before, after) if report is not None])
            texts = [ABSENT if report is None else words.score(report.mean, share) for report in (before, after)]
            paired = difference_interval(before, after) if before is not None and after is not None else None
            if paired is not None:
                texts[1] += f"   {words.change(paired, share)}"
            elif before is not None and after is not None:
                texts[1] += "   (not the same suite)"
            yield Difference(f"{model} {key[0]}/{key[1]}", *texts)
