"""What the command line names → a router over sources and a pool."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from posttrain.config.places import looks_local
from posttrain.errors import ConfigError, ModelError
from posttrain.serve.backends import AdaptersOfOneBase, StartedEngine, StartEngine, WholeModels, of_folder
from posttrain.serve.embedded import start_embedded
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import ModelVersion, Pool
from posttrain.serve.router import NameSource, Router
from posttrain.serve.sglang import start_sglang
from posttrain.serve.sources import Folders, RegistryAdapters, RegistryModels, Together, adapter_folder
from posttrain.serve.vllm import start_vllm


@dataclass(frozen=True)
class ServedNames:
    """`models`: folders, or NAME[@ALIAS|@VERSION] of `registry`. With a `base` they are names whose versions are adapters of it.

    `loras`: name → folder of an adapter of the base, which is then the only model, or `base`.
    """

    models: Sequence[str]
    registry: Path
    base: Path | None = None
    loras: Mapping[str, Path] = field(default_factory=dict[str, Path])
    name: str | None = None


def make_router(names: ServedNames, options: ServeOptions) -> Router:
    """Raises: ConfigError, ModelError or RegistryError for names that cannot be served together."""
    if names.base is None and not names.loras:
        return _whole(names, options)
    return _adapters(names, options)


def _whole(names: ServedNames, options: ServeOptions) -> Router:
    folders = [model for model in names.models if _is_folder(model)]
    refs = [model for model in names.models if model not in folders]
    if names.name is not None and (len(folders), len(refs)) != (1, 0):
        raise ConfigError("--name is for one folder; versions of a registry have names")
    found = [of_folder(names.name or _name_of(Path(folder)), _model_folder(folder)) for folder in folders]
    sources: list[NameSource] = [Folders(found)] if found else []
    sources += [RegistryModels(names.registry, refs)] if refs else []
    default = found[0].name if names.models[0] in folders else names.models[0]
    if options.url:
        _check_given(names, options)
    # A server by URL has one model in memory: the next is loaded when the last has answered.
    pool = Pool(WholeModels(_engine(options)), 1 if options.url else None)
    return Router(
        Together(sources), pool, options.follow_s, retire=True, default=default, one_at_a_time=bool(options.url)
    )


def _check_given(names: ServedNames, options: ServeOptions) -> None:
    """Raises: ConfigError for more than the server at a URL can have."""
    if len(names.models) != 1:
        raise ConfigError(f"--url is a server with one model; got {', '.join(names.models)}: serve each from its own")
    [model] = names.models
    if options.engine == "vllm" and not (_is_folder(model) or model.rpartition("@")[2].isdigit()):
        raise ConfigError(
            f"{model}: a server of vLLM by --url keeps the model that it was started with and cannot follow an alias; name a "
            "version (NAME@3), serve adapters (--base), use --engine sglang, or leave --url out"
        )


def _adapters(names: ServedNames, options: ServeOptions) -> Router:
    base_folder = names.base
    refs = list(names.models)
    if base_folder is None:
        if len(refs) != 1 or not _is_folder(refs[0]):
            raise ConfigError(
                "--lora needs the base of the adapters: give its folder as the one model, or --base FOLDER"
            )
        base_folder, refs = Path(refs[0]), []
    if bad := [ref for ref in refs if "@" in ref or _is_folder(ref)]:
        raise ConfigError(
            f"with --base the models are names of a registry, each with all its versions; got {bad[0]}: write the name alone"
        )
    base = of_folder(names.name or _name_of(base_folder), _model_folder(str(base_folder)))
    fixed = [base, *(adapter_folder(name, folder, base) for name, folder in names.loras.items())]
    clash = [version.name for version in fixed[1:] if version.name in (base.name, *refs)]
    if clash:
        raise ConfigError(f"{clash[0]} names two models; give one another name with --lora NAME=FOLDER or --name")
    sources: list[NameSource] = [Folders(fixed)]
    sources += [RegistryAdapters(names.registry, refs, base)] if refs else []
    pool = Pool(AdaptersOfOneBase(_engine(options), base), options.max_loras, frozenset({base}))
    return Router(Together(sources), pool, options.follow_s, retire=False, default=refs[0] if refs else base.name)


ENGINES: Mapping[str, Callable[[ServeOptions, ModelVersion, bool], Awaitable[StartedEngine]]] = {
    "embedded": start_embedded,
    "vllm": start_vllm,
    "sglang": start_sglang,
}
"""`--engine` → what starts it on a version, and whether that is to take adapters."""


def _engine(options: ServeOptions) -> StartEngine:
    return partial(ENGINES[options.engine], options)


def _is_folder(model: str) -> bool:
    return looks_local(model) or "/" in model or Path(model).expanduser().is_dir()


def _model_folder(model: str) -> Path:
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"{model} is an adapter; serve it with its base: posttrain serve BASE --lora NAME={model}")
        raise ModelError(
            f"{model}: no config.json there; expected a model's folder, or NAME[@ALIAS|@VERSION] of a registry"
        )
    return folder


def _name_of(folder: Path) -> str:
    """A stage's model is called by its stage."""
    folder = folder.expanduser().resolve()
    return folder.parent.name if folder.name == "model" else folder.name
