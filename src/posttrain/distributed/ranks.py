"""The processes of a run: one, or many under torchrun. Who this one is, and Python values between them."""

from __future__ import annotations

import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from posttrain.distributed.host_memory import give_back_freed
from posttrain.distributed.launch import read_launch
from posttrain.distributed.meeting import Meeting, meet
from posttrain.protocols import Ranks

log = logging.getLogger(__name__)

T = TypeVar("T")

WAIT_S = 1800.0
"""How long a rank waits for another one where nobody says."""


class SingleProcess:
    """One process: every collective is the identity."""

    rank = 0
    world_size = 1
    is_main = True

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items)

    def among(self, items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
        return work(items)

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value

    def barrier(self) -> None:
        pass

    def main_only(self, work: Callable[[], T]) -> T:
        return work()

    def each(self, work: Callable[[], T]) -> list[T]:
        return [work()]


class ProcessGroup:
    """Ranks that have met; none waits longer than `timeout_s` for another one."""

    def __init__(self, meeting: Meeting, timeout_s: float) -> None:
        self._meeting, self._timeout_s = meeting, timeout_s
        self.rank, self.world_size, self.is_main = meeting.launch.rank, meeting.launch.world_size, meeting.is_main
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(meeting.launch.local_rank)
        else:
            give_back_freed()
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", meeting.store), rank=self.rank, world_size=self.world_size,
            timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip

    def share(self, items: Sequence[T]) -> list[T]:
        return list(items[self.rank :: self.world_size])

    def among(self, items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
        return work(items)

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

    def main_only(self, work: Callable[[], T]) -> T:
        return self._meeting.main_only(work, self._timeout_s)

    def each(self, work: Callable[[], T]) -> list[T]:
        return self._meeting.each(work, self._timeout_s)


@contextmanager
def join_ranks(meeting: Meeting | None = None, timeout_s: float = WAIT_S) -> Iterator[Ranks]:
    """The ranks that this process was started among; where they have not met yet, they do. Raises: ConfigError."""
    if meeting is None and (launch := read_launch(os.environ)) is not None:
        meeting = meet(launch, log.warning)
        meeting.refuse_other_code()
    if meeting is None:
        yield SingleProcess()
        return
    group = ProcessGroup(meeting, timeout_s)
    try:
        yield group
    finally:
        dist.destroy_process_group()
        _end_threads(sys.exc_info()[1])


def _end_threads(error: BaseException | None) -> None:
    """End gloo's threads, which end with the last who has their group: an interpreter that ends while one lets go of a tensor aborts.

    Groups are had by meshes, and meshes by torch's caches of what it did with shares, by cycles of FSDP, and by the frames that an
    error came through.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import _collective_utils, _redistribute
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()
        _redistribute.clear_redistribute_planner_cache()
        _redistribute._gen_transform_infos.cache_clear()
        _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear()
    gc.collect()
