"""Running rows without a cache: the whole sequence is run again for each token, which is right for every architecture."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.models.lengths import forget_lengths
from posttrain.models.policy import Policy


class AloneRows:
    """Rows of models that the ragged layout is not exact for; a finished row is overwritten by the last one."""

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
