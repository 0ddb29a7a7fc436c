"""How many parameters a stage trains: all, those that are left unfrozen, or an adapter's."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from posttrain.errors import ModelError
from posttrain.names import is_pattern
from posttrain.planner.shape import ModelShape
from posttrain.planner.workload import Workload

_WEIGHTS = "adapter_model.safetensors"
_BLOCKS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj")}
"""Linear modules of a layer by the block that they stand in; the others stand in the MLP."""


def trained_params(shape: ModelShape, workload: Workload) -> int:
    """Leans to the high side where it depends on names that the config does not say. Raises: ModelError for an adapter without weights."""
    if workload.adapter == "none":
        return _unfrozen(shape, workload)
    if (given := _given(workload)) is not None:
        return saved_params(given)
    return adapter_params(shape, workload.lora_r, workload.lora_target)


def adapter_params(shape: ModelShape, rank: int, target: Sequence[str] | str) -> int:
    """Parameters of a LoRA adapter: rank · (inputs + outputs) of every module it is put on."""
    return sum(
        rank * (rows + columns) * math.ceil(count * _targeted(shape.num_layers, name, target) / shape.num_layers)
        for name, (rows, columns, count) in shape.linear_shapes.items()
    )


def saved_params(adapter: Path) -> int:
    """Values in an adapter's file, by the sizes at its start. Raises: ModelError."""
    path = adapter / _WEIGHTS
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return sum(math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise ModelError(
            f"{path} cannot be read ({type(error).__name__}); expected the weights of a LoRA adapter, as PEFT saves it"
        ) from error


def _given(workload: Workload) -> Path | None:
    """The adapter that the stage goes on with, where it is there already."""
    if workload.adapter_name_or_path is not None:
        return Path(workload.adapter_name_or_path)
    before = Path(workload.base_model).parent / "adapter"
    return before if workload.adapter_start == "continue" and (before / _WEIGHTS).is_file() else None


def _unfrozen(shape: ModelShape, workload: Workload) -> int:
    if not (workload.unfrozen_layers or workload.unfrozen_parameters):
        return shape.num_params
    layers = min(abs(workload.unfrozen_layers), shape.num_layers)
    found = _layer(shape, workload.unfrozen_layer_modules) * layers
    sizes = dict(_named(shape)) if workload.unfrozen_parameters else {}
    matched: set[str] = set()
    for pattern in workload.unfrozen_parameters:
        names = [name for name in sizes if re.match(pattern, name)]
        if not names:
            return shape.num_params
        matched.update(names)
    return min(shape.num_params, found + sum(sizes[name] for name in matched))


def _layer(shape: ModelShape, modules: Sequence[str]) -> int:
    """Of a layer as it is on average: all, or what is in these of its modules."""
    if not modules or not {"self_attn", "mlp"}.issuperset(modules):
        return math.ceil((shape.num_params - shape.embedding_params) / shape.num_layers)
    sizes = ((name, rows * columns * count) for name, (rows, columns, count) in shape.linear_shapes.items())
    return math.ceil(sum(size for name, size in sizes if _block(name) in modules) / shape.num_layers)


def _named(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """Parameters by the names that most families give them; several of one name in an MoE are one."""
    yield "model.embed_tokens.weight", shape.vocab * shape.hidden
    if not shape.tied:
        yield "lm_head.weight", shape.vocab * shape.hidden
    yield "model.norm.weight", shape.hidden
    for layer in range(shape.num_layers):
        for name, (rows, columns, count) in shape.linear_shapes.items():
            path = f"model.layers.{layer}.{_block(name)}.{name}.weight"
            yield path, math.ceil(rows * columns * count / shape.num_layers)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", shape.hidden


def _block(name: str) -> str:
    return next((block for block, names in _BLOCKS.items() if name in names), "mlp")


def _targeted(num_layers: int, name: str, target: Sequence[str] | str) -> int:
    """In how many layers `lora_target` names this module."""
    if target == "all-linear":
        return num_layers
    if not isinstance(target, str) and any(
        entry.split(".")[-1] == name.split(".")[-1] for entry in target if not is_pattern(entry)
    ):
        return num_layers
    patterns = [
        re.compile(entry)
        for entry in ([target] if isinstance(target, str) else target)
        if isinstance(target, str) or is_pattern(entry)
    ]
    paths = ((name, f"model.layers.{layer}.{_block(name)}.{name}") for layer in range(num_layers))
    return sum(any(pattern.fullmatch(path) for pattern in patterns for path in named) for named in paths)
