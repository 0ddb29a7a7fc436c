"""`posttrain import FILE`: another tool's configuration as a YAML of ours, with a comment per key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            help="A YAML of Axolotl, LLaMA-Factory, TRL or torchtune, a script with their command or one of OpenRLHF or verl, or a file of accelerate or DeepSpeed.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where to write; - prints it. Left out: NAME.posttrain.yaml beside FILE."),
    ] = None,
    tool: Annotated[
        str | None,
        typer.Option(
            help="axolotl, llamafactory, trl, torchtune, openrlhf, verl, accelerate or deepspeed; found from the keys if left out."
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="The stage, such as sft, where the file does not say it.")] = None,
) -> None:
    """Write another tool's configuration as ours. Exit code 64 if a key changes what is learned and cannot be had here, or the model's files, where they are here, do not go with it."""
    from posttrain.config.importers.convert import import_file

    target = out or file.with_name(f"{file.stem}.posttrain.yaml")
    imported = import_file(file, None if str(out) == "-" else target, tool, stage)
    if str(out) == "-":
        typer.echo(imported.text, nl=False)
        return
    for note in imported.notes:
        typer.echo(note, err=True)
    if not imported.whole:
        typer.echo(f"wrote {target}: put its keys into the YAML of a stage; its first lines say how to start it")
        return
    typer.echo(f"wrote {target}; next: posttrain plan {target}, then posttrain {imported.kind} {target}")
    _ask_the_model(imported.kind, target)


def _ask_the_model(kind: str, written: Path) -> None:
    """Where the model's files are here. Raises: PosttrainError for what a run of the written YAML would refuse before it reads any data."""
    from posttrain.cli.model import has_files
    from posttrain.config.load import as_pipeline, load_stage

    keys = as_pipeline(load_stage(kind, written))
    if has_files(keys.base_model):
        from posttrain.pipeline.before_data import check_before_data

        check_before_data(keys, here=False)
