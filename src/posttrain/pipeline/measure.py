"""The evals of a run: which model is scored on which suites and split. What is on disk is not measured again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from posttrain.config.pipeline import PipelineKeys, SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.config.starting import OF_THE_GIVEN
from posttrain.errors import ChangedInputsError
from posttrain.evals.suite import Suite
from posttrain.evidence import EvalReport
from posttrain.gate.decide import Reports
from posttrain.models.export import source_digest
from posttrain.pipeline.selection import Suites
from posttrain.protocols import Ranks
from posttrain.recipes.measure.evaluate import Asking, evaluate, summary


class MeasuredModel(NamedTuple):
    """A model that a run measures: the name of its eval folder, where it is, and what it was when the run took it in."""

    name: str
    path: str
    digest: str


@dataclass
class Evals:
    """Scores models of one run; all ranks call. `before(what)` may stop the run, `ending(what)` what is under way; `shown` is progress."""

    keys: PipelineKeys
    folder: Path
    ranks: Ranks
    say: Callable[[str], None]
    shown: Callable[[str, int, int], None]
    before: Callable[[str], None]
    ending: Callable[[str], AbstractContextManager[None]]
    suites: Suites = field(default_factory=dict)
    _announced: set[tuple[str, str]] = field(default_factory=set)

    def measure(self, model: MeasuredModel, suites: Sequence[str], split: str) -> Reports:
        """Reports by suite, under `evals/<name>/`. Raises: ChangedInputsError if the model is not what it was."""
        name = model.name
        self.before(f"the evals of {name}")
        folder = self.folder / "evals" / name
        if suites:
            reports = self._evaluated(model, self._of(suites), split, folder)
            if (name, split) not in self._announced:
                self.say(f"evals of {name}: {summary(reports)}")
            self._announced.add((name, split))
        return _stored(folder, suites, split)

    def again(self, model: MeasuredModel, suites: Sequence[str], split: str, number: int) -> Reports:
        """The same with another batch order and another seed, under `aa/`: an A/A check compares the two."""
        self.before(f"A/A check {number} of {model.name}")
        folder = self.folder / "aa" / f"{model.name}-{number}"
        varied = [(suite, keys.model_copy(update={"seed": keys.seed + number})) for suite, keys in self._of(suites)]
        self._evaluated(model, varied, split, folder, order=number)
        return _stored(folder, suites, split)

    def _evaluated(
        self, model: MeasuredModel, suites: Sequence[tuple[Suite, SuiteKeys]], split: str, folder: Path, order: int = 0
    ) -> Reports:
        self.ranks.main_only(partial(check_same, model))
        return evaluate(
            scoring_keys(self.keys, model.path), suites, split, folder,
            Asking(self.ranks, self.shown, partial(self.ending, f"the evals of {model.name}")), order=order, digest=model.digest,
            rollout=self.keys.eval_rollout,
        )  # fmt: skip

    def _of(self, names: Sequence[str]) -> list[tuple[Suite, SuiteKeys]]:
        return [self.suites[name] for name in names]


def _stored(folder: Path, suites: Sequence[str], split: str) -> Reports:
    return {name: EvalReport.load(folder / f"{name}-{split}") for name in suites}


def check_same(model: MeasuredModel) -> None:
    """No score under the name of another model. Raises: ChangedInputsError."""
    now = source_digest(model.path)
    if now != model.digest:
        became = f"it is {now} by now" if Path(model.path).is_dir() else "it is gone by now"
        raise ChangedInputsError(
            f"{model.path} changed while the run was under way: it was {model.digest}, {became}; put it back and start again"
        )


def scoring_keys(keys: PipelineKeys, model: str) -> ModelKeys:
    """How a model of this pipeline is loaded to be scored."""
    first = keys.stages[0].keys
    how = ("trust_remote_code", "chat_template", "chat_template_kwargs", "bf16", "device", "layer_offloading")
    own = {name: getattr(first, name) for name in OF_THE_GIVEN} if model == keys.base_model else {}
    return ModelKeys(base_model=model, **own, **{name: getattr(first, name) for name in how})
