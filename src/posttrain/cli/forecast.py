"""`posttrain forecast RUN_DIR`: where its reward will end, and whether going on is worth it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.json_output import AsJson, echo_json
from posttrain.errors import DamagedFileError


def forecast_run(
    run_dir: Annotated[Path, typer.Argument(help="Folder of a run, or of a stage; it may still be running.")],
    metric: Annotated[str, typer.Option(help="What rises, as it is named in metrics.jsonl.")] = "reward",
    steps: Annotated[
        int | None, typer.Option(min=1, help="End there instead of where the stage is configured to end.")
    ] = None,
    worth: Annotated[float, typer.Option(min=0.0, help="A gain below this is no reason to go on.")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """Say where the reward of each stage of RL ends, with 90 % intervals. Exit code 2 if no forecast can be given."""
    from posttrain.gate.render import aligned
    from posttrain.report.forecast import COLUMNS, require_forecasts
    from posttrain.report.records import read_run

    run = read_run(run_dir)
    broken = [problem for problem in run.problems if problem.startswith("metrics.jsonl")]
    if broken:
        raise DamagedFileError(f"{run_dir}: {'; '.join(broken)}; put a copy back")
    made = require_forecasts(run, metric, steps, worth)
    if as_json:
        echo_json({"metric": metric, "level": 0.9, "worth": worth, "stages": [one.record() for one in made]})
    else:
        typer.echo("\n".join(aligned([COLUMNS, *(one.cells() for one in made)], right=())))
    raise typer.Exit(2 if all(one.made.refused for one in made) else 0)
