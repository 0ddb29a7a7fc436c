"""What the steps of a stage on given examples begin and end with. Which loss they learn by is the recipe's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from posttrain.config.stages import TrainKeys
from posttrain.data.dataset import Dataset
from posttrain.models.policy import Policy
from posttrain.objectives.terms import LossTerms
from posttrain.recipes.batches import Schedule, flat, in_their_order
from posttrain.recipes.measure.validate import Validation
from posttrain.recipes.metrics import StepMetrics
from posttrain.recipes.optim import learning_rate, make_optimizer, update
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState

T = TypeVar("T")


@dataclass(frozen=True)
class ExampleRun(Generic[T]):
    """A stage on examples that has begun, where its last checkpoint left it. RL's is `rl.RLRun`."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    schedule: Schedule[T]
    state: TrainState
    validation: Validation
    total_steps: int
    keys: TrainKeys
    stage: Stage

    @classmethod
    def begun(
        cls,
        policy: Policy,
        schedule: Schedule[T],
        held_out: dict[str, Dataset[T]],
        measure: Callable[[Dataset[T]], dict[str, float]],
        keys: TrainKeys,
        stage: Stage,
    ) -> ExampleRun[T]:
        """`measure` says what is logged of rows that are held out."""
        optimizer, total_steps = make_optimizer(policy, keys), schedule.total_steps(keys)
        state = stage.resume(policy, optimizer, total_steps)
        validation = Validation(stage, state, held_out, measure)
        return cls(policy, optimizer, schedule, state, validation, total_steps, keys, stage)

    def steps(self) -> Iterator[tuple[int, list[list[T]]]]:
        """Of each step that is left its number and its micro-batches, over all ranks."""
        for step in range(self.state.step, self.total_steps):
            if self.validation.is_over:
                break
            self.stage.begin_step(step)
            yield step, self.schedule.step(step + self.stage.guard.controls.skipped)

    def finish_step(self, step: int, micros: list[list[T]], values: dict[str, float]) -> None:
        """Move the weights, count the step, validate where it is due, and hand its `values` to the stage. All ranks call it."""
        state, stage, controls = self.state, self.stage, self.stage.guard.controls
        lr = learning_rate(step, self.total_steps, self.keys) * controls.lr_scale
        values |= update(self.policy, self.optimizer, stage, lr, values, step + 1)
        values |= self.schedule.balance(micros, stage.ranks.world_size)
        values["epoch"] = self.schedule.epoch_after(step + controls.skipped)
        state.step, state.tokens = step + 1, state.tokens + sum(self.schedule.size(row) for row in flat(micros))
        values |= self.validation.if_due(state.step, self.total_steps)
        best = self.validation.best_score(state.step)
        stage.finish_step(state, values, self.validation.is_last(state.step, self.total_steps), best)

    def done(self) -> StageResult:
        self.validation.restore_best()
        return self.stage.done(self.state)


@torch.no_grad()
def held_out_metrics(
    policy: Policy, rows: Dataset[T], loss: Callable[[list[T]], LossTerms], keys: TrainKeys, stage: Stage
) -> dict[str, float]:
    """The objective and its metrics over all rows that are held out; `loss` is that of some of them, divided by what all count."""
    policy.model.eval()
    metrics = StepMetrics()
    for micro in in_their_order(rows.rows, keys.per_device_train_batch_size, stage.ranks):
        micro.count(loss(micro.rows), metrics)
    return {f"eval_{name}": value for name, value in metrics.reduced(stage.ranks).items()}
