"""One self-contained HTML page per run: nothing is loaded from anywhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from posttrain.files import write_atomic
from posttrain.report import charts, checks, tables, words
from posttrain.report.records import RunRecord, load_run


def build_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path. Raises: DataError if it is no run folder."""
    run = load_run(Path(run_dir))
    path = run.folder / "report.html"
    write_atomic(path, render(run))
    return path


def render(run: RunRecord) -> str:
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
    return {
        "run": run,
        "headline": tables.headline(run),
        "verdict": words.verdict_of(run.final_gate.verdict) if run.final_gate else "",
        "rows": rows,
        "shares": shares,
        "costs": tables.costs(run),
        "gates": [(gate, charts.forest(gate.verdict.get("tests") or [], shares)) for gate in run.gates],
        "curves": [
            (stage, charts.learning_curves(stage.kind, stage.metrics, [int(f["step"]) for f in stage.findings]))
            for stage in run.stages
        ],
        "masks": tables.mask_examples(run),
        "pairs": tables.paired_samples(run),
        "training_samples": [(stage, tables.training_samples(stage)) for stage in run.stages if stage.samples],
        "findings": tables.findings(run),
        "watched": any(stage.metrics for stage in run.stages),
        "certificates": checks.certificate_views(run),
        "data": checks.data_rows(run),
        "lint": checks.lint_rows(run),
        "linted": any(stage.lint for stage in run.stages),
        "total": tables.total(run),
        "pins": tables.flatten(run.pins),
    }
