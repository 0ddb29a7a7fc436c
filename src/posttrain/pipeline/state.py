"""What a run has done so far, in `pipeline.json`: written whole after every transition, so a start is a resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.files import read_json, write_json

RUNNING, PASSED, FAILED, INCONCLUSIVE, DONE, STOPPED = "running", "passed", "failed", "inconclusive", "done", "stopped"


@dataclass(frozen=True, slots=True)
class StageEntry:
    """One attempt at a stage. `changed` are the keys a loop-back changed."""

    index: int
    kind: str
    attempt: int
    folder: str
    status: str
    input_digest: str
    started: str = ""
    wall_s: float = 0.0
    tokens: int = 0
    steps: int = 0
    output_digest: str = ""
    changed: Mapping[str, Any] = field(default_factory=dict)
    held: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GateEntry:
    """A verdict; `candidate` is the digest it is about."""

    after: int | str
    folder: str
    verdict: str
    candidate: str
    baseline: str
    attempt: int


@dataclass(frozen=True, slots=True)
class RunState:
    name: str
    pins: Mapping[str, str]
    status: str = RUNNING
    reason: str = ""
    stages: tuple[StageEntry, ...] = ()
    gates: tuple[GateEntry, ...] = ()
    retries: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    registered: Mapping[str, Any] | None = None

    def stage(self, index: int) -> StageEntry | None:
        """The newest attempt at a stage."""
        entries = [entry for entry in self.stages if entry.index == index]
        return entries[-1] if entries else None

    def with_stage(self, entry: StageEntry) -> RunState:
        """Replaces the same attempt, or adds it."""
        kept = tuple(e for e in self.stages if (e.index, e.attempt) != (entry.index, entry.attempt))
        return replace(self, stages=(*kept, entry))

    def gate(self, after: int | str, candidate: str, baseline: str) -> GateEntry | None:
        """A verdict already given on exactly these two models."""
        for entry in reversed(self.gates):
            if (entry.after, entry.candidate, entry.baseline) == (after, candidate, baseline):
                return entry
        return None

    def save(self, folder: Path) -> None:
        write_json(folder / "pipeline.json", asdict(self))

    @classmethod
    def load(cls, folder: Path) -> RunState | None:
        path = folder / "pipeline.json"
        if not path.exists():
            return None
        record = read_json(path)
        record["stages"] = tuple(StageEntry(**entry | {"held": tuple(entry["held"])}) for entry in record["stages"])
        record["gates"] = tuple(GateEntry(**entry) for entry in record["gates"])
        return cls(**record)
