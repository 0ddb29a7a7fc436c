"""`posttrain merge`: models by mergekit's YAML, or one adapter into its base, written only if its logits are the same."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from posttrain.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from posttrain.config.stages import ModelKeys


def merge(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CONFIG.yaml | ADAPTER_DIR", help="mergekit's YAML, or a folder with adapter_config.json."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names.")] = None,
    onto: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(help="A base in 4 or 8 bits: which weights of the base to merge onto."),
    ] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help="The adapter was trained on a 4-bit base.")
    ] = None,
    adapter_rank: Annotated[
        int | None, typer.Option(min=1, help="YAML of adapters: write the result as one adapter of this rank.")
    ] = None,
    seed: Annotated[int, typer.Option(help="YAML: seed of the masks of DARE and DELLA.")] = 0,
    max_shard_gib: Annotated[float, typer.Option(min=0.001, help="YAML: largest file of the result.")] = 4.0,
    registry: Annotated[Path, typer.Option(help="YAML: registry of versions that it names, and of --register.")] = Path(
        "registry"
    ),
    register: Annotated[
        str | None, typer.Option(metavar="NAME", help="YAML: register the result as a version.")
    ] = None,
) -> None:
    """Merge models by mergekit's YAML, or an adapter into its base, whose logits are then compared.

    For an adapter in the folder of a stage, the base and its quantisation are read from the stage's config.yaml.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new folder, nothing is overwritten")
    if source.suffix in (".yaml", ".yml"):
        if base is not None or onto is not None or load_in_4bit is not None:
            raise ConfigError("--base, --onto and --load-in-4bit are about one adapter; in a YAML set base_model")
        return _by_recipe(source, out, adapter_rank, (seed, max_shard_gib), registry, register)
    if adapter_rank is not None or register is not None:
        raise ConfigError("--adapter-rank and --register are about a YAML that names models to merge")
    _check_adapter(source)
    keys = _keys(source, base, load_in_4bit)
    if onto is not None and not keys.base_bits:
        raise ConfigError(f"--onto {onto} is about a 4-bit base; add --load-in-4bit, or leave --onto out")
    _merge(source, out, keys.model_copy(update={"merge_onto": onto or keys.merge_onto}))


def _check_adapter(adapter: Path) -> None:
    from posttrain.cli.model import is_adapter

    if is_adapter(adapter):
        return
    beside = adapter.parent / "adapter"
    if (adapter / "config.json").is_file():
        its = f"; its adapter is {beside}" if is_adapter(beside) else ""
        raise ModelError(f"{adapter} is a whole model: there is nothing to merge{its}")
    raise ModelError(
        f"{adapter} has no adapter_config.json; expected the folder of a PEFT adapter, or a YAML of mergekit's"
    )


def _by_recipe(
    path: Path, out: Path, adapter_rank: int | None, how: tuple[int, float], registry: Path, register: str | None
) -> None:
    from posttrain.files import reading
    from posttrain.pipeline.show import quiet_libraries

    quiet_libraries()  # before bitsandbytes is imported, which says at once what it would fetch
    from posttrain.forms.found import FoundModel, find_model
    from posttrain.forms.lineage import merge_manifest, register_merge
    from posttrain.forms.merging.merge import MergeOptions, merge_models
    from posttrain.forms.merging.recipe import read_recipe

    if adapter_rank is not None and register is not None:
        raise ConfigError("--register is about a whole model; an adapter is registered with its model")
    parents: dict[str, FoundModel] = {}

    def resolve(name: str) -> Path:
        if name not in parents:
            parents[name] = find_model(name, registry, path.parent)
            read.enter_context(reading(parents[name].folder))
        return parents[name].folder

    recipe = read_recipe(path)
    with ExitStack() as read:
        report = merge_models(recipe, out, resolve, MergeOptions(how[0], int(how[1] * (1 << 30)), adapter_rank))
    typer.echo(f"method   {report.method}, {report.num_tensors} tensors")
    for name, digest in report.parents.items():
        typer.echo(f"parent   {parents[name].version or name}  {digest}")
    if (factored := report.factored) is not None:
        typer.echo(
            f"rank     {factored.rank}: it holds {factored.energy:.4%} of the merged update's energy, at least "
            f"{factored.least:.4%} in each module ({factored.least_module or 'all'})"
        )
    typer.echo(f"{'model' if factored is None else 'adapter'}{' ' * (4 if factored is None else 2)}{out}")
    if register is not None:
        entry = register_merge(out, register, registry, merge_manifest(out, recipe, report, parents))
        typer.echo(
            f"version  {entry.name}@{entry.version}, without an alias: posttrain gate, then registry promote --verdict"
        )


def _merge(adapter: Path, out: Path, keys: ModelKeys) -> None:
    from posttrain.files import reading
    from posttrain.pipeline.show import quiet_libraries

    quiet_libraries()
    from posttrain.models.export import merge_into

    with reading(adapter), reading(Path(keys.base_model)):
        report = merge_into(out, keys.base_model, adapter, keys)
    weights = {"base": keys.base_model, "dequantized": f"{keys.base_model}, dequantised from {keys.base_bits} bits"}
    typer.echo(
        f"adapter  {adapter}\n"
        f"base     {weights.get(report.base, f'{keys.base_model}, original weights (trained on {keys.base_bits} bits)')}\n"
        f"logits   differ by at most {report.max_logit_difference:.1e} of {report.max_logit:.1e} "
        f"({report.relative:.1e} relative)\n"
        f"model    {out}"
    )


def _keys(adapter: Path, base: str | None, load_in_4bit: bool | None) -> ModelKeys:
    """How the adapter was trained: by the command line, else the stage's own record, else what PEFT wrote."""
    from posttrain.cli.model import model_keys
    from posttrain.config.stages import ModelKeys
    from posttrain.forms.merging.adapters import bits_of, trained_on
    from posttrain.models.low_rank import adapter_config

    trained = trained_on(adapter) or ModelKeys(base_model="", **bits_of(adapter))
    named = base or trained.base_model or str(adapter_config(adapter).get("base_model_name_or_path") or "")
    if not named:
        raise ModelError(f"{adapter} does not name its base; add --base MODEL")
    changes = {"base_model": model_keys(named).base_model}
    return trained.model_copy(update=changes | ({} if load_in_4bit is None else {"load_in_4bit": load_in_4bit}))
