"""Validation while training: when it is due, which checkpoint was best, and how to return to it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from posttrain.models.policy import Policy
from posttrain.recipes.stage import Stage


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

    def best_score(self, step: int) -> float | None:
        """The score of `step` if it was validated and is the best so far, and the best one is wanted. All ranks ask."""
        if not self._wanted or self._measured_at != step or not self.latest:
            return None
        score, best = self._score(self.latest), self._stage.topology.broadcast(self._stage.store.best())
        # A step that is run again after a crash finds its own mark: it must be saved again all the same.
        return score if best is None or score > best[1] or step == best[0] else None

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
