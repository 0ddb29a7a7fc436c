"""Runs Python that nobody trusts: in namespaces of its own where the system permits, else under an unprivileged uid.

The child gets code and inputs and returns values as data; what they are compared with stays in this process, so there
is nothing in the child worth stealing. `docs/security.md` states what is defended and what is not.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from posttrain.grading.syscall_filter import filter_program

Isolation = Literal["namespaces", "uid", "limits"]
_CHILD = Path(__file__).with_name("sandbox_child.py")
_UID_BASE, _UID_RANGE = 1_600_000_000, 100_000_000
_PROBE_S = 60.0  # a busy machine must not look like one that permits nothing


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """What a run may use. `cpu_s` counts all its processes; `wall_s` is the clock of a script or of each call, `total_s` of all calls."""

    wall_s: float = 4.0
    total_s: float = 8.0
    cpu_s: int = 4
    memory_bytes: int = 512 << 20
    file_bytes: int = 16 << 20
    output_bytes: int = 1 << 20
    num_processes: int = 1


@dataclass(frozen=True, slots=True)
class CallResult:
    """What one call returned, as JSON data; or why there is no value. `answered` is False where the process ended before."""

    ok: bool
    value: Any = None
    reason: str = ""
    answered: bool = True


def run_calls(
    code: str,
    calls: Sequence[tuple[str, Sequence[Any]]],
    limits: SandboxLimits | None = None,
    go_on: Callable[[int, CallResult], bool] = lambda index, result: True,
) -> list[CallResult]:
    """Execute `code`, then each `(function, args)` in turn, in one process. One result per call, in order.

    Each call has `wall_s`; one that ends the process leaves those behind it unanswered, as does a False from `go_on`.
    """
    nonce = secrets.token_hex(16)
    limits = limits or SandboxLimits()
    request = {"mode": "calls", "code": code, "calls": [[name, list(args)] for name, args in calls], "nonce": nonce}
    results: dict[int, CallResult] = {}

    def each(line: bytes) -> bool:
        index, result = _parse(line, nonce)
        if index is None or index in results or not 0 <= index < len(calls):
            return True
        results[index] = result
        return go_on(index, result)

    _, reason = _run(request | {"record_bytes": limits.output_bytes}, limits, isolation(), each)
    missing = CallResult(False, reason=reason or "ended before it returned a value", answered=False)
    return [results.get(index, missing) for index in range(len(calls))]


def _parse(line: bytes, nonce: str) -> tuple[int | None, CallResult]:
    nothing = CallResult(False)
    if not line.startswith(nonce.encode()):
        return None, nothing
    try:
        record = json.loads(line[len(nonce) :])
    except (ValueError, RecursionError):
        return None, nothing
    if not isinstance(record, dict):
        return None, nothing
    fields = cast("dict[str, Any]", record)
    index = fields.get("i")
    if type(index) is not int:
        return None, nothing
    if "v" in fields:
        return index, CallResult(True, fields["v"])
    return index, CallResult(False, reason=str(fields.get("e", ""))[:500])


def run_script(code: str, stdin: str, limits: SandboxLimits | None = None) -> CallResult:
    """Execute `code` as a script; the value is what it wrote to its standard output."""
    request = {"mode": "script", "code": code, "stdin": stdin, "nonce": ""}
    output, reason = _run(request, limits or SandboxLimits(), isolation())
    return CallResult(False, reason=reason) if reason else CallResult(True, output.decode("utf-8", "replace"))


def _run(
    request: dict[str, Any],
    limits: SandboxLimits,
    level: Isolation,
    each: Callable[[bytes], bool] | None = None,
    filter_: bytes | None = None,
) -> tuple[bytes, str]:
    """(what the child wrote to its result pipe, why it did not end well).

    With `each`, complete lines go there instead; every one starts the clock anew, and a False ends the run. `filter_`
    stands in for the system-call filter that works here.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-sandbox-") as folder:
        uid = _UID_BASE + secrets.randbelow(_UID_RANGE)
        confinement = _confinement(limits, level, Path(folder), uid)
        confinement["filter"] = (call_filter() if filter_ is None else filter_).hex()
        payload = json.dumps(request | confinement).encode("ascii")
        read_fd, write_fd = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", str(_CHILD), str(write_fd)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, env={}, cwd="/", pass_fds=(write_fd,), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(write_fd)
        try:
            return _converse(process, payload, read_fd, limits, each)
        finally:
            os.close(read_fd)
            _end(process, level, uid)


