"""Whole versions over a process group of trainer and workers: no file, and one pass however many workers there are.

A message says what comes; the tensors themselves come beside it, so one end sends while the other is told to receive.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.distributed.channel import Channel, as_bytes, join, open_store
from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.transfer.whole import num_bytes, portions
from posttrain.types import Moved

_GRACE_S = 2.0
"""An operation that is late says so itself, where it gets to it."""


class BroadcastSender:
    """Rank 0. Where an operation fails the channel is closed; `connect` opens another."""

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        self._size, self._timeout_s = num_workers + 1, timeout_s
        self._channel: Channel | None = None

    def connect(self, init: Callable[[dict[str, Any]], None]) -> None:
        self.close()
        store, port = open_store(self._timeout_s)
        met: list[Channel] = []
        with beside(lambda: met.append(Channel(store, 0, self._size, self._timeout_s)), self._timeout_s):
            init({"port": port, "size": self._size, "timeout_s": self._timeout_s})
        self._channel = met[0]

    def send(
        self, tensors: Iterator[tuple[str, torch.Tensor]], version: int, update: Callable[[dict[str, Any]], None]
    ) -> Moved:
        if self._channel is None:
            raise EngineError("a channel for weights is closed since it failed; connect first")
        moved = 0
        try:
            for portion in portions(tensors):
                self._send(self._channel, portion, update)
                moved += num_bytes(portion)
        except BaseException:
            # Bytes of what failed may still be on their way.
            self.close()
            raise
        return Moved(moved, moved)

    def _send(
        self, channel: Channel, portion: list[tuple[str, torch.Tensor]], update: Callable[[dict[str, Any]], None]
    ) -> None:
        told = [_told(name, tensor) for name, tensor in portion]
        with beside(lambda: [channel.send(tensor) for _, tensor in portion], self._timeout_s):
            update({"tensors": told})

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class BroadcastReceiver:
    """A worker."""

    def __init__(self, message: dict[str, Any]) -> None:
        self._channel = join(message["port"], message["size"], message["timeout_s"])

    def take(self, message: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
        """Of a message all tensors or none. Raises: EngineError for one that is not what the message says."""
        found = [
            (told["name"], told["sha256"], self._channel.receive(told["shape"], getattr(torch, told["dtype"])))
            for told in message["tensors"]
        ]
        for name, expected, tensor in found:
            if (got := _digest(tensor)) != expected:
                raise EngineError(f"{name} arrived torn: its digest is {got[:12]}, expected {expected[:12]}")
        return [(name, tensor) for name, _, tensor in found]

    def finish(self) -> None:
        pass

    def close(self) -> None:
        self._channel.close()


@contextmanager
def beside(work: Callable[[], object], timeout_s: float) -> Iterator[None]:
    """`work` in a thread of its own while the block runs, whose error goes first: the other end knows more.

    Raises: what `work` raised; EngineGoneError where it does not end within `timeout_s` after the block.
    """
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again where the block ends
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True, name="weights")
    thread.start()
    yield
    thread.join(timeout_s + _GRACE_S)
    if thread.is_alive():
        raise EngineGoneError(
            f"the trainer's end of a channel for weights was still busy {timeout_s:g} s after the workers'"
        )
    if failed:
        raise failed[0]


def _told(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(tensor.shape), "dtype": dtype, "sha256": _digest(tensor)}


def _digest(tensor: torch.Tensor) -> str:
    raw: Any = as_bytes(tensor).cpu().numpy()
    return hashlib.sha256(memoryview(raw)).hexdigest()
