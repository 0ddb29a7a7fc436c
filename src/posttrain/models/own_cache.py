"""The cache that a model itself keeps of what it has read: keys and values, states of a recurrence, or both, by transformers' own classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import ModelError

_NAMES = ("past_key_values", "cache_params")


@dataclass(frozen=True, slots=True)
class OwnCache:
    """What a model keeps of a sequence, and by which name it gives and takes it."""

    name: str
    kept: Any

    def copy(self) -> OwnCache:
        """Another one, which goes on by itself."""
        return OwnCache(self.name, copy.deepcopy(self.kept))


def run_on(model: Any, ids: Sequence[int], before: OwnCache | None = None) -> tuple[torch.Tensor, OwnCache]:
    """Logits of what follows `ids` behind the tokens of `before`, which is used up, and the cache of all. Shape: [V].

    Raises: ModelError for a model that keeps none.
    """
    given = {} if before is None else {before.name: before.kept}
    ids_1T = torch.tensor([list(ids)], device=model.device)
    output = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1, **given)
    for name in _NAMES:
        if (kept := output.get(name)) is not None:
            return output.logits[0, -1], OwnCache(name, kept)
    raise ModelError(f"{type(model).__name__} keeps no cache of what it has read")
