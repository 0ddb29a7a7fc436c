"""A run as a value: its numbers, its model, its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, overload

from posttrain.errors import DataError, MissingExtraError
from posttrain.evidence import Verdict
from posttrain.report.build import build_report
from posttrain.report.records import RunRecord
from posttrain.report.records import read_run as load_record
from posttrain.report.summary import render_summary


class Metrics(Sequence[dict[str, Any]]):
    """Rows of `metrics.jsonl`, one per logged step, in order."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, place: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Metrics: ...
    def __getitem__(self, place: int | slice) -> dict[str, Any] | Metrics:
        return Metrics(self._rows[place]) if isinstance(place, slice) else self._rows[place]

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        """The values of one metric, where it was logged."""
        return [row[name] for row in self._rows if name in row]

    def to_pandas(self) -> Any:
        """Raises: MissingExtraError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("to_pandas needs pandas; pip install pandas") from error
        return pd.DataFrame(list(self._rows))

    def __repr__(self) -> str:
        return f"Metrics({len(self)} rows, last: {self._rows[-1] if self._rows else None})"


@dataclass(frozen=True)
class Report:
    """`report.html`; shows itself in a notebook."""

    path: Path

    def _repr_html_(self) -> str:
        # A frame of its own: the page has styles that a notebook must not take over.
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="720" style="border:0"></iframe>'

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Run:
    """A run's folder and what came of it. `status` is that of `pipeline.json`; `verdict` that of the last gate, if any."""

    folder: Path
    status: str
    verdict: Verdict | None
    model: Path | None
    """The last stage's model, a folder that transformers loads; None while there is none."""
    reason: str = ""

    @property
    def record(self) -> RunRecord:
        """All that the folder holds, as plain values."""
        return load_record(self.folder)

    @property
    def metrics(self) -> Metrics:
        """Of the last stage."""
        return self.metrics_of(-1)

    def metrics_of(self, stage: int) -> Metrics:
        """Of a stage by its place, from 0; negative ones count from the end."""
        stages = self.record.stages
        return Metrics([dict(row) for row in stages[stage].metrics]) if stages else Metrics(())

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer), as transformers loads them. Raises: DataError if the run has no model."""
        if self.model is None or not self.model.is_dir():
            raise DataError(f"{self.folder}: the run has no model yet (it is {self.status}); start it again to go on")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        return AutoModelForCausalLM.from_pretrained(self.model), AutoTokenizer.from_pretrained(self.model)

    @property
    def report(self) -> Report:
        return Report(build_report(self.folder))

    def __str__(self) -> str:
        return render_summary(self.folder)


_DECIDED = {"ACCEPTED": Verdict.PASS, "REJECTED": Verdict.FAIL}
"""A verdict as a person decided it in a record → what a run then says."""


def load_run(folder: str | Path) -> Run:
    """A run that was made before, by the command or from Python. Raises: DataError if `folder` is no run."""
    record = load_record(Path(folder))
    gate = record.final_gate
    stages = [
        stage for stage in record.stages if (record.folder / str(stage.entry.get("folder", "")) / "model").is_dir()
    ]
    model = record.folder / str(stages[-1].entry["folder"]) / "model" if stages else None
    verdict = None if gate is None else _DECIDED.get(gate.verdict["verdict"]) or Verdict(gate.verdict["verdict"])
    return Run(record.folder, record.status, verdict, model)
