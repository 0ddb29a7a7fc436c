"""What surrounds a loop: its folder, its checkpoints, its guard, and the wish to stop. Knows no objective."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from posttrain.checkpoint.store import CheckpointStore, check_writable, disk_errors, sweep
from posttrain.config.optimizing import step_interval
from posttrain.config.stages import TrainKeys
from posttrain.distributed.keeper import say_synced
from posttrain.distributed.sequence import data_ranks
from posttrain.distributed.sharding import ShardingSpec, sharding_over
from posttrain.errors import ModelError, OutOfMemoryError
from posttrain.files import reading
from posttrain.models.compiled import why_not_compiled
from posttrain.models.device import memory_metrics
from posttrain.models.export import save_policy
from posttrain.models.policy import Policy
from posttrain.models.proof import probe_logits
from posttrain.models.provenance import model_digest, source_digest
from posttrain.models.total import ADAPTER_TOTAL, MergedBefore, TotalReport, write_total
from posttrain.objectives.terms import spec_from
from posttrain.protocols import Ranks
from posttrain.recipes.memory import is_out_of_memory, why_not_loaded, why_out_of_memory
from posttrain.recipes.run.guard import TrainingGuard
from posttrain.recipes.run.rollback import RolledBack, restore_best
from posttrain.recipes.run.run_folder import RunFolder, StageResult, Watchers
from posttrain.recipes.run.stop import StopFlag, StoppedPolitely
from posttrain.recipes.run.train_state import Checkpoints, Learner, TrainState
from posttrain.rollout.drafts import Speculation
from posttrain.rollout.sampling import request_seed

log = logging.getLogger(__name__)

CRITIC = "critic"
"""The folder of a stage that holds its critic, where it has one."""


class Closes(Protocol):
    def close(self) -> None: ...


Part = TypeVar("Part", bound=Closes)
"""Something that a stage has to let go of."""


class Stage:
    """The surroundings of one loop. A loop calls `resume`, then `begin_step` and `finish_step`, then `done`."""

    def __init__(
        self, kind: str, folder: Path, keys: TrainKeys, ranks: Ranks,
        watchers: Watchers | None = None, stop: StopFlag | None = None, merged_before: MergedBefore | None = None,
    ) -> None:  # fmt: skip
        self._merged_before = merged_before
        self.kind, self.folder, self.keys, self.processes = kind, folder, keys, ranks
        self.ranks = data_ranks(ranks, keys.sharding.group_size)
        """Those that have rows of their own; fewer than the processes where several share their sequences."""
        self.sharding = sharding_over(ranks, spec_from(ShardingSpec, keys.sharding))
        self.stop = stop or StopFlag()
        self.run = RunFolder(folder, kind, ranks.is_main, watchers)
        store = CheckpointStore(folder / "checkpoints", keys.save_total_limit, keys.save_keep_every)
        self.checkpoints = Checkpoints(store, ranks, self.run)
        self.guard = TrainingGuard(kind, keys, self.run, store, ranks, settle=self.checkpoints.flush)
        self.state: TrainState | None = None
        base = ExitStack()
        base.enter_context(reading(Path(keys.base_model)))  # the export of an adapter reads it again
        self._open: list[Closes] = [base]
        self._started = time.monotonic()
        self._step_started = self._started
        self._save_every = 0

    def until_done(self, part: Part) -> Part:
        """`part`, closed with the stage, however that ends."""
        self._open.append(part)
        return part

    def resume(
        self, policy: Policy, optimizer: torch.optim.Optimizer, total_steps: int, critic: Learner | None = None,
        speculation: Speculation | None = None,
    ) -> TrainState:  # fmt: skip
        """Where to go on: the newest valid checkpoint, or the beginning. Cuts the metrics back to it.

        After a rollback what was abandoned is discarded first, and the controls it decided on hold from here.
        """
        store, guard = self.checkpoints.store, self.guard

        def tidy() -> None:
            models = [policy] if critic is None else [policy, critic.policy]
            weights = sum(p.numel() * p.element_size() for model in models for _, p in model.trainable())
            check_writable(self.folder, needed_bytes=4 * weights)
            sweep(self.folder)
            sweep(store.folder)
            guard.discard_abandoned()

        self.ranks.main_only(tidy)
        world_size = self.processes.world_size
        rows = self.keys.rows_per_step(world_size)
        state = self.state = TrainState(
            policy, optimizer, guard, world_size, rows, critic=critic, speculation=speculation
        )
        going_back = bool(guard.rollbacks)
        ref = self.checkpoints.newest()
        if ref is not None:
            self.checkpoints.load(ref, state)
            going_back = guard.is_going_back
            log.info("%s: going on after step %d", self.kind, state.step)
        if going_back:
            guard.go_back()
        if self.ranks.is_main:
            if going_back:
                restore_best(store, state.best)
            store.retire(state.step)
            self.run.open(state.step, total_steps)
            guard.tell_rollbacks(state.step)
        self._started = time.monotonic() - state.wall_s
        self._save_every = step_interval(self.keys.save_steps, total_steps)
        say_synced(state.step)
        return state

    def begin_step(self, step: int) -> None:
        """All of torch's randomness in a step (dropout) follows from seed, step and rank, so none is to be saved."""
        # Who go through the same tokens drop the same of them.
        ranks = self.ranks if self.sharding.tensor is not None else self.processes
        torch.manual_seed(request_seed(self.guard.controls.seed(self.keys.seed), step, ranks.rank) >> 1)
        self._step_started = time.monotonic()

    def times(self, *, rollout_s: float) -> dict[str, float]:
        """How a step of RL divides into sampling and training, in seconds."""
        return {"time/rollout_s": rollout_s, "time/train_s": time.monotonic() - self._step_started - rollout_s}

    def finish_step(
        self, state: TrainState, metrics: dict[str, float], last: bool, best_score: float | None = None
    ) -> None:
        """Log, judge, save if it is time, and stop if that is wished.

        `best_score` is given where this step is the best so far; its checkpoint is then kept whatever comes.

        Raises: StoppedPolitely; RolledBack and TrainingError as `Guard.allows` does.
        """
        state.wall_s = time.monotonic() - self._started
        metrics["step_time"] = time.monotonic() - self._step_started
        step = state.step
        if step % self.keys.logging_steps == 0 or last:
            self.run.log(step, metrics | {"num_tokens": float(state.tokens)} | memory_metrics())
        self.guard.observe(step, metrics)
        stopping = self.is_stopping()
        due = self._save_every > 0 and step % self._save_every == 0
        if best_score is not None:
            self.checkpoints.mark_best(step, best_score)
        if due or last or stopping or best_score is not None:
            self.checkpoints.save(state, wait=last or stopping)
        if stopping and not last:
            raise StoppedPolitely(f"{self.kind}: stopped after step {step}, saved; start again to go on")

    def done(self, state: TrainState) -> StageResult:
        """Export the model and write `result.json`. All ranks call it.

        Raises: StoppedPolitely before it is written; the last checkpoint is, so the next start exports again.
        """
        policy, guard = state.policy, self.guard
        if state.critic is not None:
            self._export_critic(state.critic.policy)
        logits, model_dir = probe_logits(policy.model), self.folder / "model"
        total: TotalReport | None = None
        with disk_errors(self.folder):
            report = save_policy(
                policy,
                model_dir,
                self.keys,
                ranks=self.ranks,
                trained=logits,
                between=self._stop_if_asked,
            )
            self.run.event("export", state.step, asdict(report))
            if policy.has_adapter:
                self._stop_if_asked()
                total = write_total(policy, self.folder, self.keys, logits, self._merged_before, self.ranks)
        result = StageResult(
            kind=self.kind, folder=self.folder, model_dir=model_dir, model_digest=model_digest(model_dir),
            parent_digest=source_digest(policy.source), steps=state.step - state.empty_steps, tokens=state.tokens, wall_s=state.wall_s,
            metrics=dict(state.validated), held=tuple(guard.held),
            rollbacks=tuple(rollback.to_json() for rollback in guard.rollbacks), adapter_total=total,
        )  # fmt: skip
        if total is not None and self.ranks.is_main:
            self.run.event(ADAPTER_TOTAL, state.step, asdict(total))
            (log.warning if total.refused or total.rounded else log.info)("%s", total)
        if self.ranks.is_main:
            result.save()
        self.close()
        return result

    def _export_critic(self, critic: Policy) -> None:
        """Into a folder beside the model, from which another stage may go on: it is no part of what ships."""
        with disk_errors(self.folder):
            save_policy(
                critic,
                self.folder / CRITIC,
                critic.under,
                ranks=self.ranks,
                between=self._stop_if_asked,
            )

    def _stop_if_asked(self) -> None:
        if self.is_stopping():
            raise StoppedPolitely(f"{self.kind}: stopped during the export; start again to go on")

    def is_stopping(self) -> bool:
        """Whether any process was asked to stop. All call it."""
        return self.processes.sum([float(self.stop.is_set)])[0] > 0

    def close(self) -> None:
        while self._open:
            self._open.pop().close()
        self.checkpoints.close()
        self.run.close()


def run_recipe(
    recipe: Callable[[Any, Stage], StageResult], keys: TrainKeys, make_stage: Callable[[], Stage]
) -> StageResult:
    """Run a recipe to its end; after each rollback again, from where that went back to."""
    while True:
        stage = make_stage()
        try:
            return recipe(keys, stage)
        except RolledBack as event:
            log.warning("%s", event)
        except (RuntimeError, MemoryError) as error:
            if why := why_not_compiled(error):
                raise ModelError(f"{stage.kind}: {why}") from error
            if not is_out_of_memory(error):
                raise
            if (state := stage.state) is None:
                raise OutOfMemoryError(why_not_loaded(stage.kind, stage.keys, stage.processes.world_size)) from error
            held, processes = (state.policy, state.optimizer), stage.processes.world_size
            raise OutOfMemoryError(why_out_of_memory(error, stage.kind, stage.keys, *held, processes)) from error
        finally:
            stage.close()
        gc.collect()  # the abandoned model must be gone before the next one is loaded
