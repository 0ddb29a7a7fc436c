"""Validation while training: when it is due, which checkpoint was best, and how to return to it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from posttrain.models.policy import Policy
from posttrain.recipes.stage import Progress, Stage


class Validation:
    """Measures every `eval_steps` and at the end; remembers the best by `score` (higher is better)."""

    def __init__(
        self,
        stage: Stage,
        measure: Callable[[], dict[str, float]],
        score: Callable[[dict[str, float]], float] | None = None,
    ) -> None:
        self._stage = stage
        self._measure = measure
        self._score = score or (lambda metrics: -metrics["eval_loss"])
        self._measured_at = -1
        self.latest: dict[str, float] = {}

    def if_due(self, step: int, total_steps: int) -> dict[str, float]:
        """The metrics of a validation after `step`, or nothing."""
        every = self._stage.keys.eval_steps
        if step != total_steps and not (every and step % every == 0):
            return {}
        self.latest, self._measured_at = self._measure(), step
        return self.latest

    def remember_best(self, policy: Policy, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Keep this step's checkpoint if its validation is the best so far and the best one is wanted."""
        if not self._wanted or self._measured_at != progress.step or not self.latest:
            return
        score, best = self._score(self.latest), self._stage.store.best()
        if best is None or score > best[1]:
            ref = self._stage.save(policy, optimizer, progress)
            if ref is not None:
                self._stage.store.mark_best(ref, score)

    def restore_best(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        """Put the best checkpoint's weights back, for the export."""
        best = self._stage.topology.broadcast(self._stage.store.best() if self._wanted else None)
        if best is not None:
            self._stage.load(self._stage.store.at(best[0]), policy, optimizer)
            self._stage.event(
                "notice", best[0], {"message": f"ends with the checkpoint of step {best[0]}, the best on held-out rows"}
            )

    @property
    def _wanted(self) -> bool:
        return self._stage.keys.load_best_model_at_end
