"""What surrounds a loop: its folder, its sinks, its checkpoints, and the wish to stop. Knows no objective."""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from posttrain.checkpoint.store import CheckpointStore, check_writable
from posttrain.config.stages import TrainKeys
from posttrain.data.dataset import Dataset, sequences
from posttrain.errors import TrainingError
from posttrain.files import read_json, write_json
from posttrain.health.monitor import Monitor
from posttrain.health.rules import rules_for
from posttrain.models.export import model_digest, save_policy, source_digest
from posttrain.models.policy import Policy
from posttrain.protocols import MetricSink, Topology
from posttrain.rollout.sampling import request_seed
from posttrain.tracking.jsonl import JsonlSink
from posttrain.tracking.multi import MultiSink
from posttrain.types import CheckpointRef, Severity, StepReport, TokenSeq

log = logging.getLogger(__name__)

_HOLDING = frozenset({"evaluate", "hold", "rollback", "stop"})
"""Actions after which a model is not promoted."""

_EXAMPLES = 3

EXIT_STOPPED = 75
"""Exit code of a polite stop: the run is saved and can be started again."""


class StoppedPolitely(Exception):
    """SIGTERM or Ctrl-C: the step in hand was finished and saved."""


@dataclass(frozen=True)
class StageResult:
    """What a stage made."""

    kind: str
    folder: Path
    model_dir: Path
    model_digest: str
    parent_digest: str
    steps: int
    tokens: int
    wall_s: float
    metrics: Mapping[str, float]
    held: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        record = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("folder", "model_dir")
        }
        return record | {"metrics": dict(self.metrics), "held": list(self.held)}

    @classmethod
    def load(cls, folder: Path) -> StageResult:
        record = read_json(folder / "result.json")
        record |= {"folder": folder, "model_dir": folder / "model", "held": tuple(record["held"])}
        return cls(**record)


@dataclass
class Progress:
    """What a loop carries from step to step besides weights; all of it is in the checkpoint."""

    step: int = 0
    tokens: int = 0
    wall_s: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    capture: Callable[[], dict[str, Any]] = field(default=dict, compare=False)
    """Makes `extra` when a checkpoint is taken. All ranks call it."""


