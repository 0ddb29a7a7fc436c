"""The process in which rewards run. Started as an `AskedProcess`; requests come pickled on one pipe, answers go as JSON lines on another.

Knows nothing of deadlines: it is killed from outside (`supervised.py`). Imports no torch.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.asked import read_request, write_answer
from posttrain.errors import ConfigError
from posttrain.grading.learned import split_learned
from posttrain.names import reward_names
from posttrain.rewards.resolve import MissingColumnError, RewardFunction, load_reward

_MAX_MESSAGE_CHARS = 500


def main(request_fd: str, answer_fd: str) -> None:
    """Serve until the request pipe closes."""
    _serve(int(request_fd), int(answer_fd))


def _serve(request_fd: int, answer_fd: int) -> None:
    requests = os.fdopen(request_fd, "rb")
    answers = os.fdopen(answer_fd, "w", encoding="ascii")
    setup = read_request(requests)
    assert setup is not None
    functions = _load(setup, answers)
    if setup["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_AS, (setup["memory_bytes"], setup["memory_bytes"]))
    while (request := read_request(requests)) is not None:
        write_answer(answers, {"id": request["id"], **_answer(functions[request["function"]], request)})


def _load(setup: dict[str, Any], answers: Any) -> dict[int, RewardFunction]:
    """The functions by their place among the rewards; what a model says is not asked here."""
    folder = Path(setup["folder"]) if setup["folder"] else None
    kwargs, names = setup["kwargs"], reward_names(setup["specs"])
    try:
        functions = {
            place: load_reward(spec, kwargs.get(name), folder, timeout_s=setup["timeout_s"])
            for place, (spec, name) in enumerate(zip(setup["specs"], names, strict=True))
            if not split_learned(spec)
        }
    except ConfigError as error:
        write_answer(answers, {"id": 0, "error": str(error)})
        sys.exit(1)
    reads = {place: function.reads() for place, function in functions.items()}
    write_answer(answers, {"id": 0, "pid": os.getpid(), "reads": reads})
    return functions


def _answer(function: RewardFunction, request: dict[str, Any]) -> dict[str, Any]:
    """`values` and `reasons` per completion; or `failed` (this call raised), `column` or `count` (the contract is broken)."""
    given = {**request["columns"], "prompts": request["prompts"], "completions": request["completions"]}
    before = {name: list(rows) for name, rows in given.items()}
    expected = len(request["completions"])
    try:
        result = function(**given)
        values = _as_list(result)
    except MissingColumnError as error:
        return {"column": str(error)}
    except BaseException as error:  # noqa: BLE001 - the process boundary; a reward may raise anything, SystemExit too
        return {"failed": _describe(error)}
    # Which score belongs to which completion is known only while the rows stay where they were.
    for name, rows in given.items():
        if len(rows) != expected or any(a is not b for a, b in zip(rows, before[name], strict=True)):
            return {"failed": f"changed its input {name!r} in place ({function.where}); work on a copy: list({name})"}
    if values is None or len(values) != expected:
        got = f"{len(values)} values" if values is not None else f"{type(result).__name__}"
        wanted = "expected a list with one number or None per completion"
        return {
            "count": f"{function.where}: reward {function.name!r} returned {got} for {expected} completions; {wanted}"
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
