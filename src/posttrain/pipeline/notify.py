"""A run's hooks as its keys name them, and what a run tells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import yaml

from posttrain.config.pipeline import NotifyKeys
from posttrain.config.settings import PROJECT_KEY
from posttrain.errors import ConfigError
from posttrain.pipeline.state import RunState
from posttrain.registry.rows import now
from posttrain.tracking.notices import Hook, Notifier, Outbox, Sent
from posttrain.uris import without_secrets

_CLOSE_S = 1.0
"""For a thread to end once its last hook has ended."""


class RunNotices:
    """What one run tells its hooks; nothing where it has none."""

    def __init__(
        self, keys: Mapping[str, NotifyKeys], run: Path, project: Path | None, say: Callable[[str], None]
    ) -> None:
        self._run, self._notifier = run, None
        if keys:
            patience = max(hook.timeout_s for hook in keys.values()) + 2 * _CLOSE_S
            self._notifier = Notifier(Outbox(run, hooks_of(keys, project)), patience, say)

    def tell(self, state: RunState, event: str, subject: str, reason: str) -> None:
        """`subject` is what it is about, by digest where there is one: the same is told once."""
        if self._notifier is None:
            return
        reason = without_secrets(reason)
        text = f"{state.name}: {event}" + (f": {reason}" if reason else "")
        registered = state.registered or {}
        version = f"{registered['name']}@{registered['version']}" if registered else ""
        notice = {
            "event": event, "run": state.name, "run_id": state.id, "folder": str(self._run), "at": now(), "status": state.status,
            "reason": reason, "version": version, "text": text,
        }  # fmt: skip
        self._notifier.tell(notice, subject)

    def open(self) -> AbstractContextManager[object]:
        """Until it ends, what is told is sent."""
        return nullcontext() if self._notifier is None else self._notifier.sending()


def hooks_of(keys: Mapping[str, NotifyKeys], project: Path | None) -> list[Hook]:
    return [
        Hook(
            name, frozenset(hook.events), hook.timeout_s, hook.url_env or "", hook.token_env or "", tuple(hook.command or ()), project,
        )
        for name, hook in keys.items()
    ]  # fmt: skip


def send_again(run: Path, project: Path | None = None) -> Sent:
    """Send what hooks of a run have not taken. Raises: ConfigError if `run` is no run."""
    config = run / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"{run}: got no {config.name} here, expected the folder of a run")
    written = yaml.safe_load(config.read_text(encoding="utf-8"))
    keys = {name: NotifyKeys.model_validate(hook) for name, hook in (written.get("notify") or {}).items()}
    where = project or (run / written[PROJECT_KEY] if PROJECT_KEY in written else None)
    return Outbox(run, hooks_of(keys, where)).send()
