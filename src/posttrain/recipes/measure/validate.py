"""Validation while training: when it is due, which checkpoint was best, and how to return to it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.config.episodes import EpisodeKeys
from posttrain.config.optimizing import step_interval
from posttrain.config.pipeline import SuiteKeys
from posttrain.config.rl import SamplingKeys
from posttrain.config.stages import TrainKeys
from posttrain.errors import ConfigError
from posttrain.evals.run import Evaluator
from posttrain.evals.suite import Suite, load_suite
from posttrain.models.policy import Policy
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.experience.engines import EngineSource, make_engine, sync_engine
from posttrain.recipes.experience.episodes import Episodes
from posttrain.recipes.measure.evaluate import OwnScorers, TokenizerCodec, check_paid, with_episodes
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.run.train_state import TrainState
from posttrain.rollout.sampling import request_seed

log = logging.getLogger(__name__)

_DEV = "dev"
_LONGEST_ANSWER = 256
SINCE_BEST = "validations_since_best"
"""How many validations of the cadence in a row were no better than the best; what early stopping counts."""


class Validation:
    """Measures every `eval_steps`, when a health rule asks for it, and at the end; remembers the best (higher is better)."""

    def __init__(
        self,
        stage: Stage,
        state: TrainState,
        sets: Mapping[str, Any],
        measure: Callable[[Any], dict[str, float]],
        suite: SuiteScore | None = None,
    ) -> None:
        """`measure` gives the metrics (`eval_loss` …) of one of `sets`, which are by name, "" for the one without."""
        self._stage, self._state, self._sets, self._measure, self._suite = stage, state, sets, measure, suite
        self._measured_at = -1
        self._best: float | None = None

    def if_due(self, step: int, total_steps: int) -> dict[str, float]:
        """The metrics of a validation after `step`, or nothing."""
        guard, every = self._stage.guard, step_interval(self._stage.keys.eval_steps, total_steps)
        is_due = step == total_steps or bool(every and step % every == 0)
        if not guard.controls.evaluate_next and not is_due:
            return {}
        guard.controls = replace(guard.controls, evaluate_next=False)
        scored = self._suite.measure(step) if self._suite is not None else {}
        waited = self._state.validated.get(SINCE_BEST, 0.0)
        self._state.validated = scored | {
            f"eval_{name}_{metric.removeprefix('eval_')}" if name else metric: value
            for name, rows in self._sets.items()
            for metric, value in self._measure(rows).items()
        }
        self._measured_at, self._best = step, self._score_if_best(step, is_over=step == total_steps)
        if self._stage.keys.early_stopping_patience:
            self._state.validated[SINCE_BEST] = waited + is_due if self._best is None else 0.0
        return self._state.validated

    def best_score(self, step: int) -> float | None:
        """The score of `step` if it was validated and is the best so far, and the best one is wanted. All ranks ask."""
        return self._best if self._measured_at == step else None

    def _score_if_best(self, step: int, *, is_over: bool) -> float | None:
        if not self._wanted or not self._state.validated:
            return None
        try:
            score, best = goodness(self._state.validated, self._stage.keys), self._stage.checkpoints.best()
        except ConfigError as unknown:
            if not is_over:
                raise
            log.warning("%s; the stage keeps the weights of its last step", unknown)  # they are not lost for a name
            return None
        if math.isnan(score):
            return None
        # A step that is run again after a crash finds its own mark: it must be saved again all the same.
        return score if best is None or score > best[1] or step == best[0] else None

    @property
    def is_over(self) -> bool:
        """Whether early stopping has waited long enough for a better validation, in this process or before a resume."""
        patience = self._stage.keys.early_stopping_patience
        return patience > 0 and self._state.validated.get(SINCE_BEST, 0.0) >= patience

    def is_last(self, step: int, total_steps: int) -> bool:
        """Whether training ends after `step`."""
        return step == total_steps or self.is_over

    def restore_best(self) -> None:
        """Put the best checkpoint's weights back, for the export."""
        best = self._stage.checkpoints.best() if self._wanted else None
        if best is not None:
            self._stage.checkpoints.load_best(best[0], self._state)
            self._stage.run.event(
                "notice", best[0], {"message": f"ends with the checkpoint of step {best[0]}, the best on held-out rows"}
            )

    @property
    def _wanted(self) -> bool:
        return self._stage.keys.load_best_model_at_end


def goodness(metrics: Mapping[str, float], keys: TrainKeys) -> float:
    """What the best checkpoint is chosen by; more is better. Raises: ConfigError if it is not among the metrics."""
    metric = keys.metric_for_best_model or _deciding(metrics, keys)
    if metric not in metrics:
        raise ConfigError(
            f"metric_for_best_model: {metric} is not measured; expected one of {', '.join(sorted(metrics))}"
        )
    better = keys.greater_is_better
    return metrics[metric] if (not metric.endswith("loss") if better is None else better) else -metrics[metric]


def _deciding(metrics: Mapping[str, float], keys: TrainKeys) -> str:
    """Validation loss where there is one, else the dev score, else the reward; of the only set where that has a name."""
    names = keys.eval_names
    start = f"eval_{names[0]}_" if len(names) == 1 and names[0] else "eval_"
    if f"{start}reward" not in metrics and f"{start}loss" in metrics:
        return f"{start}loss"
    return "eval_score" if "eval_score" in metrics else f"{start}reward"


class SuiteScore:
    """The dev split of `keys.eval_suite`, answered greedily by the weights in training."""

    def __init__(
        self, suite: Suite, keys: TrainKeys, engine: Engine, policy: Policy, ranks: Ranks, episodes: Episodes | None = None
    ) -> None:  # fmt: skip
        self._episodes, self._ranks = episodes, ranks
        self._suite, self._engine, self._policy = suite, engine, policy
        longest = keys.max_completion_length if isinstance(keys, SamplingKeys) else _LONGEST_ANSWER
        self._keys = SuiteKeys(path=str(suite.path), max_tokens=longest)

    @classmethod
    def of(
        cls, policy: Policy, keys: TrainKeys, ranks: Ranks, engine: Engine | None = None, episodes: Episodes | None = None
    ) -> SuiteScore | None:  # fmt: skip
        """None where no suite is asked for; with `episodes` it is answered by them. Raises: EvalError without a dev split."""
        if keys.eval_suite is None:
            return None
        suite = load_suite("eval_suite", Path(keys.eval_suite))
        check_paid(suite, keys.env if isinstance(keys, EpisodeKeys) else None)
        suite = replace(suite, items=suite.on(_DEV)[: keys.eval_suite_limit])
        return cls(suite, keys, engine or make_engine(EngineSource(keys, policy)), policy, ranks, episodes)

    def measure(self, step: int) -> dict[str, float]:
        """All ranks call it, and each asks for its share of the items."""
        # Under ranks the engine samples from a copy, which must be brought up to date.
        sync_engine(self._engine, self._policy, version=step)
        codec = TokenizerCodec(self._policy.tokenizer)
        with closing(OwnScorers()) as own:
            evaluator = Evaluator(self._engine, codec, "in training", request_seed, score_own=own, ranks=self._ranks)
            if self._episodes is not None:
                evaluator = with_episodes(evaluator, self._episodes)
            score = evaluator.run(self._suite, self._keys, _DEV).mean
        self._engine.rest()
        return {"eval_score": score}
