"""`posttrain ui [FOLDER]`: the runs, gates and registry of a folder as pages for a browser on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.serve import require_serving

if TYPE_CHECKING:
    from posttrain.cli.pages.run import PageService
    from posttrain.serve.run import Serving


def ui(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Folder whose runs, registry and YAMLs are shown; no path leads out of it.")
    ] = Path(),
    allow_acts: Annotated[
        bool, typer.Option("--allow-acts", help="Let pages start, decide, promote and roll back, each after its command was shown.")
    ] = False,
    chat: Annotated[
        list[str], typer.Option(metavar="MODEL", help="A model's folder or NAME[@ALIAS|@VERSION] to talk to; may be given again.")
    ] = [],  # noqa: B006
    registry: Annotated[Path, typer.Option(help="Folder of the registry, inside FOLDER.")] = Path("registry"),
    host: Annotated[
        str, typer.Option(help="Address to listen at; other than this machine's own needs a token of yours.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8200,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token; else POSTTRAIN_SERVE_TOKEN, else a new one at each start.")
    ] = None,
) -> None:  # fmt: skip
    """Show runs, curves, gates and the registry in a browser. Read-only without --allow-acts."""
    require_serving("ui")
    import os
    import secrets

    from posttrain.cli.agent_folder import ServedFolder
    from posttrain.cli.pages.app import page_address
    from posttrain.cli.pages.run import run_pages
    from posttrain.cli.pages.site import Site
    from posttrain.pipeline.show import quiet_libraries
    from posttrain.serve.options import ServeOptions, read_token
    from posttrain.serve.setup import ServedNames, make_router

    given = read_token(token_file)
    ServeOptions(host, port, given).check()
    options = ServeOptions(host, port, given or secrets.token_urlsafe(32), max_queue=8, stall_s=30.0, drain_s=10.0)
    place = ServedFolder(folder)
    os.chdir(place.root)  # a relative path means what it means to a command typed there
    held = place.shown(place.inside(registry))

    def ready(serving: Serving[PageService]) -> None:
        typer.echo(f"serving {place.root}, {'acts too' if allow_acts else 'read-only'}", err=True)
        typer.echo(f"open {page_address(serving.address, options.token)}", err=True)

    quiet_libraries()
    run_pages(
        options, lambda names: Site(place, options.token, registry=held, allow_acts=allow_acts, chat_models=names),
        (lambda: make_router(ServedNames(chat, Path(held)), options)) if chat else None, ready,
    )  # fmt: skip
