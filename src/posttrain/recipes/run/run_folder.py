"""A stage's folder: what is recorded in it while the stage runs, and what it says of itself at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from posttrain.data.dataset import Dataset, sequences
from posttrain.data.origin import data_origins
from posttrain.files import read_json, read_record, write_json
from posttrain.models.total import TotalReport
from posttrain.protocols import MetricSink
from posttrain.tracking.jsonl import EVENTS, JsonlSink, read_jsonl
from posttrain.tracking.multi import MultiSink
from posttrain.types import TokenSeq

log = logging.getLogger(__name__)

_EXAMPLES = 3

Watchers = Callable[[str, int], Sequence[MetricSink]]
"""(kind, total_steps) → the sinks that stand beside `metrics.jsonl`: a live view, a tracker."""


@dataclass(frozen=True)
class StageResult:
    """What a stage made. `steps` are those whose update was made or thrown away, not those without anything to learn from."""

    kind: str
    folder: Path
    model_dir: Path
    model_digest: str
    parent_digest: str
    steps: int
    tokens: int
    wall_s: float
    metrics: Mapping[str, float]
    held: tuple[str, ...] = ()
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    """What the run was rolled back for and recovered from; it does not hold promotion."""
    adapter_total: TotalReport | None = None
    """The adapter for the given base, of a stage that trained one."""

    def to_json(self) -> dict[str, Any]:
        record = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("folder", "model_dir")
        }
        total = None if self.adapter_total is None else asdict(self.adapter_total)
        record |= {"held": list(self.held), "rollbacks": list(self.rollbacks), "adapter_total": total}
        return record | {"metrics": dict(self.metrics)}

    def save(self) -> None:
        write_json(self.folder / "result.json", self.to_json())

    @classmethod
    def load(cls, folder: Path) -> StageResult:
        """Raises: DamagedFileError."""
        go_on = f"delete {folder / 'result.json'} and start again: the stage ends anew from its last checkpoint"
        return read_record(folder / "result.json", partial(cls._from_json, folder), go_on)

    @classmethod
    def _from_json(cls, folder: Path, record: dict[str, Any]) -> StageResult:
        record |= {"folder": folder, "model_dir": folder / "model", "held": tuple(record["held"])}
        record["rollbacks"] = tuple(record["rollbacks"])
        if total := record.get("adapter_total"):
            record["adapter_total"] = TotalReport(**{**total, "rounded": tuple(total["rounded"])})
        return cls(**record)


class RunFolder:
    """`metrics.jsonl`, `events.jsonl`, `summary.json` and whoever watches. Records only on the main rank, once opened."""

    def __init__(self, path: Path, kind: str, is_main: bool, watchers: Watchers | None = None) -> None:
        self.path, self._kind, self._is_main, self._watchers = path, kind, is_main, watchers
        self._sink: MetricSink | None = None

    def open(self, step: int, total_steps: int) -> None:
        """Cut the records back to `step` and go on from there, to `total_steps`."""
        if not self._is_main:
            return
        summary = self.path / "summary.json"
        if summary.exists():
            write_json(summary, read_json(summary) | {"total_steps": total_steps})
        records = JsonlSink(self.path)
        records.truncate_to(step)
        self._sink = MultiSink([records, *(self._watchers(self._kind, total_steps) if self._watchers else ())])

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._sink is not None:
            self._sink.log(step, metrics)

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        if self._sink is not None:
            self._sink.event(kind, step, details)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind that are on disk."""
        return [event for event in read_jsonl(self.path / EVENTS) if event["kind"] == kind]

    def describe_data(self, decode: Callable[[Sequence[int]], str], *datasets: Dataset[Any] | None) -> None:
        """Say what was read, kept and skipped, and write it to `summary.json` with examples of the loss mask, and what rows of ours were made from."""
        if not self._is_main:
            return
        present = [data for data in datasets if data is not None]
        for line in (line for data in present for line in data.summary.lines()):
            log.info("%s", line)
        shown = [sequence for row in present[0].rows[:_EXAMPLES] for sequence in sequences(row)]
        examples = [{"origin": str(s.origin), "segments": mask_segments(s, decode)} for s in shown]
        write_json(
            self.path / "summary.json",
            {"datasets": [data.summary.to_json() for data in present], "examples": examples, **_origins(present)},
        )

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()
            self._sink = None


def mask_segments(sequence: TokenSeq, decode: Callable[[Sequence[int]], str]) -> list[tuple[str, bool]]:
    """The text of a sequence in runs of trained and untrained tokens."""
    runs = groupby(zip(sequence.ids, sequence.loss_mask, strict=True), key=lambda pair: pair[1])
    return [(decode([token for token, _ in run]), trained) for trained, run in runs]


def _origins(datasets: Sequence[Dataset[Any]]) -> dict[str, Any]:
    found = data_origins([source.path for data in datasets for source in data.summary.sources])
    return {"origins": found} if found else {}
