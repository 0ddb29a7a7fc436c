"""`posttrain merge ADAPTER_DIR --out DIR`: one model of base and adapter, written only if its logits are the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from posttrain.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from posttrain.config.stages import ModelKeys


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="Folder with adapter_config.json.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    base: Annotated[str | None, typer.Option(help="Base model; default: the one the adapter names.")] = None,
    onto: Annotated[
        Literal["dequantized", "original"] | None, typer.Option(help="QLoRA: which weights of the base to merge onto.")
    ] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option("--load-in-4bit/--no-load-in-4bit", help="The adapter was trained on a 4-bit base.")
    ] = None,
) -> None:
    """Merge an adapter into its base and compare the logits; a merge that changes them is refused.

    For an adapter in the folder of a stage, the base and its quantisation are read from the stage's config.yaml.
    """
    from posttrain.cli.model import is_adapter

    if not is_adapter(adapter):
        beside = adapter.parent / "adapter"
        if (adapter / "config.json").is_file():
            its = f"; its adapter is {beside}" if is_adapter(beside) else ""
            raise ModelError(f"{adapter} is a whole model: there is nothing to merge{its}")
        raise ModelError(f"{adapter} has no adapter_config.json; expected the folder of a PEFT adapter")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there already; give a new folder, nothing is overwritten")
    keys = _keys(adapter, base, load_in_4bit)
    if onto is not None and not keys.load_in_4bit:
        raise ConfigError(f"--onto {onto} is about a 4-bit base; add --load-in-4bit, or leave --onto out")
    _merge(adapter, out, keys.model_copy(update={"merge_onto": onto or keys.merge_onto}))


def _merge(adapter: Path, out: Path, keys: ModelKeys) -> None:
    from posttrain.models.export import merge_into
    from posttrain.pipeline.show import quiet_libraries

    quiet_libraries()
    report = merge_into(out, keys.base_model, adapter, keys)
    weights = {"base": keys.base_model, "dequantized": f"{keys.base_model}, dequantised from 4 bits"}
    typer.echo(
        f"adapter  {adapter}\n"
        f"base     {weights.get(report.base, f'{keys.base_model}, original weights (trained on 4 bits)')}\n"
        f"logits   differ by at most {report.max_logit_difference:.1e} of {report.max_logit:.1e} "
        f"({report.relative:.1e} relative)\n"
        f"model    {out}"
    )


def _keys(adapter: Path, base: str | None, load_in_4bit: bool | None) -> ModelKeys:
    """How the adapter was trained: by the command line, else the stage's own record, else what PEFT wrote."""
    from posttrain.cli.model import model_keys
    from posttrain.config.stages import ModelKeys
    from posttrain.files import read_json

    trained = _of_stage(adapter) or ModelKeys(base_model="")
    named = (
        base
        or trained.base_model
        or str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path") or "")
    )
    if not named:
        raise ModelError(f"{adapter} does not name its base; add --base MODEL")
    changes = {"base_model": model_keys(named).base_model}
    return trained.model_copy(update=changes | ({} if load_in_4bit is None else {"load_in_4bit": load_in_4bit}))


def _of_stage(adapter: Path) -> ModelKeys | None:
    """How the base under this adapter loads, if it is that of one of our stages in its place."""
    from posttrain.config.load import detect_kind
    from posttrain.models.continued import ADAPTER, base_keys, stage_keys
    from posttrain.models.total import ADAPTER_TOTAL

    path = adapter.resolve().parent / "config.yaml"
    if not path.is_file() or detect_kind(path) == "pipeline":
        return None
    if adapter.resolve().name == ADAPTER_TOTAL:
        # The base that the pipeline was given is that of its first stage.
        stages = sorted(folder for folder in path.parent.parent.glob("*-*") if (folder / "config.yaml").is_file())
        return base_keys(stage_keys(stages[0] if path.parent in stages else path.parent))
    return base_keys(stage_keys(path.parent)) if adapter.resolve().name == ADAPTER else None
