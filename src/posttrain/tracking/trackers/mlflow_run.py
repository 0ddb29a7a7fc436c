"""A run in MLflow. Credentials come from MLflow's own variables."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# A server that is away is asked again by the mirror; MLflow itself would go on for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from posttrain.tracking.trackers.table import (
    REPORT_NAME,
    SAMPLES_NAME,
    MetricRow,
    Samples,
    TrackedRun,
    as_table,
    numbers,
)

_log = logging.getLogger(__name__)

_RUN_TAG = "posttrain.run"
_STEP = "step"
_STEPS_PER_TABLE = 100
_MAX_NAME_CHARS, _MAX_TAG_CHARS = 250, 500
_MAX_PER_CALL = {"metrics": 1000, "params": 100, "tags": 100}
_NO_NAME_THERE = re.compile(r"[^\w./: -]", re.ASCII)
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")


class MlflowRun:
    """A name that the server refuses costs that name alone. Sent twice is there once: a metric's key, step, time and value are one row."""

    def __init__(self, run: TrackedRun) -> None:
        self._client: Any = MlflowClient(tracking_uri=run.uri, registry_uri=run.uri)
        self._refused: set[tuple[str, str]] = set()
        key = run.key.replace("'", "")
        found = self._client.get_experiment_by_name(run.project)
        experiment = (
            self._client.create_experiment(run.project, _artifacts_beside(self._client.tracking_uri))
            if found is None
            else found.experiment_id
        )
        same = self._client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{key}'", max_results=1)
        there = same[0] if same else self._client.create_run(experiment, tags={_RUN_TAG: key}, run_name=run.name)
        self._id = there.info.run_id
        if same:
            self._client.update_run(self._id, status="RUNNING")
        self._waiting: dict[str, list[Mapping[str, Any]]] = {}
        self._table: tuple[str, list[Mapping[str, Any]]] = ("", [])
        self._send("params", _params(run.params, known=there.data.params))

    def recorded(self) -> int:
        return int(self._client.get_run(self._id).data.metrics.get(_STEP, -1))

    def rows(self, rows: Sequence[MetricRow], samples: Samples) -> None:
        self._send_samples([one for some in samples.values() for one in some])
        waiting: list[Metric] = []
        for row in rows:
            metrics = _metrics(row)
            if len(waiting) + len(metrics) > _MAX_PER_CALL["metrics"]:
                self._send("metrics", waiting)
                waiting = []
            waiting += metrics
        self._send("metrics", waiting)

    def note(self, name: str, step: int, text: str) -> None:
        self._send("tags", [RunTag(name_there(name), text[:_MAX_TAG_CHARS])])

    def report(self, html: str) -> None:
        self._client.log_text(self._id, html, REPORT_NAME)

    def close(self) -> None:
        self._send_samples(())
        self._client.set_terminated(self._id)

    def _send_samples(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Tables of some steps each, written again as they grow. Where the files' store fails, the numbers go on without."""
        for one in samples:
            path = f"{SAMPLES_NAME}/{one['step'] // _STEPS_PER_TABLE * _STEPS_PER_TABLE:06d}.json"
            self._waiting.setdefault(path, []).append(one)
        for path, some in list(self._waiting.items()):
            try:
                self._send_table(path, some)
            except Exception as error:  # noqa: BLE001 - the border to another system: a store of files raises what its package does
                _log.warning("MLflow's store of files refuses %s (%s)", path, str(error).partition("\n")[0][:200])
                return
            del self._waiting[path]

    def _send_table(self, path: str, samples: Sequence[Mapping[str, Any]]) -> None:
        if path != self._table[0]:
            paths = {found.path for found in self._client.list_artifacts(self._id, SAMPLES_NAME)}
            listed = [{"path": name, "type": "table"} for name in sorted(paths | {path})]
            self._client.set_tag(self._id, MLFLOW_LOGGED_ARTIFACTS, json.dumps(listed))
            self._table = (path, self._rows_there(path) if path in paths else [])
        rows = [*(one for one in self._table[1] if one["step"] < samples[0]["step"]), *samples]
        columns, data = as_table(rows)
        self._client.log_dict(self._id, {"columns": columns, "data": data}, path)
        self._table = (path, rows)

    def _rows_there(self, path: str) -> list[Mapping[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            table = json.loads(Path(self._client.download_artifacts(self._id, path, folder)).read_text("utf-8"))
        return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]

    def _send(self, kind: str, entities: Sequence[Any]) -> None:
        wanted = [entity for entity in entities if (kind, entity.key) not in self._refused]
        size = _MAX_PER_CALL[kind]
        for start in range(0, len(wanted), size):
            for name, error in self._refusals(kind, wanted[start : start + size]):
                self._refused.add((kind, name))
                _log.warning("MLflow refuses %s %r (%s); the copy goes on without it", kind, name, error)

    def _refusals(self, kind: str, entities: Sequence[Any]) -> Iterator[tuple[str, str]]:
        """(name, why). MLflow refuses a batch for one name in it, so that name is looked for by halves."""
        try:
            self._client.log_batch(self._id, **{kind: entities})
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if len(entities) == 1:
                yield entities[0].key, str(error).partition("\n")[0][:200]
                return
            middle = len(entities) // 2
            yield from self._refusals(kind, entities[:middle])
            yield from self._refusals(kind, entities[middle:])


def _artifacts_beside(uri: str) -> str | None:
    """The folder for files of a database on this machine: beside it, not where the process happens to stand."""
    _, is_file, path = uri.partition("?")[0].partition("sqlite:///")
    return (Path(path).absolute().parent / "mlruns").as_uri() if is_file else None


def _params(params: Mapping[str, str], known: Mapping[str, str]) -> list[Param]:
    """Without those that are known: a parameter of MLflow cannot be changed once it is set."""
    return [Param(name_there(name), value) for name, value in params.items() if name_there(name) not in known]


def _metrics(row: MetricRow) -> list[Metric]:
    """With the row's own time, so that the same row sent twice is the same. The step comes last: where it is, all is."""
    time_ms, step = int(row["time"] * 1000), row["step"]
    named = numbers(row) | {_STEP: float(step)}
    return [Metric(name_there(name), value, time_ms, step) for name, value in named.items()]


def name_there(name: str) -> str:
    """A name in MLflow's alphabet: letters, digits and `_-.: /`, as a relative path without empty or dotted steps."""
    steps = _NO_NAME_THERE.sub("_", name).split("/")
    return "/".join(step for step in steps if step.strip("."))[:_MAX_NAME_CHARS].rstrip("/") or "_"
