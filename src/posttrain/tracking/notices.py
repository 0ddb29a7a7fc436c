"""What becomes of a run, told to whoever asked for it: a notice lies in the run's `outbox/` before it is sent.

A thread sends, so nothing that a hook does delays the run or fails it; what no hook took waits for the next start, or for
`posttrain notify`. A notice is marked once a hook took it, so one whose sender was killed in between is sent again, with the same `id`.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from posttrain.files import digest_json, digest_start, read_record, write_json

_log = logging.getLogger(__name__)
OUTBOX = "outbox"
_AGAIN_AFTER_S = 30.0
_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class Hook:
    """Who is told of which events: the server whose URL (and token) the named variables hold, or a command."""

    name: str
    events: frozenset[str]
    timeout_s: float
    url_env: str = ""
    token_env: str = ""
    command: tuple[str, ...] = ()
    project: Path | None = None
    """Where the command is run."""


@dataclass(frozen=True, slots=True)
class Sent:
    """How many notices hooks took, and why others wait, a line each."""

    num_taken: int
    waiting: tuple[str, ...]


class Outbox:
    """The notices of one run: a file each, with the names of the hooks that took it."""

    def __init__(self, run: Path, hooks: Sequence[Hook]) -> None:
        self.folder, self._hooks = Path(run) / OUTBOX, tuple(hooks)

    def put(self, notice: Mapping[str, Any], subject: str) -> None:
        """Keep a notice to be sent. `subject` is what it is about: the same is not told twice, whoever starts the run again."""
        if not any(notice["event"] in hook.events for hook in self._hooks):
            return
        name = digest_json([notice["run_id"], notice["event"], subject])
        path = self.folder / f"{digest_start(name)}.json"
        if not path.exists():
            write_json(path, {"id": digest_start(name), **notice, "taken_by": []})

    def send(self) -> Sent:
        """Send each notice to each hook that has not taken it. Never raises for a hook that fails."""
        if not self.folder.is_dir():
            return Sent(0, ())
        with open(self.folder / ".lock", "a") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Sent(0, ("another process sends them at this moment",))
            outcomes = list(self._each())
        failed = tuple(line for line in outcomes if line)
        return Sent(len(outcomes) - len(failed), failed)

    def _each(self) -> Iterator[str]:
        """Why a notice waits, or nothing."""
        notices = [(path, self._read(path)) for path in self.folder.glob("[!.]*.json")]
        for path, notice in sorted(notices, key=lambda pair: str(pair[1]["at"])):
            for hook in self._hooks:
                if notice["event"] not in hook.events or hook.name in notice["taken_by"]:
                    continue
                failure = _within(hook.timeout_s, hook, {k: v for k, v in notice.items() if k != "taken_by"})
                if not failure:
                    notice["taken_by"].append(hook.name)
                    write_json(path, notice)
                yield f"{hook.name}: {notice['event']}: {failure}" if failure else ""

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        def checked(record: dict[str, Any]) -> dict[str, Any]:
            return record | {"event": record["event"], "at": record["at"], "taken_by": list(record["taken_by"])}

        return read_record(path, checked, "delete it: it would only have told somebody of what the run's folder says")


def _within(timeout_s: float, hook: Hook, notice: Mapping[str, Any]) -> str:
    """Why the hook did not take it in time, or nothing. In a thread: names are looked up, and headers trickle in, without a limit."""
    outcome = [f"no answer within {timeout_s:g} s"]

    def work() -> None:
        outcome[0] = _run(hook, notice) if hook.command else _post(hook, notice)

    thread = threading.Thread(target=work, name=f"notify-{hook.name}", daemon=True)
    thread.start()
    thread.join(timeout_s + _GRACE_S)
    return outcome[0]


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes to the server that was named, and to no other."""

    def redirect_request(self, *args: Any, **named: Any) -> None:
        return None


def _post(hook: Hook, notice: Mapping[str, Any]) -> str:
    """Why the server did not take it; nothing that was in a variable is repeated."""
    url, token = os.environ.get(hook.url_env, ""), os.environ.get(hook.token_env, "") if hook.token_env else ""
    missing = [name for name, value in ((hook.url_env, url), (hook.token_env, token)) if name and not value]
    if missing:
        return f"{' and '.join(missing)} not set"
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(notice["id"])}
    headers |= {"Authorization": f"Bearer {token}"} if token else {}
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            return f"{hook.url_env} holds no URL that begins with http:// or https://"
        request = urllib.request.Request(url, json.dumps(notice).encode(), headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=hook.timeout_s):
            return ""
    except urllib.error.HTTPError as error:
        return f"the server answers {error.code}"
    except urllib.error.URLError as error:
        reason = error.reason
        return reason.strerror or type(reason).__name__ if isinstance(reason, OSError) else "the URL cannot be used"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return type(error).__name__


def _run(hook: Hook, notice: Mapping[str, Any]) -> str:
    """Why the command did not take it. What it has started ends with it, or at the deadline."""
    try:
        process = subprocess.Popen(
            hook.command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=hook.project,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return f"{hook.command[0]}: {error.strerror}"
    try:
        process.communicate(json.dumps(notice).encode(), timeout=hook.timeout_s)
    except subprocess.TimeoutExpired:
        return f"no end within {hook.timeout_s:g} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"exit code {process.returncode}" if process.returncode else ""


class Notifier:
    """Sends what is in an outbox from a thread of its own: at once, and every half minute what was not taken."""

    def __init__(self, outbox: Outbox, patience_s: float, say: Callable[[str], None] = _log.warning) -> None:
        self._outbox, self._patience_s, self._say = outbox, patience_s, say
        self._wake, self._closing = threading.Event(), threading.Event()
        self._last = Sent(0, ())

    @contextmanager
    def sending(self) -> Generator[None]:
        """While this lasts what is told is sent; at its end what is being sent is waited for, but not for long."""
        thread = threading.Thread(target=self._work, name="notifier", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._close(thread)

    def tell(self, notice: Mapping[str, Any], subject: str) -> None:
        """Keep it, and have it sent. A disk that is full costs the notice, not the run."""
        try:
            self._outbox.put(notice, subject)
        except OSError as error:
            self._say(f"notify: {notice['event']} cannot be kept, so nobody is told: {error.strerror}")
        self._wake.set()

    def _close(self, thread: threading.Thread) -> None:
        self._closing.set()
        self._wake.set()
        thread.join(self._patience_s)
        waiting = ("it is still being sent",) if thread.is_alive() else self._last.waiting
        if waiting:
            self._say(
                f"notify: {'; '.join(waiting)}; kept in {self._outbox.folder}: posttrain notify RUN sends it again"
            )

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.clear()
            self._try()
            self._wake.wait(_AGAIN_AFTER_S)
        self._try()

    def _try(self) -> None:
        try:
            self._last = self._outbox.send()
        except (OSError, ValueError) as error:  # the folder is gone, the disk is full, a file of it is damaged
            self._last = Sent(0, (str(error),))
