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
from collections.abc import Mapping
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
        own = own_seconds() - self._own
        others = (busy_seconds() - self._busy) - own
        self._say({
            "seconds": wall + self._extra, "cpu_seconds": own + self._extra, "steps": self._steps, "tokens": self._tokens, "losses": self._losses,
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


def recorded_trainer(trainer_type: type, turns: Turns) -> tuple[type, Any]:
    """A trainer of the transformers family, made to count its tokens and keep its losses; and the callback that ends a step."""
    from transformers import TrainerCallback

    seen = {"tokens": 0, "loss": 0.0}

    class Recorded(trainer_type):
        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            if isinstance(inputs, Mapping):
                seen["tokens"] += _real_tokens(inputs, self.processing_class.pad_token_id)
            loss = super().training_step(model, inputs, *args)
            seen["loss"] += float(loss)
            return loss

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            output = super()._generate_and_score_completions(inputs)
            seen["tokens"] += int(output["completion_mask"].sum())
            return output

    class EndOfStep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            tokens, loss = seen["tokens"], seen["loss"]
            seen.update(tokens=0, loss=0.0)
            turns.step_done(tokens, loss, state.epoch or 0.0)

    return Recorded, EndOfStep()


def _real_tokens(inputs: Mapping[str, Any], pad: int) -> int:
    """Without padding. The mask of packed rows numbers them, or is a square for each."""
    mask = inputs.get("attention_mask")
    real = mask if mask is not None and mask.dim() == 2 else inputs["input_ids"] != pad
    return int(real.count_nonzero())


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, *_ = (int(field) for field in fields)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """CPU seconds of this process and of those below it, ended or not."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage) + _living_below(os.getpid())


def _living_below(pid: int) -> float:
    below: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name, in parentheses, may hold anything.
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        number = int(path.parent.name)
        below.setdefault(int(fields[1]), []).append(number)
        used[number] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found, waiting = 0.0, list(below.get(pid, ()))
    while waiting:
        number = waiting.pop()
        found += used[number]
        waiting += below.get(number, ())
    return found


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
