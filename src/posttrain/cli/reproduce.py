"""`posttrain reproduce REF`: is a registered version what it is said to be? The exit code says."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from posttrain.pipeline.reproduce import Comparison, Version


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
            is_merge = level == 2 and version.chain[-1].stage == "merge"
            for check in _merged_again(version) if is_merge else LEVELS[level](version):
                checks.append(check)
                typer.echo(str(check))
        code = exit_code(checks)
        where = f"; kept in {scratch}" if out else ""
        verdict = {0: "reproduced", 1: "not reproduced", 2: "cannot be said"}[code]
        typer.echo(f"{version.entry.name}@{version.entry.version} level {level}: {verdict}{where}")
    raise typer.Exit(code)


def _merged_again(version: Version) -> Iterator[Comparison]:
    """Merge the parents again by the recorded recipe: the same bytes, whatever the machine."""
    from posttrain.errors import PosttrainError
    from posttrain.forms.lineage import merge_again
    from posttrain.pipeline.reproduce import Comparison
    from posttrain.registry.manifest import MODEL

    manifest = version.chain[-1]
    project = (version.project or Path()).resolve()
    try:
        now = merge_again(version.book, manifest, version.scratch / "merge", project)
    except PosttrainError as error:
        yield Comparison("parents", "missing", str(error))
        return
    recorded = manifest.outputs[MODEL]
    yield Comparison(
        "weights of merge",
        "same" if now == recorded else "differs",
        now if now == recorded else f"recorded {recorded}, now {now}",
    )
