"""Broadcast: worker processes get what the trainer has, or the trainer hears within seconds that they do not."""

import json
import subprocess
import sys
import time

import pytest
import torch

from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.transfer import TRANSFERS, TransferOptions, whole

WORKER = """
import json, sys
from posttrain.errors import EngineError
from posttrain.rollout.transfer import TRANSFERS

def answered(kind, message):
    global end
    if kind == "init":
        end = TRANSFERS["broadcast"].receiver(message)
        return {}
    return {name: [str(t.dtype), list(t.shape), t.float().flatten().tolist()] for name, t in end.take(message)}

print("{}", flush=True)
for line in sys.stdin:
    try:
        answer = answered(*json.loads(line))
    except EngineError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""
BIG = {"big": torch.zeros(16 << 20)}
"""More than what sockets hold for somebody who does not read."""


class Worker:
    """A process with a receiving end; it is told in JSON, as a server is."""

    def __init__(self):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", WORKER], stdin=pipe, stdout=pipe, text=True)

    def tell(self, kind, message):
        print(json.dumps([kind, message]), file=self.process.stdin, flush=True)

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise EngineGoneError("a worker is gone")
        found = json.loads(line)
        if "error" in found:
            raise EngineError(found["error"])
        return found

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def start_workers():
    """`start_workers(number)`: as many, which end with the module."""
    started = []

    def start(number):
        workers = [Worker() for _ in range(number)]
        started.extend(workers)
        for worker in workers:
            worker.answer()
        return workers

    yield start
    for worker in started:
        if not worker.process.stdout.closed:
            worker.kill()


@pytest.fixture(scope="module")
def workers(start_workers):
    return start_workers(2)


@pytest.fixture
def connected(tmp_path):
    """`connected(workers)`: a sending end that these have joined, and `update`, which tells them."""
    senders = []

    def connect(workers, timeout_s=20.0):
        sender = TRANSFERS["broadcast"].sender(TransferOptions(tmp_path, num_workers=len(workers), timeout_s=timeout_s))
        senders.append(sender)
        sender.connect(lambda message: told(workers, "init", message))
        return sender

    yield connect
    for sender in senders:
        sender.close()
    assert list(tmp_path.iterdir()) == []


def told(workers, kind, message):
    for worker in workers:
        worker.tell(kind, message)
    return [worker.answer() for worker in workers]


def named(dtype):
    shapes = {"embed": (40, 8), "norm": (8,), "scalar": (), "transposed": (3, 5), "empty": (0, 2)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return tensors | {"transposed": tensors["transposed"].T}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("portion", [1, 1 << 20])
def test_every_worker_gets_every_tensor_of_every_version_to_the_bit(workers, connected, dtype, portion, monkeypatch):
    monkeypatch.setattr(whole, "_PORTION_BYTES", portion)
    sender = connected(workers)
    for version in (1, 2):
        tensors, arrived = named(dtype), [{}, {}]

        def update(message, arrived=arrived):
            for held, found in zip(arrived, told(workers, "update", message), strict=True):
                held.update(found)

        moved = sender.send(iter(tensors.items()), version, update)
        expected = {name: [str(dtype), list(t.shape), t.float().flatten().tolist()] for name, t in tensors.items()}
        assert arrived == [expected, expected]
        assert moved.num_bytes == moved.whole_bytes == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_torn_tensor_is_refused_and_the_channel_closed_until_they_connect_again(workers, connected):
    sender = connected(workers)

    def torn(message):
        message["tensors"][1]["sha256"] = "0" * 64
        told(workers, "update", message)

    with pytest.raises(EngineError, match=r"norm arrived torn: its digest is \w{12}, expected 000000000000"):
        sender.send(iter(named(torch.float32).items()), 1, torn)
    with pytest.raises(EngineError, match="norm arrived torn"):
        workers[1].answer()
    with pytest.raises(EngineError, match="connect first"):
        sender.send(iter(named(torch.float32).items()), 2, torn)
    sender.connect(lambda message: told(workers, "init", message))
    sender.send(iter(named(torch.float32).items()), 2, lambda message: told(workers, "update", message))


def test_a_worker_that_does_not_read_is_late(workers, connected):
    sender, started = connected(workers, timeout_s=1.0), time.monotonic()
    with pytest.raises(EngineGoneError, match="could not broadcast"):
        sender.send(iter(BIG.items()), 1, lambda message: None)
    assert time.monotonic() - started < 10


def test_a_worker_that_is_sent_less_than_it_was_told_says_so_in_time(workers, connected):
    sender, started = connected(workers, timeout_s=1.0), time.monotonic()

    def more(message):
        message["tensors"].append(message["tensors"][0])
        told(workers[:1], "update", message)

    with pytest.raises(EngineError, match=r"could not broadcast .* within 1 s"):
        sender.send(iter(named(torch.float32).items()), 1, more)
    assert time.monotonic() - started < 10


def test_workers_that_do_not_come_are_not_waited_for(connected, workers, tmp_path):
    started = time.monotonic()
    sender = TRANSFERS["broadcast"].sender(TransferOptions(tmp_path, num_workers=1, timeout_s=1.0))
    with pytest.raises(EngineGoneError, match="could not meet"):
        sender.connect(lambda message: None)
    assert time.monotonic() - started < 10


def test_a_worker_killed_in_the_middle_is_noticed_within_seconds_and_another_one_is_connected(
    workers, start_workers, connected
):
    dying = start_workers(1)
    sender, started = connected(dying), time.monotonic()
    with pytest.raises(EngineGoneError, match="could not broadcast"):
        # Whoever tells it has not noticed.
        sender.send(iter(BIG.items()), 1, lambda message: dying[0].kill())
    assert time.monotonic() - started < 10
    sender.connect(lambda message: told(workers[:1], "init", message))
    sender.send(iter(named(torch.float32).items()), 1, lambda message: told(workers[:1], "update", message))
