"""Bytes between two ends that meet on the loopback address: as they were sent, in time or not at all."""

import os
import threading
import time
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from posttrain.distributed.channel import Channel, backend_of, join, open_store
from posttrain.errors import EngineError, EngineGoneError

_LISTEN = "0A"
_LOOPBACK = "0100007F"


@pytest.fixture
def ends():
    """`ends(timeout_s)`: the sending and a receiving end of one channel, in this process."""
    with ExitStack() as stack:

        def make(timeout_s=20.0):
            store, port = open_store(timeout_s)
            joined = []
            thread = threading.Thread(target=lambda: joined.append(join(port, 2, timeout_s)))
            thread.start()
            sending = Channel(store, 0, 2, timeout_s)
            thread.join()
            return [stack.enter_context(closing(end)) for end in (sending, joined[0])]

        yield make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_arrive_to_the_bit_and_in_order(ends, dtype):
    sending, receiving = ends()
    sent = [torch.randn(size).mul(100).to(dtype) for size in [(40, 8), (), (0, 3), (5,)]] + [
        torch.arange(12).to(dtype).reshape(3, 4).T
    ]
    thread = threading.Thread(target=lambda: [sending.send(tensor) for tensor in sent])
    thread.start()
    found = [receiving.receive(tensor.shape, dtype) for tensor in sent]
    thread.join()
    assert [torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(sent, found, strict=True)] == [True] * len(sent)


def test_the_default_group_is_left_alone(ends):
    before = dist.group.WORLD  # vLLM in the process has one, and keeps it
    ends()
    assert dist.group.WORLD is before


def test_who_waits_for_nothing_hears_of_it_in_time(ends):
    _, receiving = ends(1.0)
    started = time.monotonic()
    with pytest.raises(EngineGoneError, match=r"could not broadcast with the other end of a channel .* within 1 s"):
        receiving.receive((8,), torch.float32)
    assert time.monotonic() - started < 20


def test_nobody_comes():
    store, _ = open_store(1.0)
    with pytest.raises(EngineGoneError, match="could not meet"):
        Channel(store, 0, 2, 1.0)


def test_nobody_keeps_the_store():
    store, port = open_store(1.0)
    del store
    with pytest.raises(EngineGoneError, match="could not meet"):
        join(port, 2, 1.0)


def test_one_too_many_is_refused():
    store, port = open_store(5.0)
    store.add("receivers", 1)
    with pytest.raises(EngineError, match="receiver 2 of weights came, and 1 were expected"):
        join(port, 2, 5.0)


def listening():
    """Addresses of this process that wait for connections, by address family."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(entry).removeprefix("socket:[").rstrip("]"))
        except OSError:
            continue
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    return {row[1] for row in rows if row[3] == _LISTEN and row[9] in inodes}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")
def test_it_listens_on_the_loopback_address_alone(ends):
    before = listening()
    ends()
    opened = listening() - before
    assert len(opened) >= 2
    assert {address.partition(":")[0] for address in opened} == {_LOOPBACK}


@pytest.mark.parametrize(
    ("devices", "backend"),
    [(["cpu", "cpu"], "gloo"), (["a", "cpu"], "gloo"), (["a", "a"], "gloo"), (["a", "b"], "nccl")],
)
def test_only_ends_with_a_gpu_each_use_nccl(devices, backend):
    assert backend_of(devices) == backend
