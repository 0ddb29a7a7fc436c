"""How weights get from the trainer into the workers of an engine: a row of `TRANSFERS` for each way, keyed by `rollout.transfer`.

A row has two ends. The sending end is the trainer's; the receiving end lives in each worker, made from what `connect`
told it. Both speak in messages, which an engine carries: in this process as they are, to a server as JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from posttrain.rollout.transfer.broadcast import BroadcastReceiver, BroadcastSender
from posttrain.rollout.transfer.delta import DeltaReceiver, DeltaSender
from posttrain.rollout.transfer.whole import CopyReceiver, CopySender, FileReceiver, FileSender
from posttrain.types import Moved

ReceivedTensors = Iterable[tuple[str, torch.Tensor]]
TransferMessage = dict[str, Any]
Tell = Callable[[TransferMessage], None]
"""Hands a message to every worker; returns when all have taken it. Raises: EngineError."""


class SendingEnd(Protocol):
    """The trainer's."""

    def connect(self, init: Tell) -> None:
        """Once, before anything is sent: `init` makes the receiving ends, each from this message."""
        ...

    def send(self, tensors: Iterator[tuple[str, torch.Tensor]], version: int, update: Tell) -> Moved:
        """All tensors of one version, in as many messages as it takes."""
        ...

    def close(self) -> None: ...


class ReceivingEnd(Protocol):
    """A worker's."""

    def take(self, message: TransferMessage) -> ReceivedTensors:
        """The tensors that a message brings, as the trainer has them. Raises: EngineError for what is torn or out of order."""
        ...

    def finish(self) -> None:
        """All messages of a version have been taken. Raises: EngineError where some are missing."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TransferOptions:
    """What a sending end is made from. `folder` is the run's own, and goes with the engine, which computes in `dtype`.

    `delta_anchor`: of so many pushes that send only changes, one is whole. `num_workers`: processes that the model is split
    over; none of them waits longer than `timeout_s` for the other end.
    """

    folder: Path
    dtype: str = "float32"
    delta_anchor: int = 1
    num_workers: int = 1
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Transfer:
    """One way. `crosses_processes` says whether its messages can be written as JSON."""

    sender: Callable[[TransferOptions], SendingEnd]
    receiver: Callable[[TransferMessage], ReceivingEnd]
    crosses_processes: bool


TRANSFERS: Mapping[str, Transfer] = {
    "copy": Transfer(lambda options: CopySender(), lambda message: CopyReceiver(), crosses_processes=False),
    "file": Transfer(
        lambda options: FileSender(options.folder), lambda message: FileReceiver(), crosses_processes=True
    ),
    "delta": Transfer(
        lambda options: DeltaSender(options.folder, options.dtype, options.delta_anchor),
        lambda message: DeltaReceiver(),
        crosses_processes=True,
    ),
    "broadcast": Transfer(
        lambda options: BroadcastSender(options.num_workers, options.timeout_s),
        BroadcastReceiver,
        crosses_processes=True,
    ),
}
"""`rollout.transfer` → both ends. `shared` has no row: there an engine decodes with the very weights in training."""
