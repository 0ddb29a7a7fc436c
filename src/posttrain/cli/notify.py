"""`posttrain notify RUN`: send what the hooks of a run (`notify:`) have not taken. The exit code says whether anything waits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import EXIT_AGAIN


def notify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    project: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where commands are run; default: where the run's project lies.")
    ] = None,
) -> None:
    """Send the notices of a run that its hooks have not taken. Exit code 75 while some wait."""
    from posttrain.pipeline.notify import send_again

    done = send_again(run, project)
    for line in done.waiting:
        typer.echo(f"waits: {line}", err=True)
    typer.echo(f"{done.num_taken} taken; {len(done.waiting)} wait")
    if done.waiting:
        raise typer.Exit(EXIT_AGAIN)
