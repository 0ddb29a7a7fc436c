"""The latest metrics of a run as a Prometheus text endpoint on this machine: `http://127.0.0.1:PORT/metrics`."""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from posttrain.errors import ConfigError

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class PrometheusSink:
    """Serves gauges `posttrain_<metric>{stage="…"}`, and the counters `posttrain_findings_total` by rule and severity and
    `posttrain_actions_total` by kind (action, rollback).

    `port=0` takes any free port; `port` holds the one it got. Raises: ConfigError if the port is taken.
    """

    def __init__(self, port: int, stage: str = "", host: str = "127.0.0.1") -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._gauges: dict[str, float] = {}
        self._findings: Counter[tuple[str, str]] = Counter()
        self._actions: Counter[str] = Counter()
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(self.render))
        except OSError as error:
            raise ConfigError(
                f"prometheus port {host}:{port} cannot be opened ({error.strerror}); choose another, or 0 for any free one"
            ) from error
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="prometheus", daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self._lock:
            self._gauges.update({"step": float(step)} | {name: float(value) for name, value in metrics.items()})

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        with self._lock:
            if kind == "finding":
                self._findings[str(details.get("rule", "")), _text(details.get("severity", ""))] += 1
            elif kind in ("action", "rollback"):
                self._actions[kind] += 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def render(self) -> str:
        """The page, in the Prometheus text format."""
        with self._lock:
            gauges, findings, actions = dict(self._gauges), dict(self._findings), dict(self._actions)
        stage = {"stage": self._stage} if self._stage else {}
        # Two metrics whose names become one would be two samples of one name: the last by name is served.
        named = {"posttrain_" + re.sub(r"[^a-zA-Z0-9_]", "_", name): value for name, value in sorted(gauges.items())}
        lines: list[str] = []
        for name, value in named.items():
            lines += [f"# TYPE {name} gauge", f"{name}{_labels(stage)} {_number(value)}"]
        if findings:
            lines.append("# TYPE posttrain_findings_total counter")
        for (rule, severity), count in sorted(findings.items()):
            lines.append(f"posttrain_findings_total{_labels(stage | {'rule': rule, 'severity': severity})} {count}")
        if actions:
            lines.append("# TYPE posttrain_actions_total counter")
        lines += [
            f"posttrain_actions_total{_labels(stage | {'kind': kind})} {n}" for kind, n in sorted(actions.items())
        ]
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, str]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}" if labels else ""


def _handler(render: Any) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is served")
                return
            body = render().encode()
            self.send_response(200)
            self.send_header("Content-Type", _CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Scrapes are not news."""

    return Handler


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return ("+Inf" if value > 0 else "-Inf") if math.isinf(value) else repr(value)


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
