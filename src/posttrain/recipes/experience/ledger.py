"""What became of every group that is made ahead of the trainer, on disk before it is trained on.

The order in which groups arrive decides what is trained on, so it is written down: one JSON line per event in a file per generation
batch, `OOO-GGGGGGGG.jsonl` (origin and batch), made durable when the batch is made. A run that goes on reads it: batches
that were made are made again, groups that had arrived are still there, and those that had not are asked again with their seeds.
A rollback begins a new origin, and what was abandoned is forgotten.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.checkpoint.store import disk_errors, sweep
from posttrain.errors import CheckpointError
from posttrain.files import fsync_dir, write_atomic
from posttrain.rollout.admission import Admission, AdmissionEvent, Arrived, Batched, BatchRecord, Dropped, Issued
from posttrain.rollout.routed import routed_of, routed_text
from posttrain.types import Completion, RewardBreakdown, Rollout

FOLDER = "rollouts"
_EVENTS: Mapping[str, type[Any]] = {"issued": Issued, "arrived": Arrived, "dropped": Dropped, "batched": Batched}
_NAMES = {kind: name for name, kind in _EVENTS.items()}
_GO_ON = "remove the folder to go on from the checkpoint with new groups"

Rollouts = tuple[Rollout, ...]


@dataclass(frozen=True)
class Beginning:
    """Where a ledger starts that has nothing on disk. `origin` counts the rollbacks of the run."""

    batch: int
    staleness: int
    origin: int = 0
    version: int = 0
    next_number: int = 0


class Ledger:
    """The record of one run, and the state that it leads to. One caller at a time.

    `rollouts` of every group that arrived, until its batch is taken; `batches` that were made and not yet taken.
    Raises: CheckpointError for a record that is damaged, or cannot be written.
    """

    def __init__(self, folder: Path, beginning: Beginning) -> None:
        self._folder, self._origin = folder, beginning.origin
        self.admission = Admission(beginning.batch, beginning.staleness, beginning.version, beginning.next_number)
        self.rollouts: dict[int, Rollouts] = {}
        self.batches: dict[int, BatchRecord] = {}
        self._file: int | None = None
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self._discard_other_origins()
        for path in (paths := self._paths()):
            self._read(path, is_first=path == paths[0], is_last=path == paths[-1])
        self._check_bound()
        self._open()

    def write(self, event: AdmissionEvent, rollouts: Rollouts = ()) -> None:
        """Note an event with what arrived. Of a batch, all up to it is durable before this returns."""
        self._append(event, rollouts)
        self._move(event, rollouts)
        if isinstance(event, Batched):
            self._open()

    def take(self, generation: int) -> tuple[BatchRecord, dict[int, Rollouts]]:
        """A batch that was made, with the rollouts of its groups and of those that were dropped for it."""
        record = self.batches.pop(generation)
        return record, {number: self.rollouts.pop(number) for number in (*record.numbers, *record.dropped)}

    def forget(self, generation: int) -> None:
        """No start goes on from before batch `generation`."""
        for path in self._paths():
            # What arrived while batch g was awaited is in batch g + staleness at the latest.
            if _generation(path) + self.admission.staleness < generation:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    # --- on disk ---------------------------------------------------------------------------------------------------

    def _paths(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._origin:03d}-????????.jsonl"))

    def _discard_other_origins(self) -> None:
        """Prompts that an abandoned run has asked are passed over."""
        others = [path for path in sorted(self._folder.glob("*.jsonl")) if path not in set(self._paths())]
        for path in others:
            for line in _lines(path, is_last=True):
                if "issued" in line:
                    self.admission.next_number = max(self.admission.next_number, int(line["issued"][0]) + 1)
        if others and not self._paths():
            self._open()
            self.close()
        for path in others:
            path.unlink()

    def _read(self, path: Path, *, is_first: bool, is_last: bool) -> None:
        lines = _lines(path, is_last)
        if not lines or "base" not in lines[0]:
            raise CheckpointError(f"{path}:1: got no beginning of a ledger; {_GO_ON}")
        if is_first:
            self._begin(lines[0]["base"])
        elif lines[0]["base"] != self._base():
            raise CheckpointError(f"{path}:1 does not go on from the file before it, which is damaged; {_GO_ON}")
        for number, line in enumerate(lines[1:], start=2):
            try:
                (name, values), *rest = line.items()
                kind = _EVENTS[name]
                event = Batched(values[0], tuple(values[1])) if kind is Batched else kind(*values)
                self._move(event, tuple(_rollout(one) for _, given in rest for one in given))
            except (KeyError, TypeError, ValueError, AssertionError) as error:
                raise CheckpointError(
                    f"{path}:{number}: got an event that cannot follow ({error}); {_GO_ON}"
                ) from error

    def _move(self, event: AdmissionEvent, rollouts: Rollouts) -> None:
        record = self.admission.apply(event)
        if isinstance(event, Arrived):
            self.rollouts[event.number] = rollouts
        if record is not None:
            self.batches[record.generation] = record

    def _base(self) -> dict[str, Any]:
        state = self.admission
        return {
            "batch": state.batch, "version": state.version, "next_number": state.next_number,
            "issued_at": [[number, weights] for number, weights in state.issued_at.items()], "arrived": state.arrived,
        }  # fmt: skip

    def _begin(self, base: Mapping[str, Any]) -> None:
        state = self.admission
        if base["batch"] != state.batch:
            raise CheckpointError(
                f"{self._folder} holds batches of {base['batch']} groups; this start makes them of {state.batch}. Set "
                f"num_prompts_per_step: {base['batch']}, or start anew in another output_dir"
            )
        state.version, state.next_number = base["version"], base["next_number"]
        state.issued_at = dict(base["issued_at"])
        state.arrived = list(base["arrived"])

    def _check_bound(self) -> None:
        """Raises: CheckpointError for groups that a wider bound let in: no batch could be made of them within this one."""
        state = self.admission
        most = (state.staleness + 1) * state.batch
        oldest = min(state.issued_at.values(), default=state.version)
        if len(state.issued_at) > most or oldest + state.staleness < state.version:
            raise CheckpointError(
                f"{self._folder} holds {len(state.issued_at)} groups that are under way, of weights {oldest} and later; max_staleness: "
                f"{state.staleness} lets in {most} at batch {state.version}. Set rollout.max_staleness as it was, or start anew in another "
                "output_dir"
            )

    def _open(self) -> None:
        """Go on in the file of the next batch, which begins with the state up to it."""
        self.close()
        path = self._folder / f"{self._origin:03d}-{self.admission.version:08d}.jsonl"
        with disk_errors(self._folder):
            if not path.exists():
                write_atomic(path, json.dumps({"base": self._base()}) + "\n")
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    def _append(self, event: AdmissionEvent, rollouts: Rollouts) -> None:
        assert self._file is not None, "a ledger that is closed is not written to"
        record: dict[str, Any] = {_NAMES[type(event)]: list(event)}
        if rollouts:
            record["rollouts"] = [asdict(rollout) for rollout in rollouts]
        raw = memoryview((json.dumps(record, default=_as_text) + "\n").encode())
        start = os.fstat(self._file).st_size
        with disk_errors(self._folder):
            try:
                while raw:
                    raw = raw[os.write(self._file, raw) :]
                if isinstance(event, Batched):
                    os.fsync(self._file)
                    fsync_dir(self._folder)
            except OSError:
                # Another thread may write before the run ends, and an event that nobody acted on is none.
                os.ftruncate(self._file, start)
                raise


def _generation(path: Path) -> int:
    return int(path.stem.partition("-")[2])


def _lines(path: Path, is_last: bool) -> list[dict[str, Any]]:
    """Whole lines; a write that was cut short may have left part of one at the end of the last file."""
    *whole, part = path.read_bytes().split(b"\n")
    if part and not is_last:
        raise CheckpointError(f"{path}:{len(whole) + 1}: got part of a line; {_GO_ON}")
    found: list[dict[str, Any]] = []
    for number, line in enumerate(whole, start=1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}:{number}: got what is no JSON ({error}); {_GO_ON}") from error
        if not isinstance(value, dict) or not value:
            raise CheckpointError(f"{path}:{number}: got {line[:40]!r}, expected an event; {_GO_ON}")
        found.append(value)
    return found


def _as_text(value: Any) -> str:
    """Of what JSON does not have, arrays alone. Raises: TypeError for anything else, which would come back as another thing."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} has no place in a ledger")
    return routed_text(value)


def _rollout(record: Mapping[str, Any]) -> Rollout:
    sampled: dict[str, Any] = dict(record["completion"])
    tuples: dict[str, Any] = {
        name: tuple(sampled.get(name, ())) for name in ("ids", "logp", "policy_versions", "inserted")
    }
    said = sampled.get("routed_experts")
    routed = None if said is None else routed_of(said)
    return Rollout(
        Completion(**{**sampled, **tuples, "routed_experts": routed}),
        record["text"],
        RewardBreakdown(**record["reward"]),
    )


def staleness(rollouts: Sequence[Rollout], generation: int, steps_per_batch: int) -> list[float]:
    """How many batches old the weights were that each token of them was sampled from, when batch `generation` begins."""
    versions = [
        version
        for rollout in rollouts
        for version in rollout.completion.policy_versions
        or (rollout.completion.policy_version,) * len(rollout.completion.ids)
    ]
    return [generation - version / steps_per_batch for version in versions]
