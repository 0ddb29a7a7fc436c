"""A row for each tracker, and what all of them are told.

A tracker's package is imported in the mirror's own process alone, never beside a training loop.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from posttrain.errors import DamagedFileError, MissingExtraError
from posttrain.files import read_record, write_json
from posttrain.uris import absolute_sqlite, refuse_secret

_SETTINGS = "run.json"
_MAX_PARAM_CHARS = 500
_MAX_NAME_CHARS = 100

MetricRow = Mapping[str, Any]
"""A line of metrics.jsonl: `step`, `time` in seconds, and numbers by name; null where one is not finite."""

Samples = Mapping[int, Sequence[Mapping[str, Any]]]
"""Lines of samples.jsonl by the step of the row that they go with, secrets taken out."""

SAMPLES_NAME, REPORT_NAME = "samples", "report.html"


@dataclass(frozen=True)
class TrackedRun:
    """What is copied. The same `key` is the same run there, also after a restart; `uri` is MLflow's server; `report` is
    the file of the run's report, as seen from the folder; `log_completions`: samples and report may leave too."""

    folder: Path
    project: str
    key: str
    name: str
    params: Mapping[str, str] = field(default_factory=dict)
    uri: str | None = None
    report: str = ""
    log_completions: bool = False

    @property
    def mirrors(self) -> Path:
        """Where each tracker's state and log are."""
        return self.folder / "mirrors"

    def save(self) -> None:
        if self.uri is not None:
            refuse_secret(self.uri)
        self.mirrors.mkdir(parents=True, exist_ok=True)
        fields = {name: getattr(self, name) for name in ("project", "key", "name", "report", "log_completions")}
        uri = None if self.uri is None else absolute_sqlite(self.uri)  # `posttrain mirror` may be called elsewhere
        write_json(self.mirrors / _SETTINGS, fields | {"uri": uri, "params": dict(self.params)})


class Tracker(Protocol):
    """A run that is open somewhere else. Any call may raise what its package raises."""

    def recorded(self) -> int:
        """The last step of which everything is there, by asking there; -1 if none is."""
        ...

    def rows(self, rows: Sequence[MetricRow], samples: Samples) -> None:
        """Take them, in the order of their steps; a row's samples are there when the row is."""
        ...

    def note(self, name: str, step: int, text: str) -> None:
        """Take a remark; the same one may come twice."""
        ...

    def report(self, html: str) -> None:
        """Take the run's report; the same one may come twice."""
        ...

    def close(self) -> None:
        """Returns when what was taken is on its way or on disk."""
        ...


@dataclass(frozen=True)
class TrackerRow:
    """`module` must be installed, `extra` brings it, `entry` (`module:class`) opens a run."""

    module: str
    extra: str
    entry: str

    def open(self, run: TrackedRun) -> Tracker:
        module, _, name = self.entry.partition(":")
        return getattr(importlib.import_module(module), name)(run)


_HERE = "posttrain.tracking.trackers"
TRACKERS: dict[str, TrackerRow] = {
    "mlflow": TrackerRow("mlflow", "mlflow", f"{_HERE}.mlflow_run:MlflowRun"),
    "wandb": TrackerRow("wandb", "wandb", f"{_HERE}.wandb_run:WandbRun"),
    "trackio": TrackerRow("trackio", "trackio", f"{_HERE}.trackio_run:TrackioRun"),
    "tensorboard": TrackerRow("tensorboard", "tensorboard", f"{_HERE}.tensorboard_run:TensorBoardRun"),
}


def require_tracker(name: str) -> None:
    """Raises: MissingExtraError where the tracker's package is not installed."""
    row = TRACKERS[name]
    if find_spec(row.module) is None:
        raise MissingExtraError(
            f"report_to: {name} needs the package {row.module}, which is not installed: pip install 'posttrain[{row.extra}]'"
        )


def tracked_run(folder: Path) -> TrackedRun:
    """What `TrackedRun.save` wrote. Raises: DamagedFileError."""
    go_on = "start the stage again: it is written anew"
    path = folder / "mirrors" / _SETTINGS
    if not path.exists():
        raise DamagedFileError(f"{path} is missing; {go_on}")
    return read_record(path, lambda record: TrackedRun(folder, **record), go_on)


def as_params(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested keys as `outer.inner`, each value as text of at most 500 characters."""
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= as_params(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)[:_MAX_PARAM_CHARS]
    return flat


def as_table(samples: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """Columns and rows, `step` first; what is no text and no number is written as JSON."""
    columns = list(dict.fromkeys(["step", *(name for one in samples for name in one if name not in ("kind", "time"))]))
    return columns, [[_cell(one.get(name)) for name in columns] for one in samples]


def report_name(run: TrackedRun) -> str:
    """The name of an artifact, in the letters that are taken everywhere."""
    return "report-" + re.sub(r"[^A-Za-z0-9._-]", "-", run.key)[:_MAX_NAME_CHARS]


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (Mapping, list)) else value


def numbers(row: MetricRow) -> dict[str, float]:
    """What of a row can be drawn: all but step, time, text and what was not finite."""
    return {
        name: float(value)
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