class Stage:
    """The surroundings of one loop. A loop calls `resume`, then `finish_step` after every step, then `done`."""

    def __init__(
        self, kind: str, folder: Path, keys: TrainKeys, topology: Topology,
        watchers: Callable[[str, int], Sequence[MetricSink]] | None = None, stop: StopFlag | None = None,
    ) -> None:  # fmt: skip
        """`watchers(kind, total_steps)` makes the sinks that stand beside `metrics.jsonl`: a live view, a tracker."""
        self.kind, self.folder, self.keys, self.topology = kind, folder, keys, topology
        self.store = CheckpointStore(folder / "checkpoints", keep_last=keys.save_total_limit)
        self.stop = stop or StopFlag()
        self.held: list[str] = []
        self._watchers = watchers
        self._sink: MetricSink | None = None
        self._monitor = Monitor(kind, rules_for(kind, keys.health))
        self._clock = time.monotonic()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[tuple[int, dict[str, Any]]] | None = None

    # --- start -------------------------------------------------------------------------------------------------

    def resume(self, policy: Policy, optimizer: torch.optim.Optimizer, total_steps: int) -> Progress:
        """Where to go on: the newest valid checkpoint, or the beginning. Cuts the metrics back to it."""
        if self.topology.is_main:
            weights = sum(p.numel() * p.element_size() for _, p in policy.trainable())
            check_writable(self.folder, needed_bytes=4 * weights)
        progress = Progress()
        ref = self.topology.broadcast(self.store.newest_valid() if self.topology.is_main else None)
        if ref is not None:
            progress = self.load(ref, policy, optimizer)
            log.info("%s: going on after step %d", self.kind, progress.step)
        if self.topology.is_main:
            records = JsonlSink(self.folder)
            records.truncate_to(progress.step)
            self._sink = MultiSink([records, *(self._watchers(self.kind, total_steps) if self._watchers else ())])
        self._clock = time.monotonic() - progress.wall_s
        return progress

    def load(self, ref: CheckpointRef, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
        """Weights, optimizer and progress of a checkpoint."""
        state = read_json(ref.path / "state.json")
        self.topology.load_state(policy.model, load_file(ref.path / "weights.safetensors"))
        self.topology.load_optimizer_state(
            policy.model, optimizer, _unflatten(load_file(ref.path / "optimizer.safetensors"), state["scalars"])
        )
        self._monitor.load_state(state["health"])
        self.held = list(state["held"])
        return Progress(state["step"], state["tokens"], state["wall_s"], state["extra"])

    def describe_data(self, decode: Callable[[Sequence[int]], str], *datasets: Dataset[Any] | None) -> None:
        """Say what was read, kept and skipped, and write it to `summary.json` with examples of the loss mask."""
        if not self.topology.is_main:
            return
        present = [data for data in datasets if data is not None]
        for line in (line for data in present for line in data.summary.lines()):
            log.info("%s", line)
        shown = [sequence for row in present[0].rows[:_EXAMPLES] for sequence in sequences(row)]
        examples = [{"origin": str(s.origin), "segments": mask_segments(s, decode)} for s in shown]
        write_json(
            self.folder / "summary.json",
            {"datasets": [data.summary.to_json() for data in present], "examples": examples},
        )

    # --- each step ---------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """All of torch's randomness in a step (dropout) follows from seed, step and rank, so none is to be saved."""
        torch.manual_seed(request_seed(self.keys.seed, step, self.topology.rank) >> 1)
        self._step_clock = time.monotonic()

    def times(self, *, rollout_s: float) -> dict[str, float]:
        """How a step of RL divides into sampling and training, in seconds."""
        return {"time/rollout_s": rollout_s, "time/train_s": time.monotonic() - self._step_clock - rollout_s}

    def finish_step(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        metrics: dict[str, float],
        last: bool,
        best_score: float | None = None,
    ) -> None:
        """Log, judge, save if it is time, and stop if that is wished. `progress.step` counts finished steps.

        `best_score` is given where this step is the best so far; its checkpoint is then kept whatever comes.

        Raises: StoppedPolitely.
        """
        progress.wall_s = time.monotonic() - self._clock
        metrics["step_time"] = time.monotonic() - self._step_clock
        step = progress.step
        if step % self.keys.logging_steps == 0 or last:
            self.log(step, metrics | {"num_tokens": float(progress.tokens)})
        self._judge(step, metrics)
        stopping = self.topology.sum([float(self.stop.is_set)])[0] > 0
        due = self.keys.save_steps > 0 and step % self.keys.save_steps == 0
        if best_score is not None:
            # Marked first: a mark without its checkpoint is made good when the step is run again, not so the reverse.
            self.flush()
            if self.topology.is_main:
                self.store.mark_best(step, best_score)
        if due or last or stopping or best_score is not None:
            self.save(policy, optimizer, progress, wait=last or stopping)
        if stopping and not last:
            raise StoppedPolitely(f"{self.kind}: stopped after step {step}, saved; start again to go on")

    def _judge(self, step: int, metrics: Mapping[str, float]) -> None:
        """Findings become events; those that ask for it hold promotion. Raises: TrainingError for a hard one."""
        for finding in self._monitor.observe(StepReport(step, metrics)):
            record = {"rule": finding.rule, "severity": finding.severity.value, "action": finding.action}
            self.event("finding", step, record | {"message": finding.message, "evidence": dict(finding.evidence)})
            if finding.severity is Severity.HARD:
                raise TrainingError(f"step {step}: {finding.message} The last good checkpoint is kept")
            if finding.action in _HOLDING and finding.rule not in self.held:
                self.held.append(finding.rule)

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, *, wait: bool = True) -> None:
        """A checkpoint of everything the loop needs. All ranks call it, rank 0 writes.

        Without `wait` only the copy of the tensors is made here, and a thread writes them; the next save waits for it.
        Raises: CheckpointError, also for the write that was under way.
        """
        self.flush()
        progress.extra = progress.capture()
        names = {name for name, _ in policy.trainable()}
        weights = {n: t.clone() for n, t in self.topology.full_state(policy.model).items() if n in names}
        tensors, scalars = _flatten(self.topology.full_optimizer_state(policy.model, optimizer))
        if self.topology.is_main:
            state = {
                "step": progress.step,
                "tokens": progress.tokens,
                "wall_s": progress.wall_s,
                "extra": progress.extra,
            }
            state |= {"scalars": scalars, "health": self._monitor.state(), "held": list(self.held)}
            self._writing = self._writer.submit(self._write, progress.step, weights, tensors, state)
            if wait:
                self.flush()
        self.topology.barrier()

    def flush(self) -> None:
        """Wait until the checkpoint under way is on disk. Raises: CheckpointError if it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            self.event("checkpoint", *writing.result())

    def _write(
        self, step: int, weights: Mapping[str, torch.Tensor], tensors: dict[str, torch.Tensor], state: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any]]:
        def fill(folder: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "weights.safetensors")
            save_file(tensors, folder / "optimizer.safetensors")
            write_json(folder / "state.json", state)

        started = time.monotonic()
        ref = self.store.save(step, fill)
        size = sum(path.stat().st_size for path in ref.path.iterdir())
        return step, {"bytes": size, "seconds": round(time.monotonic() - started, 3)}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._sink is not None:
            self._sink.log(step, metrics)

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        if self._sink is not None:
            self._sink.event(kind, step, details)

    # --- end ---------------------------------------------------------------------------------------------------

    def done(self, policy: Policy, progress: Progress, metrics: Mapping[str, float]) -> StageResult:
        """Export the model and write `result.json`. All ranks call it."""
        state = self.topology.full_state(policy.model) if policy.sharded else None
        model_dir = self.folder / "model"
        if self.topology.is_main:
            report = save_policy(policy, model_dir, self.keys, state=state)
            if report is not None:
                self.event(
                    "merge", progress.step, {"max_logit_difference": report.max_logit_difference, "base": report.base}
                )
        self.topology.barrier()
        result = StageResult(
            kind=self.kind, folder=self.folder, model_dir=model_dir, model_digest=model_digest(model_dir),
            parent_digest=source_digest(policy.source),
            steps=progress.step, tokens=progress.tokens, wall_s=progress.wall_s, metrics=dict(metrics), held=tuple(self.held),
        )  # fmt: skip
        if self.topology.is_main:
            write_json(self.folder / "result.json", result.to_json())
        self.close()
        return result

    def close(self) -> None:
        self.flush()
        self._writer.shutdown()
        if self._sink is not None:
            self._sink.close()
            self._sink = None


class StopFlag:
    """Set by the first SIGTERM or Ctrl-C; the second one ends the process at once."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread can listen for signals; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise SystemExit(128 + number)
        self._event.set()


def mask_segments(sequence: TokenSeq, decode: Callable[[Sequence[int]], str]) -> list[tuple[str, bool]]:
    """The text of a sequence in runs of trained and untrained tokens."""
    runs = groupby(zip(sequence.ids, sequence.loss_mask, strict=True), key=lambda pair: pair[1])
    return [(decode([token for token, _ in run]), trained) for trained, run in runs]


def _flatten(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Optimizer state as named tensors, and what is not a tensor."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            # 8-bit optimizers keep a second level.
            inner_tensors, inner_scalars = _flatten(value)
            tensors |= {f"{name}|{key}": tensor for key, tensor in inner_tensors.items()}
            scalars |= {f"{name}|{key}": scalar for key, scalar in inner_scalars.items()}
        elif isinstance(value, torch.Tensor):
            # A copy: the optimizer goes on while the checkpoint is written.
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[name] = json.loads(json.dumps(value))
    return tensors, scalars


def _unflatten(tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {}
    for flat, value in {**tensors, **scalars}.items():
        *path, key = flat.split("|")
        place: dict[str, Any] = state
        for name in path:
            place = place.setdefault(name, {})
        place[key] = value
    return state
