"""`posttrain runs prune`: take weights and checkpoints out of run folders whose model is registered."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.json_output import AsJson, echo_json

app = typer.Typer(name="runs", help="The folders of runs.", no_args_is_help=True)


@app.callback()
def _runs() -> None:
    """The folders of runs."""


@app.command()
def prune(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run, or a folder with runs in it.")] = Path(
        "runs"
    ),
    registry: Annotated[Path | None, typer.Option(help="Folder of the registry; default: each run's own.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete weights and checkpoints of runs whose model the registry holds, every byte read back first. What was recorded stays."""
    from posttrain.files import size_text
    from posttrain.pipeline.prune import prune_runs

    results = prune_runs(folder, registry, dry_run=dry_run)
    if as_json:
        echo_json([asdict(one) for one in results])
        return
    word, total = "would be deleted" if dry_run else "deleted", 0
    for one in results:
        total += one.num_bytes
        said = f"kept: {one.kept}" if one.kept else f"{size_text(one.num_bytes)} {word}; its model is {one.version}"
        typer.echo(f"{one.run}  {said}")
    typer.echo(f"{size_text(total)} {word}")
