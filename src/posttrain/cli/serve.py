"""`posttrain serve MODEL`: an OpenAI-compatible endpoint for a folder, or for what a registry's alias means at any time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from posttrain.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from posttrain.serve.run import Serving
    from posttrain.serve.service import Service

EngineName = Literal["embedded", "vllm", "sglang"]
"""As `ServeOptions` has it; the extra is not imported to say how the command is used."""


def serve(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="NAME[@ALIAS|@VERSION], or a model's folder.")
    ],
    registry: Annotated[Path, typer.Option(help="Folder of the registry.")] = Path("registry"),
    base: Annotated[
        Path | None, typer.Option(help="Serve each version of the names as its adapter of this base (adapter_total).")
    ] = None,
    lora: Annotated[
        list[str], typer.Option(metavar="NAME=FOLDER", help="An adapter of the base; may be given again.")
    ] = [],  # noqa: B006
    name: Annotated[str | None, typer.Option(help="What the folder is called; default: its own name.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; other than this machine's own needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the token; else POSTTRAIN_SERVE_TOKEN.")] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Answers decoded at once.")] = 64,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait beside them; more are told 429.")] = 256,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Most tokens of prompt and answer.")] = None,
    kv_memory_gib: Annotated[float, typer.Option(min=0.001, help="Memory for keys and values, of each model.")] = 4.0,
    max_loras: Annotated[int, typer.Option(min=1, help="Adapters in memory at once.")] = 8,
    max_body_mib: Annotated[float, typer.Option(min=0.001, help="Largest request.")] = 4.0,
    stall_s: Annotated[float, typer.Option(min=0.1, help="Hang up on a client that takes nothing for so long.")] = 30.0,
    drain_s: Annotated[float, typer.Option(min=0.0, help="On SIGTERM, wait so long for answers under way.")] = 30.0,
    follow_s: Annotated[float, typer.Option(min=0.05, help="How often the registry is looked at.")] = 1.0,
    engine: Annotated[
        EngineName, typer.Option(help="What samples: this process, processes of vLLM, or a server at --url.")
    ] = "embedded",
    max_lora_rank: Annotated[int, typer.Option(min=1, max=512, help="Largest rank that vLLM has room for.")] = 64,
    start_timeout_s: Annotated[float, typer.Option(min=1.0, help="Wait so long for vLLM to start.")] = 600.0,
    engine_timeout_s: Annotated[
        float, typer.Option(min=1.0, help="Start vLLM anew if it says nothing so long.")
    ] = 60.0,
    url: Annotated[str, typer.Option(help="Server of vLLM or SGLang on this machine that is running already.")] = "",
    engine_token_file: Annotated[
        Path | None, typer.Option(help="File with the token of that server; else POSTTRAIN_ENGINE_TOKEN.")
    ] = None,
    prefix_cache_gib: Annotated[
        float, typer.Option(min=0.0, help="Memory for how prompts begin, kept between requests, of each model.")
    ] = 0.5,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections open at once; more are told 429.")] = 1024,
) -> None:
    """Serve models to the openai client, curl and whatever speaks that API. A name follows its registry: promote while it runs."""
    require_serving("serve")
    from posttrain.pipeline.show import quiet_libraries
    from posttrain.serve.options import ENGINE_TOKEN_VARIABLE, ServeOptions, read_token
    from posttrain.serve.run import run_server
    from posttrain.serve.setup import ServedNames, make_router

    options = ServeOptions(
        host, port, read_token(token_file), max_num_seqs, max_queue, max_model_len, kv_memory_gib, int(max_body_mib * (1 << 20)),
        max_loras, stall_s, drain_s, follow_s, engine, max_lora_rank, start_timeout_s, engine_timeout_s,
        max_connections, url, read_token(engine_token_file, ENGINE_TOKEN_VARIABLE, "--engine-token-file"), prefix_cache_gib,
    )  # fmt: skip
    names = ServedNames(models, registry, base, dict(_named(entry) for entry in lora), name)
    quiet_libraries()
    run_server(options, lambda: make_router(names, options), _ready)


def require_serving(verb: str) -> None:
    """Raises: MissingExtraError."""
    try:
        import fastapi  # noqa: F401
        import httpx  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"{verb} needs {error.name}; install it with: pip install 'posttrain[{verb}]'"
        ) from error


def _named(entry: str) -> tuple[str, Path]:
    name, found, folder = entry.partition("=")
    if not (name and found and folder):
        raise ConfigError(f"--lora {entry}: expected NAME=FOLDER")
    return name, Path(folder).expanduser()


def _ready(serving: Serving[Service]) -> None:
    for name, version in serving.service.router.names.items():
        typer.echo(f"{name}  {version.id}", err=True)
    typer.echo(f"listening at {serving.address}/v1", err=True)
