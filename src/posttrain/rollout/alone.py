"""Running rows one by one, of models that the ragged layout is not exact for: from the cache that the model itself keeps, or each time from the
first token on, which is right for every architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.models.lengths import forget_lengths
from posttrain.models.own_cache import OwnCache, run_on
from posttrain.models.policy import Policy


class AloneRows:
    """The whole sequence is run again for each token; a finished row is overwritten by the last one."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._sequences: list[tuple[int, ...]] = []

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """Each prompt with the logits of what follows it, [V]."""
        return [(prompt, self._next(prompt)) for prompt in prompts]

    def add_row(self, prompt: tuple[int, ...]) -> None:
        self._sequences.append(prompt)

    def drop_row(self, row: int) -> None:
        self._sequences[row] = self._sequences[-1]
        self._sequences.pop()

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """One more token in each row → logits of what follows it, [R, V]."""
        self._sequences = [(*sequence, token) for sequence, token in zip(self._sequences, ids, strict=True)]
        return torch.stack([self._next(sequence) for sequence in self._sequences])

    def _next(self, sequence: tuple[int, ...]) -> torch.Tensor:
        forget_lengths(self._policy.base)
        ids_1T = torch.tensor([sequence], device=self._policy.placement.device)
        return self._policy.model(input_ids=ids_1T, use_cache=False, logits_to_keep=1).logits[0, -1]


class OwnCacheRows:
    """The same with the cache that the model itself keeps: a prompt is run once, and each of its rows goes on from a copy."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._caches: list[OwnCache] = []

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[OwnCache, torch.Tensor]]:
        """Of each prompt what is kept, and the logits of what follows it, [V]."""
        found = [run_on(self._policy.model, prompt) for prompt in prompts]
        return [(cache, scores_V) for scores_V, cache in found]

    def add_row(self, kept: OwnCache) -> None:
        self._caches.append(kept.copy())

    def drop_row(self, row: int) -> None:
        self._caches[row] = self._caches[-1]
        self._caches.pop()

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """One more token in each row → logits of what follows it, [R, V]."""
        found = [run_on(self._policy.model, (token,), cache) for token, cache in zip(ids, self._caches, strict=True)]
        self._caches = [cache for _, cache in found]
        return torch.stack([scores_V for scores_V, _ in found])
