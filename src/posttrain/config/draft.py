"""A pipeline on its way from YAML to keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.config.pipeline import StageKeys, in_pipeline
from posttrain.config.settings import Problems, Settings


@dataclass(slots=True)
class StageDraft:
    """A stage: its place (from 1), its settings, and its keys once they are valid."""

    place: int
    kind: str
    settings: Settings
    keys: StageKeys | None = None

    @property
    def model(self) -> type[StageKeys]:
        return in_pipeline(self.kind)

    def __str__(self) -> str:
        return f"{self.place} {self.kind}"


@dataclass(slots=True)
class PipelineDraft:
    """A pipeline: its top, the stages that could be read, and what is to be said about it."""

    top: Settings
    stages: list[StageDraft]
    folder: Path
    problems: Problems
    notes: list[str]
