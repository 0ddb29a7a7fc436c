"""Keys and values of prompts: those of one length, or of near ones, lie in one tensor, so that rows of many prompts are attended together."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.models.native import PromptsInMemory


@dataclass(eq=False)
class PromptKV:
    """A prompt that was encoded: its place in a pool, its tokens, and how many rows go on from it.

    The second of three prompts of 40 tokens, with a group of 8 rows: pool of width 40, place 1, length 40, num_rows 8.
    """

    pool: PromptPool
    place: int
    length: int
    num_rows: int = 0


class PromptPool:
    """Prompts of at most `width` tokens; shorter ones are filled up with zeros. Places `[0, num_live)` are those that rows attend
    to: one range, whoever comes and goes.

    A prompt that nobody holds is forgotten; its place is taken by the next.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.num_live = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        """Per layer. Shape: [places, Hkv, width, D]."""
        self._members: list[weakref.ref[PromptKV]] = []
        self._capacity = 0

    @property
    def is_held(self) -> bool:
        return any(member() is not None for member in self._members)

    def reserve(self, lengths: Sequence[int]) -> list[PromptKV]:
        """Places for prompts that are about to be encoded."""
        self._sweep()
        needed = len(self._members) + len(lengths)
        if needed > self._capacity:
            self._resize(needed if not self._members else max(needed, self._capacity * 5 // 4))
        prompts = [PromptKV(self, len(self._members) + number, length) for number, length in enumerate(lengths)]
        self._members += [weakref.ref(prompt) for prompt in prompts]
        return prompts

    def keep(self, layer: int, prompt: PromptKV, key: torch.Tensor, value: torch.Tensor) -> None:
        """Shapes: [Hkv, P, D]."""
        for tensors, new in ((self.keys, key), (self.values, value)):
            if layer == len(tensors):
                tensors.append(new.new_zeros(self._capacity, new.shape[0], self.width, new.shape[2]))
            # What an earlier prompt left behind its end is hidden from the rows, and finite.
            tensors[layer][prompt.place, :, : prompt.length] = new

    def enter(self, prompt: PromptKV) -> None:
        """A row more goes on from it."""
        prompt.num_rows += 1
        if prompt.num_rows == 1:
            self._swap(prompt.place, self.num_live)
            self.num_live += 1

    def leave(self, prompt: PromptKV) -> None:
        prompt.num_rows -= 1
        if prompt.num_rows == 0:
            self.num_live -= 1
            self._swap(prompt.place, self.num_live)

    def live(self) -> list[PromptKV]:
        """By place."""
        return [self._held(place) for place in range(self.num_live)]

    def _held(self, place: int) -> PromptKV:
        prompt = self._members[place]()
        assert prompt is not None, "rows hold the prompts that they go on from"
        return prompt

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        for tensor in (*self.keys, *self.values):
            tensor[[a, b]] = tensor[[b, a]]
        self._members[a], self._members[b] = self._members[b], self._members[a]
        for place in (a, b):
            if (prompt := self._members[place]()) is not None:
                prompt.place = place

    def _sweep(self) -> None:
        """Close the gaps that forgotten prompts left; give memory back where most of it is such gaps."""
        held = [place for place, member in enumerate(self._members) if member() is not None]
        for place, old in enumerate(held):
            self._swap(place, old)
        del self._members[len(held) :]
        if 4 * len(held) <= self._capacity:
            self._resize(len(held))

    def _resize(self, capacity: int) -> None:
        self._capacity, count = capacity, min(capacity, len(self._members))
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_zeros(capacity, *old.shape[1:])
                tensors[layer][:count] = old[:count]


def in_memory(prompt_of: Sequence[PromptKV]) -> PromptsInMemory:
    """Where the prompts of rows lie, until a row or a prompt comes or goes."""
    pools = list(dict.fromkeys(prompt.pool for prompt in prompt_of))
    pool_R, place_R, lengths_R, widths_R = np.array(
        [(pools.index(one.pool), one.place, one.length, one.pool.width) for one in prompt_of], np.int64
    ).T.copy()

    def addresses(tensors: Sequence[torch.Tensor]) -> np.ndarray:
        firsts, steps = np.array([(one.data_ptr(), one.stride(0) * one.element_size()) for one in tensors], np.int64).T
        return firsts[pool_R] + steps[pool_R] * place_R

    kept = [zip(pool.keys, pool.values, strict=True) for pool in pools]
    layers = [tuple(map(addresses, zip(*layer, strict=True))) for layer in zip(*kept, strict=True)]
    return PromptsInMemory(lengths_R, widths_R, layers)
