"""Which tensors of which models make each tensor of the result, and by which numbers. Reads no weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import ConfigError
from posttrain.forms.merging.recipe import MergeRecipe, MergeSource, Slice, settings_of

_LAYER = re.compile(r"^(.*?\b(?:layers|h|blocks)\.)(\d+)(\..+)$")
_FIRST = re.compile(r"embed|wte|wpe")
"""What stands before the layers, in a name that is of no layer; the rest stands behind them."""


@dataclass(frozen=True, slots=True)
class MergePart:
    """One model's share in a tensor."""

    model: str
    name: str
    is_base: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    name: str
    parts: tuple[MergePart, ...]
    shared: Mapping[str, Any]


def depth(names: Sequence[str]) -> int:
    """Number of layers that these tensors belong to."""
    return 1 + max((int(found.group(2)) for name in names if (found := _LAYER.match(name))), default=-1)


def planned(recipe: MergeRecipe, names: Mapping[str, Sequence[str]]) -> Iterator[PlannedTensor]:
    """The tensors of the result in the order of a model: before the layers, layer by layer, behind them.

    `names` are those of each model of the recipe. Raises: ConfigError where a slice asks for layers that a model lacks.
    """
    first, last = recipe.slices[0], recipe.slices[-1]
    reference = names[first.sources[0].model]
    outside = [name for name in _of_any(first, names) if not _LAYER.match(name)]
    yield from (
        _tensor(recipe, first, name, [name] * len(first.sources), 0.0) for name in outside if _FIRST.search(name)
    )
    layer = 0
    for part in recipe.slices:
        ranges = [_range(source, names[source.model]) for source in part.sources]
        if len({end - start for start, end in ranges}) != 1:
            raise ConfigError(
                f"models of {sorted({end - start for start, end in ranges})} layers cannot be merged whole; "
                "name layers of equal number with `slices`"
            )
        count = ranges[0][1] - ranges[0][0]
        for place in range(count):
            t = place / (count - 1) if count > 1 else 1.0
            for prefix, suffix in _of_layer(reference):
                inside = [f"{prefix}{start + place}{suffix}" for start, _ in ranges]
                yield _tensor(recipe, part, f"{prefix}{layer}{suffix}", inside, t)
            layer += 1
    behind = [name for name in outside if not _FIRST.search(name)]
    yield from (_tensor(recipe, last, name, [name] * len(last.sources), 0.0) for name in behind)


def layers_of(recipe: MergeRecipe, names: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
    """For each layer of the result, the model that its entry of the config comes from, and the layer there."""
    found: list[tuple[str, int]] = []
    for part in recipe.slices:
        source = part.sources[0]
        start, end = _range(source, names[source.model])
        found += [(source.model, number) for number in range(start, end)]
    return found


def _of_any(part: Slice, names: Mapping[str, Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for source in part.sources for name in names[source.model]))


def _range(source: MergeSource, names: Sequence[str]) -> tuple[int, int]:
    has = depth(names)
    start, end = source.layers or (0, has)
    if end > has:
        raise ConfigError(f"layer_range [{start}, {end}]: {source.model} has only {has} layers")
    return start, end


def _of_layer(names: Sequence[str]) -> list[tuple[str, str]]:
    """What stands before and behind the number, for every tensor of a layer."""
    found = (_LAYER.match(name) for name in names)
    return list(dict.fromkeys((match.group(1), match.group(3)) for match in found if match))


def _tensor(recipe: MergeRecipe, part: Slice, name: str, inside: Sequence[str], t: float) -> PlannedTensor:
    said = (part.parameters, recipe.parameters)
    shared = settings_of(recipe.row.shared, said, name, t, "the recipe")
    parts = []
    for source, own in zip(part.sources, inside, strict=True):
        is_base = source.model == part.base
        wanted = recipe.row.of_model if recipe.row.of_base or not is_base else {}
        settings = settings_of(wanted, (source.parameters, *said), own, t, source.model)
        _check_density(settings, own, source.model)
        parts.append(MergePart(source.model, own, is_base, settings))
    return PlannedTensor(name, tuple(parts), shared)


def _check_density(settings: Mapping[str, Any], tensor: str, model: str) -> None:
    density, epsilon = settings.get("density", 1.0), settings.get("epsilon", 0.0)
    if not 0 <= density <= 1:
        raise ConfigError(f"parameters.density: got {density} for {tensor} of {model}; expected a share from 0 to 1")
    if epsilon and 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise ConfigError(
            f"parameters.epsilon: got {epsilon} with density {density} for {tensor} of {model}; expected density ± epsilon "
            "between 0 and 1"
        )
