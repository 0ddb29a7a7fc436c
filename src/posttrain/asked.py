"""A process that answers questions, as its parent sees it: two pipes, a deadline, and how it ended. What it is asked is its pool's business."""

from __future__ import annotations

import json
import os
import pickle
import select
import selectors
import struct
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from posttrain.errors import ConfigError
from posttrain.supervised import SupervisedProcess

_START_TIMEOUT_S = 120.0
_MAX_LOG_BYTES = 1 << 20
_MAX_ANSWER_BYTES = 1 << 26


class ScribbledError(Exception):
    """Something that is no answer of ours stood in the answer pipe."""


class AskedProcess:
    """What `entry` runs as, its supervisor, and the pipes to it; `ready` once it has loaded what `setup` names.

    Requests come pickled on the first pipe, answers go as JSON lines on the second (`read_request`, `write_answer`). `called` is what
    messages call it; `scratch` begins the name of its folder of temporary files.
    """

    def __init__(self, entry: str, called: str, scratch: str, setup: Mapping[str, Any], hash_seed: int = 0) -> None:
        self._called = called
        request_read, self._request_fd = os.pipe()
        self.answer_fd, answer_write = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        environment = os.environ | {"PYTHONHASHSEED": str(hash_seed)}
        environment.setdefault("OMP_NUM_THREADS", "1")
        pipes = (request_read, answer_write)
        self.supervisor = SupervisedProcess(
            entry, [str(pipe) for pipe in pipes], self._log, environment, pipes, scratch
        )
        os.close(request_read)
        os.close(answer_write)
        os.set_blocking(self._request_fd, False)
        os.set_blocking(self.answer_fd, False)
        self.ready = False
        self._buffer, self._num_asked = b"", 0
        self.pid = self.supervisor.pid
        self.start_clock(_START_TIMEOUT_S)
        self._send(pickle.dumps(setup))

    # --- clock -----------------------------------------------------------------------------------------------------

    def start_clock(self, limit_s: float) -> None:
        self._queued_s = _queued_s(self.pid)
        self.deadline = time.monotonic() + limit_s

    def is_late(self) -> bool:
        """Whether the deadline is past. Time in which the process waited for a CPU does not count."""
        queued_s = _queued_s(self.pid)
        self.deadline += queued_s - self._queued_s
        self._queued_s = queued_s
        return time.monotonic() >= self.deadline

    # --- pipes -----------------------------------------------------------------------------------------------------

    def ask(self, request: Mapping[str, Any]) -> bool:
        """False when the process is gone or does not read before its deadline."""
        self._num_asked += 1
        return self._send(pickle.dumps({**request, "id": self._num_asked}))

    def _send(self, payload: bytes) -> bool:
        data = memoryview(struct.pack("<Q", len(payload)) + payload)
        while data:
            try:
                data = data[os.write(self._request_fd, data) :]
            except BlockingIOError:
                select.select([], [self._request_fd], [], max(0.0, self.deadline - time.monotonic()))
                if self.is_late():
                    return False
            except BrokenPipeError:
                return False
        return True

    def receive(self) -> dict[str, Any] | None:
        """The answer once it is complete. Raises: EOFError when the process is gone, ScribbledError."""
        while not self._buffer.endswith(b"\n"):
            try:
                data = os.read(self.answer_fd, 1 << 20)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError
            self._buffer += data
            if len(self._buffer) > _MAX_ANSWER_BYTES:
                raise ScribbledError
        line, self._buffer = self._buffer, b""
        return self._parse(line)

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            answer: Any = json.loads(line)
        except ValueError:
            raise ScribbledError from None
        if not isinstance(answer, dict) or cast("dict[str, Any]", answer).get("id") != self._num_asked:
            raise ScribbledError
        return cast("dict[str, Any]", answer)

    def is_idle(self) -> bool:
        """Alive, and silent since its last answer."""
        try:
            return self.receive() is None
        except (EOFError, ScribbledError):
            return False

    def look_at_start(self, what: str, if_slow: str) -> dict[str, Any] | None:
        """What it says once it has loaded `what`. Raises: ConfigError when that cannot be loaded, or not in time."""
        late = self.is_late()
        try:
            answer = self.receive()
        except EOFError:
            raise ConfigError(f"while loading {what}, {self.ended()}") from None
        except ScribbledError:
            raise ConfigError(f"while loading, {what} wrote into the pipe that carries the answers") from None
        if answer is not None and "error" in answer:
            raise ConfigError(answer["error"])
        if answer is not None:
            self.ready, self.pid = True, answer["pid"]
        elif late:
            raise ConfigError(f"loading {what} took over {_START_TIMEOUT_S:.0f} s; {if_slow}")
        return answer

    # --- end -------------------------------------------------------------------------------------------------------

    def has_ended(self) -> bool:
        return self.supervisor.has_ended()

    def ended(self) -> str:
        """How the process ended, in words, with the last line it wrote."""
        try:
            how = self.supervisor.how_it_ended()
        except subprocess.TimeoutExpired:
            return "closed the pipe that carries its answers and went on; it was killed"
        lines = self.supervisor.last_lines()
        return f"{self._called} died ({how})" + (f": {lines[-1][:200]}" if lines else "")

    def trim_log(self) -> None:
        if os.fstat(self._log.fileno()).st_size > _MAX_LOG_BYTES:
            os.ftruncate(self._log.fileno(), 0)

    def kill(self) -> None:
        """End the worker and all that it has started."""
        self.supervisor.end()
        for descriptor in (self._request_fd, self.answer_fd):
            os.close(descriptor)
        self._log.close()


def wait_for(processes: Sequence[AskedProcess]) -> None:
    """Until one of them has something to say or is late."""
    if not processes:
        return
    with selectors.DefaultSelector() as selector:
        for process in processes:
            selector.register(process.answer_fd, selectors.EVENT_READ)
        selector.select(max(0.0, min(process.deadline for process in processes) - time.monotonic()))


def read_request(stream: Any) -> Any:
    """In the process: the next thing that it is asked; None once nobody asks."""
    header = stream.read(8)
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0])) if len(header) == 8 else None


def write_answer(stream: Any, answer: Mapping[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _queued_s(pid: int) -> float:
    """Seconds in which the process could have run and had no CPU; 0 where the kernel does not count them."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
