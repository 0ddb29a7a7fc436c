"""A copy of a run in MLflow: parameters, metrics, findings.

A mirror, never the record: it works in a thread behind a bounded queue, so a slow or dead server costs a run nothing
but the copy, and a name that the server refuses costs that name. Knows nothing of the registry, which has its own mirror.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from posttrain.errors import MissingExtraError
from posttrain.uris import refuse_secret

_log = logging.getLogger(__name__)

_RUN_TAG = "posttrain.run"
_MAX_PER_CALL = 100
_MAX_NAME_CHARS = 250
_NO_NAME_THERE = re.compile(r"[^\w./: -]", re.ASCII)
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_MAX_PARAM_CHARS = 500
_RETRY_AFTER_S = 5.0
_TAGGED_EVENTS = {"finding", "gate", "stage"}

ClientCall = tuple[str, tuple[Any, ...]]


class MlflowSink:
    """Mirrors to `uri` (a server, or `sqlite:///file.db`); `run_key` finds the same run again after a restart. It is shown
    as `run_name`, or else as its key. `on_lost` is told at the end how many messages never arrived, if any.

    Credentials come from MLflow's own environment variables. Raises: MissingExtraError if MLflow is not installed,
    ConfigError for a URI with a password.
    """

    def __init__(
        self, uri: str, experiment: str, run_key: str, params: Mapping[str, Any] | None = None, queue_size: int = 1000,
        *, run_name: str = "", on_lost: Callable[[int], None] = lambda num_lost: None,
    ) -> None:  # fmt: skip
        refuse_secret(uri)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        _require_mlflow()
        # Two counters, one per thread: `+=` on a shared one could lose a count.
        self._num_refused = self._num_unsent = 0
        self._uri, self._experiment, self._run_key = uri, experiment, _quoted(run_key)
        self._run_name = run_name or self._run_key
        self._on_lost = on_lost
        self._queue: queue.Queue[ClientCall | None] = queue.Queue(maxsize=queue_size)
        self._closing = threading.Event()
        self._run_id = ""
        self._client: Any = None
        self._retry_at = 0.0
        self._refused: set[tuple[str, str]] = set()
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
        if kind in _TAGGED_EVENTS:
            self._put(("tags", (f"{kind}.{step}", str(details.get("message", dict(details))))))

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
            self._on_lost(self.num_dropped + left)

    def _put(self, message: ClientCall) -> None:
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
                kind, arguments = message
                self._log(kind, _ENTITIES[kind](self._client, self._run_id, *arguments))
            except Exception as error:  # noqa: BLE001 - the boundary to another system: any failure becomes a count
                self._num_unsent += 1
                self._retry_at = time.monotonic() + _RETRY_AFTER_S
                if self._num_unsent == 1:
                    _log.warning(
                        "MLflow at %s does not answer (%s); the run goes on without it", self._uri, _first_line(error)
                    )
        self._finish()

    def _log(self, kind: str, entities: Sequence[Any]) -> None:
        wanted = [entity for entity in entities if (kind, entity.key) not in self._refused]
        for start in range(0, len(wanted), _MAX_PER_CALL):
            for name, error in _log_batch(self._client, self._run_id, kind, wanted[start : start + _MAX_PER_CALL]):
                self._refused.add((kind, name))
                _log.warning(
                    "MLflow at %s refuses %s %r (%s); the run goes on without it there", self._uri, kind, name, error
                )

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
            else client.create_run(experiment_id, tags={_RUN_TAG: self._run_key}, run_name=self._run_name)
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


def _log_batch(client: Any, run_id: str, kind: str, entities: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """(name, why) of what is refused. MLflow refuses a batch for one name in it, so that name is looked for by halves."""
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, **{kind: entities})
    except MlflowException as error:
        if error.error_code not in _REFUSALS:
            raise
        if len(entities) == 1:
            yield entities[0].key, _first_line(error)
            return
        middle = len(entities) // 2
        yield from _log_batch(client, run_id, kind, entities[:middle])
        yield from _log_batch(client, run_id, kind, entities[middle:])


def _params(client: Any, run_id: str, params: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params  # a parameter of MLflow cannot be changed once it is set
    return [Param(name_there(name), value) for name, value in params.items() if name_there(name) not in known]


def _metrics(client: Any, run_id: str, step: int, time_ms: int, metrics: Mapping[str, float]) -> list[Any]:
    from mlflow.entities import Metric

    finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
    return [Metric(name_there(name), value, time_ms, step) for name, value in finite.items()]


def _tags(client: Any, run_id: str, name: str, value: str) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(name_there(name), value[:_MAX_PARAM_CHARS])]


_ENTITIES: dict[str, Callable[..., list[Any]]] = {"params": _params, "metrics": _metrics, "tags": _tags}


def name_there(name: str) -> str:
    """A name in MLflow's alphabet: letters, digits and `_-.: /`, as a relative path without empty or dotted steps."""
    steps = _NO_NAME_THERE.sub("_", name).split("/")
    return "/".join(step for step in steps if step.strip("."))[:_MAX_NAME_CHARS].rstrip("/") or "_"


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
