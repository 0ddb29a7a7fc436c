"""A side's end of the comparison: it works when told to, reports what it did, and waits.

Each side runs in its own process; only one of them works at a time. What is timed is between being told and the end
of the step, so waiting counts for nobody.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any


class Turns:
    """Counts steps into units of `unit_steps`, or of an epoch. The first unit (one step if counted) warms up."""

    def __init__(self, unit_steps: int | None) -> None:
        self._unit_steps = unit_steps
        # Libraries print to stdout; the conversation keeps a copy of it to itself.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.seconds_elsewhere = 0.0
        self._wanted, self._epochs = 1, 0
        self._begin()

    def _begin(self) -> None:
        self._steps, self._tokens, self._losses = 0, 0, list[float]()
        self._extra = 0.0
        self._busy, self._own = busy_seconds(), own_seconds()
        self._clock = time.perf_counter()

    def step_done(self, tokens: int, loss: float | None = None, epoch: float = 0.0, extra_seconds: float = 0.0) -> None:
        """Report if the unit is complete, then wait for the word to go on. `extra_seconds` are charged to this step."""
        _synchronize()
        self._steps += 1
        self._tokens += tokens
        self._extra += extra_seconds
        if loss is not None:
            self._losses.append(loss)
        if self._unit_steps is None:
            complete, self._epochs = int(epoch + 1e-6) > self._epochs, int(epoch + 1e-6)
        else:
            complete = self._steps >= self._wanted
        if complete:
            self._report()
            self._wait()

    def _report(self) -> None:
        wall = time.perf_counter() - self._clock
        others = (busy_seconds() - self._busy) - (own_seconds() - self._own)
        self._say({
            "seconds": wall + self._extra, "steps": self._steps, "tokens": self._tokens, "losses": self._losses,
            "others_cpus": max(0.0, others / wall), "peak_mb": peak_mb(),
        })  # fmt: skip

    def _say(self, record: dict[str, Any]) -> None:
        self._out.write(json.dumps(record) + "\n")
        self._out.flush()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            # Told to stop: nothing after the timed steps (export, checkpoint) is part of the comparison.
            os._exit(0)
        self._wanted = self._unit_steps or 0
        self._begin()


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, *_ = (int(field) for field in fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def peak_mb() -> float:
    """Peak resident memory of the process; on a GPU the peak of allocated device memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _synchronize() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
