"""The processes of a run: one, or many under torchrun. Who this one is, and Python values between them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from posttrain.protocols import Ranks

T = TypeVar("T")


class SingleProcess:
    """One process: every collective is the identity."""

    rank = 0
    world_size = 1
    is_main = True

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        pass


class ProcessGroup:
    """Ranks under torchrun."""

    def __init__(self) -> None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(backend)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.is_main = self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items[self.rank :: self.world_size])

    def sum(self, values: Sequence[float]) -> list[float]:
        # Through Python objects: exact float64 on every backend, and the lists are short.
        return [sum(column) for column in zip(*self.gather([float(value) for value in values]), strict=True)]

    def gather(self, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        dist.barrier()


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """The ranks that this process was started among."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SingleProcess()
        return
    group = ProcessGroup()
    try:
        yield group
    finally:
        dist.destroy_process_group()
