"""Keys and values of how prompts begin, kept from one request to the next within one version of the weights.

A prompt is encoded in blocks, each by itself over those before it, whether these were computed just now or long ago: the bits of
an answer do not depend on what was cached. The last block, whose logits are wanted, is always computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from posttrain.models.attention import AttendOptions
from posttrain.models.policy import Policy
from posttrain.models.tree_attention import Window
from posttrain.rollout.kv import attend_masked

BLOCK = 128
"""Tokens. Fewer make more reusable, and more calls of the model for a prompt that is new."""


@dataclass(frozen=True)
class _Block:
    """Per layer. Shapes: [Hkv, BLOCK, D]."""

    adapter: str | None
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.keys, *self.values))


class PrefixCache:
    """At most `max_bytes` of blocks, the least recently used out first. A block belongs to an adapter, and to all tokens up to its end.

    Of prompts of 300 and 310 tokens, the first 256 of which are the same: two blocks, which the second is not charged for.
    """

    def __init__(self, policy: Policy, max_bytes: int) -> None:
        self._policy, self._max_bytes = policy, max_bytes
        self._blocks: OrderedDict[bytes, _Block] = OrderedDict()
        self.num_bytes = 0
        self.tokens_reused = self.tokens_computed = 0

    def takes(self, prompt: Sequence[int]) -> bool:
        """Whether a block of it could be used again."""
        return len(prompt) > BLOCK

    def encode(
        self, adapter: str | None, prompt: Sequence[int], assign: Callable[[int], None]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Keys and values per layer, [Hkv, P, D], and the logits of what follows, [V].

        `assign` is told before each forward of how many tokens it is.
        """
        store, names = _PrefixStore(len(prompt)), list(_names(adapter, prompt))
        for name in names:
            if (block := self._blocks.get(name)) is None:
                break
            store.put(block.keys, block.values)
        self.tokens_reused += store.length
        self.tokens_computed += len(prompt) - store.length
        logits_V = torch.empty(0)
        while store.length < len(prompt):
            first = store.length
            stop = min(first + BLOCK, len(prompt))
            assign(stop - first)
            logits_V = self._forward(prompt[first:stop], store)
            if stop - first == BLOCK and first // BLOCK < len(names):
                self._add(names[: first // BLOCK + 1], _Block(adapter, *store.cut(first, stop)))
        self._touch(names)
        return store.keys, store.values, logits_V

    def _forward(self, ids: Sequence[int], store: _PrefixStore) -> torch.Tensor:
        device = self._policy.placement.device
        ids_S = torch.tensor(ids, device=device)
        store.begin(torch.arange(store.length, store.length + len(ids), device=device))
        output = self._policy.model(
            input_ids=ids_S[None],
            position_ids=store.positions_S[None],
            logits_to_keep=1,
            use_cache=False,
            kv_store=store,
        )
        store.length += len(ids)
        return output.logits[0, -1]

    def _add(self, names: Sequence[bytes], block: _Block) -> None:
        """The last of `names`; the others are of those before it."""
        self._blocks[names[-1]] = block
        self.num_bytes += block.num_bytes
        self._touch(names)
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._blocks.popitem(last=False)[1].num_bytes

    def _touch(self, names: Sequence[bytes]) -> None:
        """A block is of no use without those before it, so these must not go first."""
        for name in reversed(names):
            if name in self._blocks:
                self._blocks.move_to_end(name)

    def forget(self, adapter: str) -> None:
        """All that was encoded with it."""
        for name in [name for name, block in self._blocks.items() if block.adapter == adapter]:
            self.num_bytes -= self._blocks.pop(name).num_bytes


class _PrefixStore:
    """The prompt that is being encoded. A `KVStore`."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self.length = 0
        self.positions_S = torch.empty(0, dtype=torch.long)

    @property
    def keys(self) -> list[torch.Tensor]:
        return [tensor[:, : self.length] for tensor in self._keys]

    @property
    def values(self) -> list[torch.Tensor]:
        return [tensor[:, : self.length] for tensor in self._values]

    def begin(self, positions_S: torch.Tensor) -> None:
        self.positions_S = positions_S

    def put(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """What comes next was computed before."""
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self._write(layer, key, value)
        self.length += keys[0].shape[1]

    def cut(self, first: int, stop: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        keys, values = ([tensor[:, first:stop].clone() for tensor in kept] for kept in (self._keys, self._values))
        return keys, values

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        raise AssertionError("blocks are attended to, not kept beside a layout")

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """A sequence's next tokens. Shapes: query [1, Hq, S, D], key and value [1, Hkv, S, D] → [1, Hq, S, D]."""
        self._write(layer, key[0], value[0])
        num_kv, num_new, width = key.shape[1:]
        stop = self.length + num_new
        # The query heads of one kv head act as so many query positions: no head is repeated.
        query_H = query[0].reshape(1, num_kv, -1, width)
        hidden_SK = _hidden(self.positions_S, stop, options.window)
        mask = torch.zeros(hidden_SK.shape, dtype=query.dtype, device=query.device).masked_fill(hidden_SK, -torch.inf)
        mask = mask.repeat(query_H.shape[2] // num_new, 1)[None, None]
        keys, values = (tensor[None, :, :stop] for tensor in (self._keys[layer], self._values[layer]))
        out, _ = attend_masked(query_H, keys, values, mask, options)
        return out.reshape(1, query.shape[1], num_new, -1)

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer == len(self._keys):
            for tensors, new in ((self._keys, key), (self._values, value)):
                tensors.append(new.new_empty(new.shape[0], self._capacity, new.shape[2]))
        place = slice(self.length, self.length + key.shape[1])
        self._keys[layer][:, place], self._values[layer][:, place] = key, value


def _hidden(positions_S: torch.Tensor, stop: int, window: Window | None) -> torch.Tensor:
    """What each position does not attend to. Shape: [S, stop]."""
    age_SK = positions_S[:, None] - torch.arange(stop, device=positions_S.device)
    hidden_SK = age_SK < 0
    return hidden_SK if window is None else hidden_SK | (age_SK >= window.reach(positions_S)[:, None])


def _names(adapter: str | None, prompt: Sequence[int]) -> Iterator[bytes]:
    """Of each whole block before the last token: a digest of the adapter and of all ids up to the block's end."""
    digest = hashlib.sha256((adapter or "").encode()).digest()
    for first in range(0, (len(prompt) - 1) // BLOCK * BLOCK, BLOCK):
        digest = hashlib.sha256(digest + np.array(prompt[first : first + BLOCK], np.int64).tobytes()).digest()
        yield digest
