"""`posttrain data env verifiers:… OUT`: rows to train on of the tasks that an environment has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.errors import ConfigError


def env(
    name: Annotated[
        str,
        typer.Argument(
            metavar="ENV", help="As under `env`: 'verifiers:PYTHON ID --env.KEY VALUE'.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(dir_okay=False, help="The file to write, JSON lines.", show_default=False)],
    limit: Annotated[int, typer.Option(min=1, help="Tasks to write at most; some environments have no end.")] = 1000,
    suite: Annotated[bool, typer.Option("--suite", help="Write an eval suite that the environment scores.")] = False,
) -> None:
    """Write a row for each task of an environment of verifiers: its prompt, and which task it is."""
    import json

    from posttrain.environments.spec import VERIFIERS, program
    from posttrain.environments.verifiers_client import VerifiersServer
    from posttrain.files import write_atomic
    from posttrain.names import ENVIRONMENT

    if not name.startswith(VERIFIERS):
        raise ConfigError(
            f"got {name!r}, expected {VERIFIERS}PYTHON ID; the tasks of other environments are yours to write"
        )
    if not out.parent.is_dir():
        raise ConfigError(f"{out}: there is no folder {out.parent}; make it first")
    server = VerifiersServer(program(name))
    try:
        rows = server.rows(limit)
    finally:
        server.close()
    if suite:
        rows = [{"id": str(row["task"]), "scorer": ENVIRONMENT, **row} for row in rows]
    write_atomic(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(f"wrote {len(rows)} rows to {out}")
