"""Mirror the registry's events to MLflow, after the local commit.

The event log is the outbox: each mirror remembers the last event that reached it. A server that is down costs a short
wait and leaves the rest for the next time; what a server will never take is named and passed over. The local registry
stays the truth.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from posttrain.errors import MissingExtraError
from posttrain.names import PREVIOUS
from posttrain.registry.audit import Event
from posttrain.registry.promotion import CHAMPION, HOLD
from posttrain.registry.registry import Registry
from posttrain.uris import refuse_secret, without_secrets

_CONNECT_S = 2.0
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_MIRRORED = ("register", "promote", "rollback", "tag", "untag")
_TAKEN_THERE = re.compile(r"latest|v\d+", re.IGNORECASE)


class Mirror(Protocol):
    """Somewhere else that follows the registry. Being sent an event twice must do no harm."""

    @property
    def name(self) -> str: ...

    def send(self, event: Event, registry: Registry) -> None: ...


class UndeliverableError(Exception):
    """The mirror refuses this event, and would refuse it again."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How many events were sent, how many wait and why, and what was passed over because it can never be delivered."""

    sent: int
    pending: int
    error: str | None = None
    passed_over: tuple[str, ...] = ()


def deliver(registry: Registry, mirror: Mirror) -> Delivery:
    """Send what has not been sent, in order. Never raises for a mirror that fails."""
    waiting = registry.rows.events(after=registry.rows.delivered(mirror.name))
    passed_over: list[str] = []
    for place, event in enumerate(waiting):
        try:
            mirror.send(event, registry)
        except UndeliverableError as error:
            passed_over.append(f"{event.action} {event.name}@{event.version}: {error}")
        except Exception as error:  # noqa: BLE001 - another process answers here, and it may fail in any way
            why = without_secrets(f"{type(error).__name__}: {error}")
            return Delivery(place - len(passed_over), len(waiting) - place, why, tuple(passed_over))
        registry.rows.mark_delivered(mirror.name, event.id)
    return Delivery(len(waiting) - len(passed_over), 0, None, tuple(passed_over))


class MlflowMirror:
    """Registered models, versions and aliases in an MLflow registry (a server's URL, or `sqlite:///file.db`).

    Raises: ConfigError for a URI with a password; MLflow reads credentials from its own environment variables.
    """

    def __init__(self, uri: str) -> None:
        refuse_secret(uri)
        self.uri = uri
        self._client: Any = None

    @property
    def name(self) -> str:
        return f"mlflow:{self.uri}"

    def send(self, event: Event, registry: Registry) -> None:
        """Raises: MissingExtraError without mlflow; UndeliverableError for what the server refuses; its other failures."""
        _probe(self.uri)
        client = self._connect()
        from mlflow.exceptions import MlflowException

        try:
            self._send(client, event, registry)
        except MlflowException as error:
            if error.error_code in _REFUSALS:
                raise UndeliverableError(str(error)) from error
            raise

    def _send(self, client: Any, event: Event, registry: Registry) -> None:
        if event.action not in _MIRRORED:
            return None
        if event.action in ("tag", "untag"):
            return self._send_tag(client, event, registry)
        theirs = self._version(client, event.name, event.version, registry)
        alias = event.details.get("alias")
        if alias is None:
            return None
        client.set_registered_model_alias(event.name, alias_there(alias), theirs)
        self._send_previous(client, event.name, alias, registry)
        if event.action == "rollback":
            bad = self._version(client, event.name, int(event.details["from"]), registry)
            client.set_model_version_tag(event.name, bad, HOLD, event.details["reason"])
        return None

    def _send_previous(self, client: Any, name: str, alias: str, registry: Registry) -> None:
        """As it is now: events still to be sent will only confirm it."""
        ours = PREVIOUS if alias == CHAMPION else f"{alias}.{PREVIOUS}"
        before = registry.holder(name, ours)
        if before is None:
            client.delete_registered_model_alias(name, alias_there(ours))
        else:
            theirs = self._version(client, name, before.version, registry)
            client.set_registered_model_alias(name, alias_there(ours), theirs)

    def _send_tag(self, client: Any, event: Event, registry: Registry) -> None:
        theirs = self._version(client, event.name, event.version, registry)
        if event.action == "tag":
            client.set_model_version_tag(event.name, theirs, event.details["key"], event.details["value"])
        else:
            client.delete_model_version_tag(event.name, theirs, event.details["key"])

    def _version(self, client: Any, name: str, version: int, registry: Registry) -> str:
        """MLflow's number for our version; made if it is not there yet."""
        known = {model.name for model in client.search_registered_models()}
        if name not in known:
            client.create_registered_model(name)
        for theirs in client.search_model_versions(f"name = '{name}'"):
            if theirs.tags.get("posttrain.version") == str(version):
                return str(theirs.version)
        if gone := registry.rows.events(name, version=version, action="remove"):
            raise UndeliverableError(f"it was removed from the registry at {gone[0].at}")
        entry = registry.show(name, version)
        tags = {"posttrain.version": str(version), "posttrain.digest": entry.digest}
        created = client.create_model_version(name, source=entry.path.resolve().as_uri(), tags=tags)
        return str(created.version)

    def _connect(self) -> Any:
        if self._client is None:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # MLflow's own default retries for minutes.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            try:
                from mlflow.tracking import MlflowClient
            except ImportError as error:
                raise MissingExtraError("mirroring to MLflow needs it: pip install 'posttrain[mlflow]'") from error
            self._client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        return self._client


def alias_there(alias: str) -> str:
    """Our alias in MLflow's alphabet: `staging.previous` → `staging__previous`; `latest` and `v3` are names of its own there."""
    clean = alias.replace(".", "__")
    return f"{clean}__alias" if _TAKEN_THERE.fullmatch(clean) else clean


def _probe(uri: str) -> None:
    """Fail fast when nothing listens. Raises: OSError."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.hostname:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=_CONNECT_S).close()
