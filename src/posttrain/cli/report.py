"""`posttrain report RUN_DIR`: write the HTML page of a run and print its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html into RUN_DIR, one self-contained page, and print the before/after table."""
    from posttrain.report.build import build_report
    from posttrain.report.summary import render_summary

    path = build_report(run_dir)
    typer.echo(render_summary(run_dir))
    typer.echo(f"report    {path}")
