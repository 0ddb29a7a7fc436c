"""`posttrain reproduce REF`: is a registered version what it is said to be? The exit code says."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer


def reproduce(
    ref: Annotated[str, typer.Argument(metavar="VERSION", help="NAME@VERSION, NAME@ALIAS or alias:ALIAS.")],
    level: Annotated[
        int,
        typer.Option(
            min=0,
            max=2,
            help="0: the verdict from the stored items; 1: the answers of the stored weights; 2: the training.",
        ),
    ] = 0,
    registry: Annotated[Path, typer.Option(help="Folder of the registry.")] = Path("registry"),
    project: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the project lies by now; default: where the registry says."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Scratch folder to keep; default: one that is removed.")] = None,
) -> None:
    """Repeat a registered version. Exit code: 0 the same, 1 something differs, 2 something is missing to say so."""
    from posttrain.cli.registry_folder import open_registry
    from posttrain.errors import ConfigError

    if out is not None and out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: got a folder with files in it, expected a new or an empty one for --out")
    with open_registry(registry, for_reading=True) as book, tempfile.TemporaryDirectory(prefix="posttrain-") as removed:
        from posttrain.pipeline.reproduce import LEVELS, Version, exit_code
        from posttrain.registry.upkeep import using

        scratch = (out or Path(removed)).resolve()
        version = Version(book, book.resolve(ref), scratch, lambda line: typer.echo(line, err=True), project)
        checks = []
        with using(book, version.entry.name, version.entry.version):
            for check in LEVELS[level](version):
                checks.append(check)
                typer.echo(str(check))
        code = exit_code(checks)
        where = f"; kept in {scratch}" if out else ""
        verdict = {0: "reproduced", 1: "not reproduced", 2: "cannot be said"}[code]
        typer.echo(f"{version.entry.name}@{version.entry.version} level {level}: {verdict}{where}")
    raise typer.Exit(code)
