"""`posttrain diff RUN_A RUN_B`: which pin moved, and what the metrics did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import DamagedFileError


def diff(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="Folder of a run.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Folder of another run.")],
) -> None:
    """Compare two runs: pins, keys, the first step whose metrics differ, last metrics and scores. Exit code 1 if anything differs."""
    from posttrain.report.diff import compare, comparison_text
    from posttrain.report.records import read_run

    runs = [read_run(folder) for folder in (run_a, run_b)]
    for run in runs:
        if run.problems:
            raise DamagedFileError(
                f"{run.folder}: {'; '.join(run.problems)}; what is left cannot be compared: put copies back"
            )
    found = compare(*runs)
    typer.echo(comparison_text(found))
    raise typer.Exit(0 if found.is_empty else 1)
