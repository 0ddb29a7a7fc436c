"""What a run has done so far, in `pipeline.json`: written whole after every transition, so a start is a resume."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.files import digest_json, read_record, write_json

RUNNING, PASSED, FAILED, INCONCLUSIVE, DONE, STOPPED = "running", "passed", "failed", "inconclusive", "done", "stopped"
ERROR = "error"
PENDING = "pending"
DAMAGED = "damaged"
"""Of a stage whose files are no longer what it made: another attempt stands in for it."""


STATE_FILE = "pipeline.json"
_SEAL = "digest"


@dataclass(frozen=True, slots=True)
class StageEntry:
    """One attempt at a stage. `changed` are the keys a loop-back changed.

    `inputs` are what it took, by name, and `input_digest` is the digest of them; `accepted` are digests of other inputs that
    a person let it stand for. `files` are what it made, relative to its folder.
    """

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
    inputs: Mapping[str, str] = field(default_factory=dict)
    environment: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Kept:
    """A person's word that what is finished stays, though `changed` (versions, numbers) would make it anew."""

    at: str
    by: str
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Parent:
    """The registered version that a run starts from: how the YAML named it, which it was, and its manifest."""

    ref: str
    version: str
    manifest: str


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
class Selection:
    """Whether an attempt looked good enough on the dev split to be given a verdict."""

    after: int | str
    attempt: int
    candidate: str
    chosen: bool
    reason: str


@dataclass(frozen=True, slots=True)
class RunState:
    """`id` is drawn when the run begins and stays with it wherever its folder is moved: mirrors know the run by it."""

    name: str
    pins: Mapping[str, str]
    status: str = RUNNING
    reason: str = ""
    stages: tuple[StageEntry, ...] = ()
    gates: tuple[GateEntry, ...] = ()
    selections: tuple[Selection, ...] = ()
    retries: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    registered: Mapping[str, Any] | None = None
    kept: tuple[Kept, ...] = ()
    parent: Parent | None = None
    id: str = ""
    num_processes: int = 0
    """Those that it was begun with, and that an optimizer step's rows are counted for; 0 where an older version began it."""

    def stage(self, index: int) -> StageEntry | None:
        """The newest attempt at a stage."""
        entries = [entry for entry in self.stages if entry.index == index]
        return entries[-1] if entries else None

    def attempt(self, index: int, input_digest: str) -> StageEntry | None:
        """The attempt at a stage that had these inputs, or was accepted for them."""
        usable = [entry for entry in self.stages if entry.index == index and entry.status != DAMAGED]
        found = [entry for entry in usable if input_digest in (entry.input_digest, *entry.accepted)]
        return found[-1] if found else None

    def attempts(self, index: int) -> int:
        return sum(entry.index == index for entry in self.stages)

    def with_stage(self, entry: StageEntry) -> RunState:
        """Adds an attempt, or makes it the newest again."""
        kept = tuple(e for e in self.stages if (e.index, e.attempt) != (entry.index, entry.attempt))
        return replace(self, stages=(*kept, entry))

    def gate(self, after: int | str, candidate: str, baseline: str | None = None) -> GateEntry | None:
        """The newest verdict on exactly these two models; without `baseline`, on this candidate."""
        for entry in reversed(self.gates):
            if (entry.after, entry.candidate) == (after, candidate) and baseline in (None, entry.baseline):
                return entry
        return None

    def with_gate(self, entry: GateEntry) -> RunState:
        """Adds a verdict, or makes it the newest again."""
        return replace(self, gates=(*(e for e in self.gates if e != entry), entry))

    def with_selection(self, made: Selection) -> RunState:
        """Adds a choice, or makes it the newest again."""
        return replace(self, selections=(*(s for s in self.selections if s != made), made))

    def save(self, folder: Path) -> None:
        record = asdict(self)
        write_json(folder / STATE_FILE, record | {_SEAL: digest_json(record)})

    @classmethod
    def load(cls, folder: Path) -> RunState | None:
        """None where no run is. Raises: DamagedFileError if the file is not what `save` wrote."""
        path = folder / STATE_FILE
        if not path.exists():
            return None
        go_on = (
            f"put a copy of it back, or move it away (mv {path} {path}.damaged) and start again: finished stages with the "
            "same inputs are taken over"
        )
        return read_record(path, cls._from_json, go_on)

    @classmethod
    def _from_json(cls, record: dict[str, Any]) -> RunState:
        seal = record.pop(_SEAL)
        if digest_json(record) != seal:
            raise ValueError("its contents are not those it was written with")
        # What an older version did not write yet has its default.
        return cls(**{name: _BUILD[name](value) if name in _BUILD else value for name, value in record.items()})


def _each(kind: type[Any], *tuples: str) -> Callable[[list[dict[str, Any]]], tuple[Any, ...]]:
    """Entries of one kind from their JSON; `tuples` are fields that JSON has as lists."""
    return lambda rows: tuple(kind(**row | {name: tuple(row[name]) for name in tuples if name in row}) for row in rows)


_BUILD: Mapping[str, Callable[[Any], Any]] = {
    "stages": _each(StageEntry, "held", "accepted"),
    "gates": _each(GateEntry),
    "selections": _each(Selection),
    "kept": _each(Kept, "changed"),
    "parent": lambda row: None if row is None else Parent(**row),
}
"""How fields of `RunState` come back from JSON."""
