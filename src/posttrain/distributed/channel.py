"""Bytes of tensors from one process to others of this machine, over a process group of their own.

Whatever default group a process is in, or none, is not touched. All of it listens on the loopback address alone.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

from posttrain.errors import EngineError, EngineGoneError

_HOST = "127.0.0.1"


class Channel:
    """One end, after all have met; rank 0 is the one that sends. No operation takes longer than `timeout_s`.

    Raises, from each operation: EngineGoneError where another end is gone or late.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        with _speaking("meet", timeout_s):
            device = _device()
            store.set(f"device/{rank}", device)
            devices = [store.get(f"device/{other}").decode() for other in range(size)]
            self._backend = backend_of(devices)
            self._group: Any = _group(
                self._backend, PrefixStore("weights", store), rank, size, timedelta(seconds=timeout_s)
            )
        # Rank 0 keeps the store itself; the others leave it when they go.
        self._store: Any = store

    def send(self, tensor: torch.Tensor) -> None:
        self._broadcast(self._placed(as_bytes(tensor)))

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        raw = self._placed(torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8))
        self._broadcast(raw)
        return raw.view(dtype).reshape(tuple(shape))

    def close(self) -> None:
        """What is under way ends by its deadline."""
        self._group = self._store = None

    def _placed(self, raw: torch.Tensor) -> torch.Tensor:
        return raw.to("cuda" if self._backend == "nccl" else "cpu")

    def _broadcast(self, raw: torch.Tensor) -> None:
        if not raw.numel():
            return
        with _speaking("broadcast", self._timeout_s):
            self._group.broadcast(raw, 0).wait(timedelta(seconds=self._timeout_s))
            if self._backend == "nccl":
                torch.cuda.synchronize()


def open_store(timeout_s: float) -> tuple[Any, int]:
    """Where the ends of a channel meet, and its port, a free one. It is there as long as somebody holds it."""
    # A store that opens its own port listens on all addresses of the machine.
    listening = socket.create_server((_HOST, 0))
    port = listening.getsockname()[1]
    store = TCPStore(
        _HOST, port, None, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )  # fmt: skip
    return store, port


def join(port: int, size: int, timeout_s: float) -> Channel:
    """A receiving end of the channel whose store is at `port`. Ranks go to whoever comes, from 1 on."""
    with _speaking("meet", timeout_s):
        store = TCPStore(
            _HOST, port, None, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
        rank = store.add("receivers", 1)
    if rank >= size:
        raise EngineError(f"receiver {rank} of weights came, and {size - 1} were expected")
    return Channel(store, rank, size, timeout_s)


def backend_of(devices: Sequence[str]) -> str:
    """nccl where each end has a GPU of its own, else gloo through the host: nccl refuses two ends on one GPU."""
    return "nccl" if "cpu" not in devices and len(set(devices)) == len(devices) else "gloo"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its elements in order, on its device; shared with it where it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _device() -> str:
    return str(torch.cuda.get_device_properties("cuda").uuid) if torch.cuda.is_available() else "cpu"


def _group(backend: str, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    if backend == "nccl":
        from torch.distributed import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return ProcessGroupNCCL(store, rank, size, nccl)
    kind: Any = ProcessGroupGloo  # its stubs leave out how options are made
    gloo = kind._Options()
    gloo._timeout = timeout
    # By default the machine's name decides the address.
    gloo._devices = [kind.create_device(hostname=_HOST)]
    return ProcessGroupGloo(store, rank, size, gloo)


@contextmanager
def _speaking(doing: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch.distributed has no narrower one for gloo
        reason = str(error).splitlines()[0][:300]
        raise EngineGoneError(
            f"could not {doing} with the other end of a channel for weights within {timeout_s:g} s: {reason}"
        ) from error
