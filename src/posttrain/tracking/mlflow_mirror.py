"""A copy of a run in MLflow: parameters, metrics, findings, and the versions and aliases that were registered.

A mirror, never the record: it works in a thread behind a bounded queue, so a slow or dead server costs a run nothing
but the copy. Knows nothing of the registry; it is told of an entry by an event of kind `registered`.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Mapping
from typing import Any

from posttrain.errors import MissingExtraError

_log = logging.getLogger(__name__)

_RUN_TAG = "posttrain.run"
_DIGEST_TAG = "posttrain.digest"
_MAX_METRICS_PER_CALL = 500
_MAX_PARAM_CHARS = 500
_RETRY_AFTER_S = 5.0
_TAGGED_EVENTS = {"finding", "gate", "stage"}

Message = tuple[str, tuple[Any, ...]]


class MlflowSink:
    """Mirrors to `uri` (a server, or `sqlite:///file.db`); `run_key` finds the same run again after a restart.

    Raises: MissingExtraError if MLflow is not installed.
    """

    def __init__(
        self, uri: str, experiment: str, run_key: str, params: Mapping[str, Any] | None = None, queue_size: int = 1000
    ) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        _require_mlflow()
        # Two counters, one per thread: `+=` on a shared one could lose a count.
        self._num_refused = self._num_unsent = 0
        self._uri, self._experiment, self._run_key = uri, experiment, _quoted(run_key)
        self._queue: queue.Queue[Message | None] = queue.Queue(maxsize=queue_size)
        self._closing = threading.Event()
        self._run_id = ""
        self._client: Any = None
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()
        if params:
            self._put(("params", (_flatten(params),)))

    @property
    def num_dropped(self) -> int:
        """Messages that never arrived, because the queue was full or the server was away."""
        return self._num_refused + self._num_unsent

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._put(("metrics", (step, int(time.time() * 1000), dict(metrics))))

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        if kind == "registered":
            self._put(("registered", (dict(details),)))
        elif kind in _TAGGED_EVENTS:
            self._put(("tag", (f"{kind}.{step}", str(details.get("message", dict(details))))))

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait at most `timeout_s` for what is queued, then let it go."""
        if self._closing.is_set():
            return
        self._closing.set()
        deadline = time.monotonic() + timeout_s
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        left = self._queue.qsize()
        if self.num_dropped or left:
            _log.warning(
                "MLflow at %s did not get %d messages; metrics.jsonl has them all", self._uri, self.num_dropped + left
            )

    def _put(self, message: Message) -> None:
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            self._num_refused += 1

    def _work(self) -> None:
        while (message := self._queue.get()) is not None:
            # A server that is away is asked again only now and then, so the queue drains instead of piling up.
            if time.monotonic() < self._retry_at:
                self._num_unsent += 1
                continue
            try:
                self._connect()
                _SENDERS[message[0]](self._client, self._run_id, *message[1])
            except Exception as error:  # noqa: BLE001 - the boundary to another system: any failure becomes a count
                self._num_unsent += 1
                self._retry_at = time.monotonic() + _RETRY_AFTER_S
                if self._num_unsent == 1:
                    _log.warning(
                        "MLflow at %s does not answer (%s); the run goes on without it", self._uri, _first_line(error)
                    )
        self._finish()

    def _connect(self) -> None:
        if self._run_id:
            return
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        found = client.get_experiment_by_name(self._experiment)
        experiment_id = client.create_experiment(self._experiment) if found is None else found.experiment_id
        same = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{self._run_key}'", max_results=1)
        run = (
            same[0]
            if same
            else client.create_run(experiment_id, tags={_RUN_TAG: self._run_key}, run_name=self._run_key)
        )
        if same:
            client.update_run(run.info.run_id, status="RUNNING")
        self._client, self._run_id = client, run.info.run_id

    def _finish(self) -> None:
        if not self._run_id:
            return
        try:
            self._client.set_terminated(self._run_id)
        except Exception as error:  # noqa: BLE001 - as above
            _log.warning("MLflow at %s: the run stays open there (%s)", self._uri, _first_line(error))


def _send_params(client: Any, run_id: str, params: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params  # a parameter of MLflow cannot be changed once it is set
    fresh = [Param(name, value) for name, value in params.items() if name not in known]
    for start in range(0, len(fresh), 100):
        client.log_batch(run_id, params=fresh[start : start + 100])


def _send_metrics(client: Any, run_id: str, step: int, time_ms: int, metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    finite = [Metric(name, float(value), time_ms, step) for name, value in metrics.items() if math.isfinite(value)]
    for start in range(0, len(finite), _MAX_METRICS_PER_CALL):
        client.log_batch(run_id, metrics=finite[start : start + _MAX_METRICS_PER_CALL])


def _send_tag(client: Any, run_id: str, name: str, value: str) -> None:
    client.set_tag(run_id, name, value[:_MAX_PARAM_CHARS])


def _send_registered(client: Any, run_id: str, entry: Mapping[str, Any]) -> None:
    """Mirror a registered version and its alias; the same digest is registered once."""
    from mlflow.exceptions import MlflowException

    name = str(entry["name"])
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    versions = client.search_model_versions(f"name = '{_quoted(name)}'")
    same = [v for v in versions if v.tags.get(_DIGEST_TAG) == entry["digest"]]
    tags = {_DIGEST_TAG: str(entry["digest"]), "posttrain.version": str(entry["version"])}
    version = same[0] if same else client.create_model_version(name, str(entry["path"]), run_id, tags=tags)
    if entry.get("alias"):
        client.set_registered_model_alias(name, str(entry["alias"]), version.version)


_SENDERS = {"params": _send_params, "metrics": _send_metrics, "tag": _send_tag, "registered": _send_registered}


def _require_mlflow() -> None:
    from importlib.util import find_spec

    if find_spec("mlflow") is None:
        raise MissingExtraError(
            "MLflow is not installed; expected for `mlflow` tracking: pip install 'posttrain[mlflow]'"
        )


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)[:_MAX_PARAM_CHARS]
    return flat


def _quoted(text: str) -> str:
    return text.replace("'", "")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
