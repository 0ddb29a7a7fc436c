"""The process in which rewards run. Started by `workers.py`; requests come pickled on one pipe, answers go as JSON lines on another.

Knows nothing of deadlines: it is killed from outside. Imports no torch.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.resolve import MissingColumnError, RewardFunction, load_reward, reward_names

_MAX_MESSAGE_CHARS = 500
_PR_SET_PDEATHSIG = 1


def main(request_fd: int, answer_fd: int) -> None:
    """Serve until the request pipe closes."""
    requests = os.fdopen(request_fd, "rb")
    answers = os.fdopen(answer_fd, "w", encoding="ascii")
    setup = _read(requests)
    assert setup is not None
    _die_with_parent(setup["from_main_thread"])
    functions = _load(setup, answers)
    if setup["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    while (request := _read(requests)) is not None:
        _write(answers, _answer(functions[request["function"]], request))


def _die_with_parent(from_main_thread: bool) -> None:
    """A worker that hangs must not outlive the training process, however that ended."""
    parent = os.getppid()
    if from_main_thread:
        # The signal follows the *thread* that started us. It also reaches a worker that never lets go of the interpreter.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _read(stream: Any) -> Any:
    header = stream.read(8)
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0])) if len(header) == 8 else None


def _write(stream: Any, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer) + "\n")
    stream.flush()


def _load(setup: dict[str, Any], answers: Any) -> list[RewardFunction]:
    folder = Path(setup["folder"]) if setup["folder"] else None
    kwargs, names = setup["kwargs"], reward_names(setup["specs"])
    try:
        functions = [
            load_reward(spec, kwargs.get(name), folder, timeout_s=setup["timeout_s"])
            for spec, name in zip(setup["specs"], names, strict=True)
        ]
    except ConfigError as error:
        _write(answers, {"error": str(error)})
        sys.exit(1)
    _write(answers, {"ready": True})
    return functions


def _answer(function: RewardFunction, request: dict[str, Any]) -> dict[str, Any]:
    """`values` and `reasons` per completion; or `failed` (this call raised), `column` or `count` (the contract is broken)."""
    completions = request["completions"]
    try:
        result = function(request["prompts"], completions, **request["columns"])
        values = _as_list(result)
    except MissingColumnError as error:
        return {"column": str(error)}
    except BaseException as error:  # noqa: BLE001 - the process boundary; a reward may raise anything, SystemExit too
        return {"failed": _describe(error)}
    if values is None or len(values) != len(completions):
        got = f"{len(values)} values" if values is not None else f"{type(result).__name__}"
        return {
            "count": f"{function.where}: reward {function.name!r} returned {got} for {len(completions)} completions"
        }
    checked = [_number(value) for value in values]
    return {"values": [value for value, _ in checked], "reasons": [reason for _, reason in checked]}


def _as_list(result: Any) -> list[Any] | None:
    if hasattr(result, "tolist"):  # numpy arrays and tensors
        result = result.tolist()
    return list(result) if isinstance(result, Sequence) and not isinstance(result, (str, bytes)) else None


def _number(value: Any) -> tuple[float | None, str | None]:
    """A finite float, or None with the reason. A returned None has no reason: it is the reward's own choice."""
    if value is None:
        return None, None
    if isinstance(value, (str, bytes)):
        return None, f"returned {type(value).__name__} {value[:40]!r}, expected a number or None"
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        return None, f"returned {type(value).__name__}, expected a number or None ({error})"
    return (number, None) if math.isfinite(number) else (None, f"returned {number}")


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = str(Path(__file__).parent)
    user = [frame for frame in frames if not frame.filename.startswith((own, "<frozen"))] or frames
    place = f" ({Path(user[-1].filename).name}:{user[-1].lineno})" if user else ""
    text = f"raised {type(error).__name__}: {error}"
    return text[:_MAX_MESSAGE_CHARS] + place
