"""What every objective returns, and how its metrics leave the device in one transfer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

from posttrain.types import Ratio

SpecT = TypeVar("SpecT")


@dataclass(frozen=True, slots=True)
class LossTerms:
    """A loss already divided by global counts: micro-batches and ranks add up to the loss of the step."""

    loss: Tensor
    metrics: dict[str, Ratio]


def as_ratios(sums: Mapping[str, tuple[Tensor, Tensor | float]]) -> dict[str, Ratio]:
    """`name → (sum, count)` as plain numbers; one device transfer for all of them."""
    if not sums:
        return {}
    device = next(iter(sums.values()))[0].device
    flat = [torch.as_tensor(value, dtype=torch.float64, device=device) for pair in sums.values() for value in pair]
    numbers: list[float] = torch.stack([value.detach() for value in flat]).tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return {name: Ratio(num, den) for name, num, den in zip(sums, numbers[::2], numbers[1::2], strict=True)}


def spec_from(spec_type: type[SpecT], keys: object) -> SpecT:
    """A spec dataclass from an object that has all of its fields as attributes (a stage's configuration)."""
    names = [f.name for f in fields(spec_type)]  # pyright: ignore[reportArgumentType]
    missing = [name for name in names if not hasattr(keys, name)]
    assert not missing, f"{type(keys).__name__} has no {', '.join(missing)}, which {spec_type.__name__} is made from"
    return spec_type(**{name: getattr(keys, name) for name in names})
