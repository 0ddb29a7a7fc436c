"""The keys of `posttrain data curate`: which rows of a set stay. No torch here."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from posttrain.config.datasets import DatasetKeys, RowKind, read_once
from posttrain.config.knob import Keys, knob
from posttrain.config.synth import Repeats

# fmt: off
# One key a line, as in `stages`.


class ColumnRangeKeys(Keys):
    """Rows by a number that stands in them."""

    column: str = knob(..., "Column with the number; `.` goes into an object: `provenance.pass@1` of `posttrain data synth`.", example="provenance.pass@1")
    min: float | None = knob(None, "Rows of less leave.", example=0.1)
    max: float | None = knob(None, "Rows of more leave.", example=0.9)

    @model_validator(mode="after")
    def _takes_something_out(self) -> ColumnRangeKeys:
        if self.min is None and self.max is None:
            raise ValueError(f"column: {self.column} needs min, max or both; without, nothing leaves")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min: {self.min:g} above max: {self.max:g} keeps no row; swap them")
        return self


class QualityKeys(Keys):
    """Rows by what a scorer gives their answer."""

    scorer: str = knob(..., "`model:FOLDER` of a reward model, `judge:FILE.yaml` of a judge, `file.py:function`, or a reward of the library.", example="judge:rubric.yaml")
    scorer_kwargs: dict[str, Any] = knob({}, "Options of the scorer, as `reward_kwargs` has them for a reward: of a process reward model `aggregate` and `step_separator`.", example={"aggregate": "mean"})
    min: float | None = knob(None, "Rows of less leave.", example=0.5)
    keep_share: float | None = knob(None, "Only this share of the rows stays, the best first.", gt=0, le=1, example=0.8)
    timeout_s: float = knob(10.0, "Deadline of one row's score where a function gives it.", gt=0)

    @model_validator(mode="after")
    def _takes_something_out(self) -> QualityKeys:
        if (self.min is None) == (self.keep_share is None):
            raise ValueError(f"scorer: {self.scorer} needs one of min and keep_share; without, nothing leaves")
        return self


class CurateKeys(Keys):
    """A set of rows, and what must leave it."""

    datasets: list[DatasetKeys] = knob(..., "Rows of any format that a stage reads.", min_length=1, example=[{"path": "./data.jsonl"}])
    output_dir: str = knob("", "Folder of `rows.jsonl`, `left.jsonl` and the report, relative to the YAML; empty means `runs/NAME` with the name of the YAML.", example="runs/curated")
    rows: RowKind | None = knob(None, "What the rows are; null finds it from their columns.", example="examples")
    dedup: Repeats = knob("near", "Leave out rows that repeat an earlier one: up to case and white space (`exact`), or also nearly (`near`).")
    near: float = knob(0.8, "Jaccard index of 5-word runs from which two rows are nearly the same.", ge=0.5, le=1)
    decontaminate: list[str] = knob([], "Suites (JSONL, or `lm-eval:TASK`) whose prompts no row may hold, by 13-word runs.", example=["evals/heldout.jsonl"])
    min_chars: int = knob(0, "Characters that each answer has at least (of prompts, the prompt).", ge=0, example=20)
    max_chars: int | None = knob(None, "Characters that it has at most.", ge=1, example=8000)
    ranges: list[ColumnRangeKeys] = knob([], "Rows by numbers in their columns, such as a measured difficulty.", example=[{"column": "provenance.pass@1", "min": 0.1, "max": 0.9}])
    quality: list[QualityKeys] = knob([], "Rows by the score of their answer (of pairs, the chosen one); those that cannot be scored leave.", example=[{"scorer": "model:./rm", "keep_share": 0.8}])

    _once = field_validator("datasets")(read_once)

    @model_validator(mode="after")
    def _reads_every_key(self) -> CurateKeys:
        if self.dedup != "near" and self.near != 0.8:
            raise ValueError(f"near does nothing with dedup: {self.dedup}; remove it")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars: {self.max_chars} below min_chars: {self.min_chars} keeps no row; swap them")
        return self
