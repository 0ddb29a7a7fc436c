"""Running rows on a paged key/value cache, a step being one replay of a recorded graph: the embedded engine on a GPU.

Lives as long as the engine, so that graphs outlast calls and updates of the weights. Its attention is one call of the flash
operator, which reads pages; on a CPU, where nothing but tests runs it, the operator is `models/varlen.py`'s.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from posttrain.models.attention import AttendOptions
from posttrain.models.batch import Batch, pack
from posttrain.models.decode import FAMILIES
from posttrain.models.device import uploaded
from posttrain.models.lengths import length_rule
from posttrain.models.policy import Policy
from posttrain.models.varlen import paged_attention, reads_pages
from posttrain.rollout.graphs import Graphs, Recorder, bucket_of, recorder_of
from posttrain.rollout.pages import PAGE, Copy, PagedPrompt, PageTable
from posttrain.types import TokenSeq


def paged_rows(policy: Policy) -> PagedRows | None:
    """Where it is right and faster: on a GPU whose flash kernel reads pages, in a half precision, for models without soft caps or chunks."""
    base: Any = policy.base
    dtype = policy.placement.autocast_dtype or base.dtype
    fits = (
        policy.placement.device.type == "cuda"
        and policy.ragged and not policy.exact and not policy.sharded and not policy.under.base_bits
        and policy.offloaded is None
        and base.config.model_type in FAMILIES and length_rule(base.config) is None
        and reads_pages(policy.placement.device, dtype, base.get_decoder().layers[0].self_attn.head_dim)
    )  # fmt: skip
    return PagedRows(policy) if fits else None


class PagedRows:
    """As `CachedRows`; rows 0..R-1 are alive, and computed in a bucket of the next power of two."""

    def __init__(self, policy: Policy, recorder: Recorder | None = None) -> None:
        self._policy, self._device = policy, policy.placement.device
        self._table = PageTable()
        self._store = _PageStore(self._device, longest=policy.base.config.max_position_embeddings)
        self._graphs = Graphs(recorder or recorder_of(self._device))

        self._read: Any = None

    @property
    def is_busy(self) -> bool:
        return bool(self._table.rows)

    def begin(self) -> PagedRows:
        """A call is about to decode: what was recorded holds only for the same weights at the same addresses, adapter on or off."""
        modules = list(self._policy.model.modules())
        off = [bool(module.disable_adapters) for module in modules if hasattr(module, "disable_adapters")]
        read = (off, [parameter.data_ptr() for parameter in self._policy.model.parameters()])
        if read != self._read:
            self._graphs.forget()
        self._read = read
        return self

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[PagedPrompt, torch.Tensor]]:
        """Each prompt with the logits of what follows it, [V]."""
        # `pack` leaves out a sequence's last token, which predicts nothing in training; here it predicts the answer.
        rows = [[TokenSeq((*prompt, 0), (False,) * (len(prompt) + 1))] for prompt in prompts]
        batch = pack(rows, least_shared=math.inf).to(self._device)
        kept = [self._table.add_prompt(len(prompt)) for prompt in prompts]
        for prompt in kept:
            weakref.finalize(prompt, self._table.drop_prompt, prompt.pages)
        self._make_room()
        logits = self._encode(batch, kept)
        return list(zip(kept, logits, strict=True))

    def _encode(self, batch: Batch, kept: Sequence[PagedPrompt]) -> torch.Tensor:
        places = [self._table.place(prompt.pages, at) for prompt in kept for at in range(prompt.length)]
        self._store.places = torch.tensor(places, device=self._device)
        last = torch.tensor([tree.split - 1 for tree in batch.layout.trees], device=self._device)
        output = self._policy.model(
            input_ids=batch.input_ids_N[None], position_ids=batch.position_ids_N[None],
            logits_to_keep=last, use_cache=False, layout=batch.layout, kv_store=self._store,
        )  # fmt: skip
        return output.logits[0]

    def add_row(self, prompt: PagedPrompt) -> None:
        copy = self._table.add_row(prompt)
        self._make_room()
        if copy is not None:
            self._store.copy(copy)

    def drop_row(self, row: int) -> None:
        self._table.drop_row(row)

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """One more token in each row → logits of what follows it, [R, V]."""
        self._table.advance()
        self._make_room()
        count, bucket = len(ids), bucket_of(len(ids))
        self._store.set_rows(ids, self._table, bucket)
        return self._graphs.run(bucket, lambda: self._forward(bucket))[:count]

    def _forward(self, bucket: int) -> torch.Tensor:
        """On fixed addresses alone. The casts of autocast must be in the graph, not kept from before the last update."""
        model, store = self._policy.model, self._store.for_rows(bucket)
        kind, dtype = self._device.type, self._policy.placement.autocast_dtype
        with torch.autocast(kind, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            ids, positions = store.ids_S[:bucket], store.positions_S[:bucket]
            return model(input_ids=ids[None], position_ids=positions[None], use_cache=False, kv_store=store).logits[0]

    def _make_room(self) -> None:
        rows = bucket_of(max(1, len(self._table.rows)))
        width = max(map(len, self._table.rows), default=0)
        if self._store.make_room(self._table.num_pages, rows, width):
            self._graphs.forget()


class _PageStore:
    """The pages of every layer and what a step reads, all at addresses that stay. A `KVStore`."""

    def __init__(self, device: torch.device, longest: int) -> None:
        self._device, self._width = device, -(-longest // PAGE)
        self._num_pages = self._bucket = 0
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self.places = torch.empty(0, dtype=torch.long, device=device)
        self._make_rows(8)

    def make_room(self, num_pages: int, rows: int, width: int) -> bool:
        """Whether something had to move for it."""
        few = rows > len(self.ids_S) or width > self._width
        moved = num_pages > self._num_pages or few
        if num_pages > self._num_pages:
            for tensors in (self._keys, self._values):
                for layer, old in enumerate(tensors):
                    tensors[layer] = old.new_zeros(num_pages, *old.shape[1:])
                    tensors[layer][: len(old)] = old
            self._num_pages = num_pages
        if few:
            self._width = max(width, self._width)
            self._make_rows(max(rows, len(self.ids_S)))
        return moved

    def _make_rows(self, rows: int) -> None:
        self.ids_S, self.positions_S = torch.zeros(2, rows, dtype=torch.long, device=self._device)
        self._used_S = torch.ones(rows, dtype=torch.int32, device=self._device)
        self._table_SW = torch.zeros(rows, self._width, dtype=torch.int32, device=self._device)
        self._cu_S = torch.arange(rows + 1, dtype=torch.int32, device=self._device)

    def set_rows(self, ids: Sequence[int], table: PageTable, bucket: int) -> None:
        """The step to come, in copies that wait for nobody. What only fills the bucket writes to page 0, and reads there."""
        fill = bucket - len(ids)
        positions = [length - 1 for length in table.lengths] + [0] * fill
        width = max(map(len, table.rows))
        pages = [row + [0] * (width - len(row)) for row in table.rows] + [[0] * width] * fill
        for target, values in (
            (self.ids_S[:bucket], [*ids, *[0] * fill]),
            (self.positions_S[:bucket], positions),
            (self._used_S[:bucket], [position + 1 for position in positions]),
            (self._table_SW[:bucket, :width], pages),
        ):
            target.copy_(uploaded(values, self._device, target.dtype))

    def for_rows(self, bucket: int) -> _PageStore:
        self._bucket = bucket
        return self

    def copy(self, copy: Copy) -> None:
        for tensor in (*self._keys, *self._values):
            tensor[copy.target] = tensor[copy.source]

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """The prompts' keys and values, [1, Hkv, N, D], at `places`."""
        if layer == len(self._keys):
            for tensors, new in ((self._keys, key), (self._values, value)):
                tensors.append(new.new_zeros(self._num_pages, PAGE, new.shape[1], new.shape[3]))
        self._write(layer, self.places, key, value)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Shapes: query [1, Hq, R, D], key and value [1, Hkv, R, D] → [1, Hq, R, D]."""
        bucket = self._bucket
        positions = self.positions_S[:bucket]
        pages = self._table_SW[:bucket].gather(1, (positions // PAGE)[:, None])[:, 0]
        self._write(layer, pages.long() * PAGE + positions % PAGE, key, value)
        out = paged_attention(
            query[0].transpose(0, 1), self._keys[layer], self._values[layer], self._cu_S[: bucket + 1],
            self._used_S[:bucket], self._table_SW[:bucket], options.scale, options.window.size if options.window else None,
        )  # fmt: skip
        return out.transpose(0, 1)[None]

    def _write(self, layer: int, places: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        for tensor, new in ((self._keys[layer], key), (self._values[layer], value)):
            tensor.flatten(0, 1).index_copy_(0, places, new[0].transpose(0, 1).to(tensor.dtype))