def _confinement(limits: SandboxLimits, level: Isolation, folder: Path, uid: int) -> dict[str, Any]:
    prefixes = {str(Path(p).resolve()) for p in (sys.base_prefix, sys.base_exec_prefix, Path(os.__file__).parent)}
    return {
        "level": level, "folder": str(folder), "uid": uid, "is_root": os.geteuid() == 0, "prefixes": sorted(prefixes),
        "cpu_s": limits.cpu_s, "memory_bytes": limits.memory_bytes, "file_bytes": limits.file_bytes, "num_processes": limits.num_processes,
    }  # fmt: skip


def _converse(
    process: subprocess.Popen[bytes],
    payload: bytes,
    read_fd: int,
    limits: SandboxLimits,
    each: Callable[[bytes], bool] | None,
) -> tuple[bytes, str]:
    end = time.monotonic() + (limits.total_s if each else limits.wall_s)
    deadline = min(end, time.monotonic() + limits.wall_s)
    assert process.stdin is not None
    stdin = process.stdin.fileno()
    os.set_blocking(stdin, False)
    os.set_blocking(read_fd, False)
    output, left = bytearray(), memoryview(payload)
    with selectors.DefaultSelector() as selector:
        selector.register(read_fd, selectors.EVENT_READ)
        selector.register(stdin, selectors.EVENT_WRITE)
        while True:
            wait_s = deadline - time.monotonic()
            if wait_s <= 0:
                return bytes(
                    output
                ), f"took longer than {limits.total_s if deadline == end and each else limits.wall_s:g} s"
            for key, _ in selector.select(wait_s):
                if key.fd == read_fd:
                    data = os.read(read_fd, 1 << 16)
                    if not data:
                        return bytes(output), _status(process, deadline)
                    output += data
                    if each and b"\n" in data:
                        *lines, rest = output.split(b"\n")
                        output = bytearray(rest)
                        deadline = min(end, time.monotonic() + limits.wall_s)
                        if not all(each(bytes(line)) for line in lines):
                            return b"", "stopped"
                    if len(output) > limits.output_bytes:
                        return b"", f"returned more than {limits.output_bytes} bytes"
                else:
                    try:
                        left = left[os.write(stdin, left[: 1 << 16]) :]
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(stdin)
                        process.stdin.close()


def _status(process: subprocess.Popen[bytes], deadline: float) -> str:
    try:
        code = process.wait(max(0.05, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "closed its results and went on"
    return "" if code == 0 else f"ended with status {code}"


def _end(process: subprocess.Popen[bytes], level: Isolation, uid: int) -> None:
    """Kill all that the run started. In namespaces the death of process 1 takes the rest with it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None and not process.stdin.closed:
        with suppress(BrokenPipeError):
            process.stdin.close()
    if level == "uid":
        sweep = "import os, sys; os.setresuid(*[int(sys.argv[1])] * 3); os.kill(-1, 9)"
        subprocess.run([sys.executable, "-I", "-S", "-c", sweep, str(uid)], check=False, capture_output=True, env={})


@cache
def isolation() -> Isolation:
    """The strongest level that works here, tried once.

    namespaces: own user, pid, network, mount and ipc namespaces, an empty root with the interpreter read-only, no capabilities.
    uid: an unprivileged uid of its own with limits; network and world-readable files are within reach.
    limits: only limits and a kill of the process group, because this user may do no more.
    """
    levels: tuple[Isolation, ...] = ("namespaces", "uid") if os.geteuid() == 0 else ("namespaces",)
    for level in levels:
        if _works(level, b""):
            return level
    return "limits"


@cache
def call_filter() -> bytes:
    """The system-call filter; nothing where the kernel or the processor has none. Tried once."""
    program = filter_program(platform.machine())
    return program if program and _works("limits", program) else b""


def _works(level: Isolation, program: bytes) -> bool:
    probe = {"mode": "script", "code": "print(6 * 7)", "stdin": "", "nonce": ""}
    output, reason = _run(probe, SandboxLimits(wall_s=_PROBE_S), level, filter_=program)
    return not reason and output.strip() == b"42"
