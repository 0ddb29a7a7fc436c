"""What surrounds a loop: its folder, its sinks, its checkpoints, and the wish to stop. Knows no objective."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from posttrain.checkpoint.store import CheckpointStore, check_writable, disk_errors, sweep
from posttrain.config.stages import TrainKeys
from posttrain.data.dataset import Dataset, sequences
from posttrain.errors import TrainingError
from posttrain.files import read_json, write_json
from posttrain.health.checks import SKIPPED
from posttrain.health.controls import Controls, after
from posttrain.health.monitor import Monitor
from posttrain.health.rules import GUARDS, HOLDING, rules_for
from posttrain.models.export import model_digest, save_policy, source_digest
from posttrain.models.policy import Policy
from posttrain.protocols import MetricSink, Topology
from posttrain.recipes.rollback import Rollback, RolledBack, decide, discard_abandoned, read_rollbacks, restore_best
from posttrain.recipes.snapshot import flatten, unflatten
from posttrain.recipes.steering import first_controls, moved
from posttrain.rollout.sampling import request_seed
from posttrain.tracking.jsonl import EVENTS, JsonlSink, read_jsonl
from posttrain.tracking.multi import MultiSink
from posttrain.types import CheckpointRef, Finding, Severity, StepReport, TokenSeq

log = logging.getLogger(__name__)

_EXAMPLES = 3
_OF_THE_UPDATE = frozenset({"loss", "grad_norm", "update_norm"})

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
    rollbacks: tuple[Mapping[str, Any], ...] = ()
    """What the run was rolled back for and recovered from; it does not hold promotion."""

    def to_json(self) -> dict[str, Any]:
        record = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("folder", "model_dir")
        }
        return record | {"metrics": dict(self.metrics), "held": list(self.held), "rollbacks": list(self.rollbacks)}

    @classmethod
    def load(cls, folder: Path) -> StageResult:
        record = read_json(folder / "result.json")
        record |= {"folder": folder, "model_dir": folder / "model", "held": tuple(record["held"])}
        record["rollbacks"] = tuple(record.get("rollbacks", ()))
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
        self.store = CheckpointStore(folder / "checkpoints", keys.save_total_limit, keys.save_keep_every)
        self.stop = stop or StopFlag()
        self.held: list[str] = []
        self.validated: dict[str, float] = {}
        """The newest validation, which a run resumed at its end reports."""
        self.rollbacks: tuple[Rollback, ...] = topology.broadcast(read_rollbacks(folder) if topology.is_main else ())
        self.controls: Controls = self.rollbacks[-1].controls if self.rollbacks else first_controls(keys)
        self._watchers = watchers
        self._sink: MetricSink | None = None
        self._monitor = Monitor(kind, rules_for(kind, keys.health))
        self._clock = time.monotonic()
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[tuple[int, dict[str, Any]]] | None = None

    # --- start -------------------------------------------------------------------------------------------------

    def resume(self, policy: Policy, optimizer: torch.optim.Optimizer, total_steps: int) -> Progress:
        """Where to go on: the newest valid checkpoint, or the beginning. Cuts the metrics back to it.

        After a rollback what was abandoned is discarded first, and the controls it decided on hold from here.
        """
        if self.topology.is_main:
            weights = sum(p.numel() * p.element_size() for _, p in policy.trainable())
            check_writable(self.folder, needed_bytes=4 * weights)
            sweep(self.folder)
            sweep(self.store.folder)
            discard_abandoned(self.store, self.rollbacks)
        progress, going_back = Progress(), bool(self.rollbacks)
        ref = self.topology.broadcast(self.store.newest_valid() if self.topology.is_main else None)
        if ref is not None:
            progress = self.load(ref, policy, optimizer)
            going_back = self.controls.rollbacks < len(self.rollbacks)
            log.info("%s: going on after step %d", self.kind, progress.step)
        if going_back:
            self.controls = self.rollbacks[-1].controls
        if self.topology.is_main:
            if going_back:
                restore_best(self.store, None if ref is None else read_json(ref.path / "state.json").get("best"))
            self.store.retire(progress.step)
            records = JsonlSink(self.folder)
            records.truncate_to(progress.step)
            self._sink = MultiSink([records, *(self._watchers(self.kind, total_steps) if self._watchers else ())])
            self._tell_rollbacks(progress.step)
        self._clock = time.monotonic() - progress.wall_s
        return progress

    def _tell_rollbacks(self, step: int) -> None:
        """Each rollback is one event, however often the records were cut back since."""
        told = {event["number"] for event in read_jsonl(self.folder / EVENTS) if event["kind"] == "rollback"}
        for rollback in self.rollbacks:
            if rollback.number not in told:
                self.event("rollback", min(step, rollback.to_step), _told(rollback))

    def load(self, ref: CheckpointRef, policy: Policy, optimizer: torch.optim.Optimizer) -> Progress:
        """Weights, optimizer and progress of a checkpoint."""
        state = read_json(ref.path / "state.json")
        self.topology.load_state(policy.model, load_file(ref.path / "weights.safetensors"))
        self.topology.load_optimizer_state(
            policy.model, optimizer, unflatten(load_file(ref.path / "optimizer.safetensors"), state["scalars"])
        )
        self._monitor.load_state(state["health"])
        self.held, self.validated = list(state["held"]), dict(state["validated"])
        self.controls = Controls.from_json(state.get("controls", first_controls(self.keys).to_json()))
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
        torch.manual_seed(request_seed(self.controls.seed(self.keys.seed), step, self.topology.rank) >> 1)
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

        Raises: StoppedPolitely; RolledBack and TrainingError as `allows` does.
        """
        progress.wall_s = time.monotonic() - self._clock
        metrics["step_time"] = time.monotonic() - self._step_clock
        step = progress.step
        if step % self.keys.logging_steps == 0 or last:
            self.log(step, metrics | {"num_tokens": float(progress.tokens)})
        self.controls = moved(self.controls, self.keys, metrics)
        skipped = SKIPPED in metrics
        report = StepReport(step, {n: v for n, v in metrics.items() if not (skipped and n in _OF_THE_UPDATE)})
        self._act(self._findings(lambda: self._monitor.observe(report)))
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

    def allows(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the update of a step with this loss and gradient is to be made. All ranks call it.

        Raises: RolledBack where the run goes on from an earlier checkpoint, TrainingError where it must not go on.
        """
        findings = self._findings(lambda: self._monitor.before_update(StepReport(step, metrics)))
        self._act(findings)
        # Whatever the rules were changed to: what is not a number never reaches the weights.
        finite = all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm") if name in metrics)
        return finite and not any(finding.action == "skip_step" for finding in findings)

    def _findings(self, judge: Callable[[], list[Finding]]) -> list[Finding]:
        """Judged once, by rank 0: ranks that act differently would wait for each other for ever."""
        return self.topology.broadcast(judge() if self.topology.is_main else [])

    def _act(self, findings: Sequence[Finding]) -> None:
        """Findings become events, and what they ask for is done."""
        for finding in findings:
            record = {"rule": finding.rule, "severity": finding.severity.value, "action": finding.action}
            evidence = dict(finding.evidence)
            self.event("finding", finding.step, record | {"message": finding.message, "evidence": evidence})
            if finding.action in ("rollback", "stop"):
                self._abandon(finding)
            if finding.action in HOLDING and finding.rule not in self.held:
                self.held.append(finding.rule)
            before, self.controls = self.controls, after(self.controls, finding)
            changed = {n: v for n, v in asdict(self.controls).items() if v != getattr(before, n)}
            if changed or finding.action in GUARDS:
                what = ", ".join(f"{name} {value}" for name, value in changed.items()) or finding.action
                self.event(
                    "action", finding.step, {"message": f"{finding.rule}: {what}", "rule": finding.rule, **changed}
                )

    def _abandon(self, finding: Finding) -> None:
        """Raises: RolledBack, with the decision on disk; TrainingError if there is nothing left to try."""
        self.flush()
        decision: Any = None
        if self.topology.is_main:
            try:
                decision = decide(self.folder, self.store, finding, self.controls, self.keys.health_rollbacks)
            except TrainingError as error:
                decision = error
        decision = self.topology.broadcast(decision)
        raise decision if isinstance(decision, TrainingError) else RolledBack(str(decision))

    def save(self, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress, *, wait: bool = True) -> None:
        """A checkpoint of everything the loop needs. All ranks call it, rank 0 writes.

        Without `wait` only the copy of the tensors is made here, and a thread writes them; the next save waits for it.
        Raises: CheckpointError, also for the write that was under way.
        """
        self.flush()
        progress.extra = progress.capture()
        names = {name for name, _ in policy.trainable()}
        weights = {n: t.clone() for n, t in self.topology.full_state(policy.model).items() if n in names}
        tensors, scalars = flatten(self.topology.full_optimizer_state(policy.model, optimizer))
        if self.topology.is_main:
            state = {
                "step": progress.step,
                "tokens": progress.tokens,
                "wall_s": progress.wall_s,
                "extra": progress.extra,
            }
            state |= {"scalars": scalars, "health": self._monitor.state(), "held": list(self.held)}
            state["validated"] = dict(self.validated)
            state |= {"controls": self.controls.to_json(), "best": self.store.best()}
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
            with disk_errors(self.folder):
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
            rollbacks=tuple(rollback.to_json() for rollback in self.rollbacks),
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


def _told(rollback: Rollback) -> dict[str, Any]:
    """A rollback as an event: the finding it was made for is cut from the records with what was abandoned."""
    return rollback.to_json() | {"message": str(rollback), "severity": Severity.HARD.value, "action": "rollback"}


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
