"""One self-contained HTML page per run: nothing is loaded from anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from posttrain.files import write_atomic
from posttrain.report import charts, checks, forecast, tables, words
from posttrain.report.records import RunRecord, read_run
from posttrain.tracking.trackers import REPORT_NAME


def build_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path. Raises: DataError if it is no run folder."""
    return write_report(read_run(Path(run_dir)))


def write_report(run: RunRecord) -> Path:
    """The same of a run that was read."""
    path = run.folder / REPORT_NAME
    write_atomic(path, render_report(run))
    return path


def render_report(run: RunRecord) -> str:
    environment = Environment(
        loader=PackageLoader("posttrain", "report"),
        autoescape=True,  # completions and configs are untrusted text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    css = (Path(__file__).parent / "page.css").read_text()
    return environment.get_template("page.html.j2").render(css=css, words=words, **_context(run))


def _context(run: RunRecord) -> dict[str, Any]:
    rows = tables.before_after(run)
    shares = {row.suite: row.share for row in rows}
    pairs, masks = tables.paired_samples(run), tables.mask_examples(run)
    data, certificates = checks.data_rows(run), checks.certificate_views(run)
    curves = [
        (stage, charts.learning_curves(stage.kind, stage.metrics, [int(f["step"]) for f in stage.findings]))
        for stage in run.stages
    ]
    samples = [(stage, tables.training_samples(stage)) for stage in run.stages if stage.samples]
    forecasts = forecast.forecast_stages(run)
    contents = [
        ("scores", "Before and after", rows), ("gate", "The gate", run.gates), ("costs", "Cost and gain", run.stages),
        ("data", "The data", data or checks.lint_rows(run)), ("health", "Health", True),
        *((f"certificate-{place}", f"Reward certificate {view.stage}", True) for place, view in enumerate(certificates, 1)),
        ("curves", "Learning curves", any(drawn for _, drawn in curves)), ("forecast", "Where the reward ends", forecasts), ("answers", "Same questions", pairs),
        ("samples", "Answers while training", samples), ("masks", "What was trained on", masks), ("origin", "Where it comes from", True),
    ]  # fmt: skip
    return {
        "run": run,
        "contents": contents,
        "headline": tables.headline(run),
        "verdict": words.verdict_of(run.final_gate.verdict) if run.final_gate else "",
        "rows": rows,
        "shares": shares,
        "costs": tables.costs(run),
        "gates": [
            (gate, charts.forests(gate.verdict.get("tests") or [], shares), tables.tests_by_unit(gate, shares))
            for gate in run.gates
        ],
        "curves": curves,
        "forecasts": forecasts,
        "forecast_columns": forecast.COLUMNS,
        "masks": masks,
        "pairs": pairs,
        "training_samples": samples,
        "findings": tables.findings(run),
        "watched": any(stage.metrics for stage in run.stages),
        "certificates": certificates,
        "data": data,
        "lint": checks.lint_rows(run),
        "linted": any(stage.lint for stage in run.stages),
        "total": tables.total(run),
        "pins": tables.flatten(run.pins),
    }
