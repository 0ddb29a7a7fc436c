"""Rotary embeddings whose frequencies depend on how long a sequence is: which sequences may be encoded together.

transformers chooses the frequencies of a call by its longest position, so a packed batch is exact only if all of its
sequences have the same. What is long counts inputs: the last token of a sequence is predicted, never encoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.models.batch import Batch, split_by_length


@dataclass(frozen=True, slots=True)
class LengthRule:
    """Beyond `boundary` inputs there are other frequencies: one other set, or with `each` one for every length."""

    boundary: int
    each: bool

    def encoding(self, length: int) -> int:
        """Sequences of which this is equal have the same frequencies."""
        if length <= self.boundary:
            return 0
        return length if self.each else 1


def length_rule(config: Any) -> LengthRule | None:
    """The rule of a model by its config: `longrope` has two sets of frequencies, `dynamic` one for every length."""
    text = config.get_text_config()
    boundaries: set[tuple[int, bool]] = set()
    for rope in rope_parameters(text):
        if rope["rope_type"] == "longrope":
            boundaries.add((rope["original_max_position_embeddings"], False))
        elif "dynamic" in rope["rope_type"]:
            boundaries.add((text.max_position_embeddings, True))
    if not boundaries:
        return None
    # Layers with rules of their own: below the first boundary all agree, and equal lengths always do.
    return LengthRule(min(b for b, _ in boundaries), each=len(boundaries) > 1 or any(each for _, each in boundaries))


def rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """The rotary embeddings that a config names: one, or one per type of layer."""
    parameters: Any = getattr(text_config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return []
    if "rope_type" in parameters:
        return [parameters]  # pyright: ignore[reportReturnType]
    return [value for value in parameters.values() if isinstance(value, dict) and "rope_type" in value]


def by_encoding(model: Any, batch: Batch) -> Iterator[tuple[Batch, torch.Tensor | None]]:
    """Parts of a batch whose sequences have the same frequencies, each with the places of its scored tokens.

    None stands for all places. The model is to be called before the next part is asked for.
    """
    rule = length_rule(model.config)
    parts = [(batch, None)] if rule is None else split_by_length(batch, rule.encoding)
    for part, places in parts:
        forget_lengths(model)
        yield part, places


def forget_lengths(model: Any) -> None:
    """What `dynamic` keeps of longer calls would change the frequencies of the next one."""
    rule = length_rule(model.config)
    if rule is None or not rule.each:
        return
    for module in model.modules():
        names = [name for name in (*vars(module), *module._buffers) if name.endswith("original_inv_freq")]
        for name in names if hasattr(module, "original_max_seq_len") else []:
            prefix = name.removesuffix("original_inv_freq")
            original = getattr(module, name)
            module.register_buffer(
                f"{prefix}inv_freq", original.to(getattr(module, f"{prefix}inv_freq").device), persistent=False
            )
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
