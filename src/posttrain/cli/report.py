"""`posttrain report RUN_DIR`: write the HTML page of a run and print its table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import DamagedFileError


def report(run_dir: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write report.html into RUN_DIR, one self-contained page, and print the before/after table. Exit code 64 if records of it
    are damaged: the page shows the rest."""
    from posttrain.report.build import write_report
    from posttrain.report.records import read_run
    from posttrain.report.summary import summary_of

    run = read_run(run_dir)
    path = write_report(run)
    typer.echo(summary_of(run))
    typer.echo(f"report    {path}")
    if run.problems:
        raise DamagedFileError(
            f"{run_dir}: {'; '.join(run.problems)}; the page shows the rest: put copies back and write it again"
        )
