"""`posttrain tinker MODEL...`: a server that scripts written on Tinker's SDK train on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.cli.serve import require_serving
from posttrain.errors import MissingExtraError

if TYPE_CHECKING:
    from posttrain.serve.run import Serving
    from posttrain.serve.tinker.service import TinkerService


def tinker(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="A base: folder, hub id, or NAME=FOLDER; its name is what clients ask for."
        ),
    ],
    folder: Annotated[
        Path, typer.Option("--out", help="Folder of the models and their saves; started again, it goes on there.")
    ] = Path("tinker"),
    host: Annotated[
        str, typer.Option(help="Address to listen at; other than this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8100,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token, which begins with tml-; else POSTTRAIN_SERVE_TOKEN.")
    ] = None,
    micro_batch: Annotated[int, typer.Option(min=1, help="Datums that go through the model at once.")] = 8,
    max_models: Annotated[int, typer.Option(min=1, help="Adapters of clients in memory at once.")] = 8,
    max_snapshots: Annotated[
        int, typer.Option(min=1, help="Of each model, weights to sample from that have no name.")
    ] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are told 429.")] = 256,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Largest request.")] = 16.0,
    stall_s: Annotated[float, typer.Option(min=0.1, help="Hang up on a client that sends nothing for so long.")] = 30.0,
    drain_s: Annotated[float, typer.Option(min=0.0, help="On SIGTERM, wait so long for requests under way.")] = 30.0,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections open at once; more are told 429.")] = 1024,
) -> None:
    """Train for clients of Tinker's SDK: they write the loop, their steps run here. Saves are stages that eval, gate and serve take."""
    require_serving("tinker")
    _require()
    from posttrain.pipeline.show import quiet_libraries
    from posttrain.serve.options import ServeOptions, read_token
    from posttrain.serve.tinker.options import TinkerOptions, named_models
    from posttrain.serve.tinker.run import run_tinker

    serve = ServeOptions(
        host, port, read_token(token_file), max_queue=max_queue, max_body_bytes=int(max_body_mib * (1 << 20)), stall_s=stall_s,
        drain_s=drain_s, max_connections=max_connections,
    )  # fmt: skip
    options = TinkerOptions(named_models(models), folder, serve, micro_batch, max_models, max_snapshots)
    quiet_libraries()
    run_tinker(options, _ready)


def _require() -> None:
    try:
        import tinker.proto  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"tinker needs {error.name}; install it with: pip install 'posttrain[tinker]'"
        ) from error


def _ready(serving: Serving[TinkerService]) -> None:
    for name in serving.service.options.models:
        typer.echo(name, err=True)
    typer.echo(f"listening at {serving.address}", err=True)
