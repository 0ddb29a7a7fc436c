"""What a reward pool asks of a reward that is a model's opinion. Who loads it knows torch; this does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from posttrain.types import StepScores

ASKED, FAILED = "verdicts", "failed"
"""Counts of a judge: what it was asked for, and what of that did not come or could not be read."""


@dataclass(frozen=True, slots=True)
class Opinion:
    """Of one completion: a value, or why there is none. `counts` is what it cost and how it came about, summed over completions; `steps`
    what a process reward model says of each step."""

    value: float | None
    error: str | None = None
    counts: Mapping[str, float] = field(default_factory=dict[str, float])
    steps: StepScores = ()


class LearnedReward(Protocol):
    """A reward model or a judge, loaded. Each completion is scored by itself."""

    @property
    def rounding(self) -> float:
        """How far two scores of one completion may lie apart that was scored among others."""
        ...

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> Sequence[Opinion]: ...

    def close(self) -> None: ...


LoadLearned = Callable[[str, Path | None, Mapping[str, Any]], LearnedReward]
"""`model:FOLDER` or `judge:FILE.yaml`, relative to a folder, with its options → the reward."""
