"""`posttrain mirror RUN`: send to its trackers what they have not got."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import EXIT_AGAIN


def send_to_trackers(
    run: Annotated[Path, typer.Argument(help="A run's folder, or a stage's.", exists=True, file_okay=False)],
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for each tracker.")] = 30.0,
) -> None:
    """Send what a run recorded to the trackers of its `report_to`, each step once. Exit code 75 while something waits."""
    from posttrain.tracking.mirror import keep_copy
    from posttrain.tracking.trackers import TRACKERS, require_tracker, tracked_run

    copies = [
        (tracked_run(file.parent.parent), name)
        for file in sorted(run.rglob("mirrors/run.json"))
        for name in TRACKERS
        if (file.parent / f"{name}.log").exists()
    ]
    if not copies:
        typer.echo(f"{run} reports to no tracker: no stage of it ran with report_to or mlflow")
        return
    ended, waiting = threading.Event(), False
    ended.set()
    for tracked, name in copies:
        require_tracker(name)
        state = keep_copy(tracked, name, ended, timeout)
        waits = bool(state.error or state.waiting)
        waiting |= waits
        said = f"{state.waiting} rows wait: {state.error}" if waits else f"whole, up to step {state.recorded}"
        typer.echo(f"{tracked.folder.name} → {name}: {said}")
    if waiting:
        raise typer.Exit(EXIT_AGAIN)
