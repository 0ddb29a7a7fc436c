"""Keys and values of running rows: a prompt's once, shared by its completions; each row's own tokens beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from posttrain.models.attention import AttendOptions
from posttrain.models.tree_attention import Window

_GROWTH = 64


@dataclass
class PromptKV:
    """K and V of one prompt, per layer: [Hkv, P, D]."""

    length: int
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Step:
    """One decode step: rows grouped by prompt (`order`, and back), the longest row, everyone's position."""

    groups: list[tuple[PromptKV, int]]
    order: torch.Tensor | None
    inverse: torch.Tensor | None
    longest: int
    positions: list[int]


class RowCache:
    """The K/V store that a model's attention layers read and write while the engine decodes.

    Rows 0..R-1 are alive; a finished row is overwritten by the last one, so every tensor stays dense.
    """

    def __init__(self, device: torch.device) -> None:
        self.prompt_of: list[PromptKV] = []
        self.lengths: list[int] = []
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._mask = torch.empty(0, 0, device=device)
        self._prefilling: list[tuple[PromptKV, int, int]] = []
        self._step = _Step([], None, None, 0, [])

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    # --- prefill -----------------------------------------------------------------------------------------------

    def expect(self, prompts: Sequence[tuple[PromptKV, int, int]]) -> None:
        """Announce which packed range [start, stop) belongs to which prompt in the coming prefill."""
        self._prefilling = list(prompts)

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for prompt, start, stop in self._prefilling:
            # Copies: a view would keep the whole packed prefill alive.
            prompt.keys.append(key[0, :, start:stop].clone(memory_format=torch.contiguous_format))
            prompt.values.append(value[0, :, start:stop].clone(memory_format=torch.contiguous_format))

    # --- rows --------------------------------------------------------------------------------------------------

    def add_row(self, prompt: PromptKV) -> None:
        self.prompt_of.append(prompt)
        self.lengths.append(0)
        if len(self.lengths) > self._mask.shape[0]:
            self._resize(rows=max(8, 2 * self._mask.shape[0], len(self.lengths)), columns=self._mask.shape[1])
        self._mask[len(self.lengths) - 1] = -torch.inf

    def drop_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.num_rows - 1
        if row != last:
            length = self.lengths[last]
            for tensor in (*self._keys, *self._values):
                tensor[row, :, :length] = tensor[last, :, :length]
            self._mask[row] = self._mask[last]
            self.lengths[row], self.prompt_of[row] = length, self.prompt_of[last]
        self.lengths.pop()
        self.prompt_of.pop()

    def begin_step(self) -> None:
        """Every row is about to write one token: make room, open its mask, group rows by prompt."""
        needed = max(self.lengths) + 1
        if needed > self._mask.shape[1]:
            self._resize(rows=self._mask.shape[0], columns=needed + _GROWTH)
        device = self._mask.device
        rows, columns = torch.arange(self.num_rows, device=device), torch.tensor(self.lengths, device=device)
        self._mask[rows, columns] = 0.0
        self._where = (rows, columns)
        self.lengths = [length + 1 for length in self.lengths]
        self._step = self._plan()

    def _plan(self) -> _Step:
        """What all layers of this step share."""
        by_prompt: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.prompt_of):
            by_prompt.setdefault(id(prompt), []).append(row)
        order = [row for members in by_prompt.values() for row in members]
        inverse = [0] * len(order)
        for place, row in enumerate(order):
            inverse[row] = place
        sizes = [(self.prompt_of[members[0]], len(members)) for members in by_prompt.values()]
        device, in_order = self._mask.device, order == sorted(order)
        return _Step(
            groups=sizes,
            order=None if in_order else torch.tensor(order, device=device),
            inverse=None if in_order else torch.tensor(inverse, device=device),
            longest=max(self.lengths),
            positions=self.positions(),
        )

    def positions(self) -> list[int]:
        """Absolute position of each row's newest token."""
        return [prompt.length + length - 1 for prompt, length in zip(self.prompt_of, self.lengths, strict=True)]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Shapes: query [1, Hq, R, D], key and value [1, Hkv, R, D] → [1, Hq, R, D]."""
        num_kv, num_rows, width = key.shape[1:]
        self._write(layer, key, value)
        step = self._step
        window = options.window if options.window is not None and max(step.positions) >= options.window.size else None
        # The query heads of one kv head act as so many query positions: no head is repeated.
        query_HRG = query[0].view(num_kv, -1, num_rows, width).transpose(1, 2)
        own_k, own_v = (cache[layer][:num_rows, :, : step.longest] for cache in (self._keys, self._values))
        mask = self._own_mask(num_rows, step.longest, window, query.dtype)
        out_R, lse_R = _attend(query_HRG.transpose(0, 1), own_k, own_v, mask, options)
        out_P, lse_P = self._attend_prompts(layer, query_HRG, window, options)
        # As `merge` of models/tree_attention.py, whose log-sum-exp nobody needs here.
        share = torch.sigmoid(lse_R - lse_P.transpose(0, 1)).unsqueeze(-1).to(out_R.dtype)
        out_R = torch.lerp(out_P.transpose(0, 1), out_R, share)
        return out_R.reshape(num_rows, -1, out_R.shape[-1]).transpose(0, 1)[None]

    def _attend_prompts(
        self, layer: int, query_HRG: torch.Tensor, window: Window | None, options: AttendOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row to its prompt; rows of one prompt together. Shapes: [Hkv, R, G, D] → the same, and [Hkv, R, G]."""
        step = self._step
        if step.order is not None:
            query_HRG = query_HRG[:, step.order]
        num_kv, num_rows, group, width = query_HRG.shape
        flat = query_HRG.reshape(1, num_kv, num_rows * group, width)
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        first = 0
        for prompt, count in step.groups:
            rows = slice(first * group, (first + count) * group)
            mask = self._prompt_mask(prompt, first, count, group, window, flat.dtype)
            parts.append(_attend(flat[:, :, rows], prompt.keys[layer][None], prompt.values[layer][None], mask, options))
            first += count
        out = torch.cat([part for part, _ in parts], 2).view(num_kv, num_rows, group, width)
        lse = torch.cat([part for _, part in parts], 2).view(num_kv, num_rows, group)
        return (out, lse) if step.inverse is None else (out[:, step.inverse], lse[:, step.inverse])

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer == len(self._keys):
            shape = (self._mask.shape[0], key.shape[1], self._mask.shape[1])
            self._keys.append(key.new_zeros(*shape, key.shape[-1]))
            self._values.append(value.new_zeros(*shape, value.shape[-1]))
        rows, columns = self._where
        self._keys[layer][rows, :, columns] = key[0].transpose(0, 1)
        self._values[layer][rows, :, columns] = value[0].transpose(0, 1)

    def _own_mask(self, num_rows: int, longest: int, window: Window | None, dtype: torch.dtype) -> torch.Tensor:
        mask = self._mask[:num_rows, None, None, :longest]
        if window is not None:
            age = (
                torch.tensor(self.lengths, device=mask.device)[:, None] - 1 - torch.arange(longest, device=mask.device)
            )
            reach = window.reach(torch.tensor(self._step.positions, device=mask.device))
            mask = mask.masked_fill(age[:, None, None] >= reach[:, None, None, None], -torch.inf)
        return mask.to(dtype)

    def _prompt_mask(
        self, prompt: PromptKV, first: int, count: int, group: int, window: Window | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """None unless a window hides part of the prompt. Shape: [1, 1, rows × queries, P]."""
        if window is None:
            return None
        order = range(self.num_rows) if self._step.order is None else self._step.order.tolist()
        positions = torch.tensor([self._step.positions[order[place]] for place in range(first, first + count)])
        hidden = positions[:, None] - torch.arange(prompt.length) >= window.reach(positions)[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf).to(self._mask.device)
        return mask.repeat_interleave(group, 0)[None, None]

    def _resize(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self._mask.shape
        mask = torch.full((rows, columns), -torch.inf, device=self._mask.device)
        mask[:old_rows, :old_columns] = self._mask
        self._mask = mask
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                new[:old_rows, :, :old_columns] = old
                tensors[layer] = new


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: AttendOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with its log-sum-exp. Shapes: [B, H, Q, D], [B, H, K, D] → [B, H, Q, D], [B, H, Q]."""
    if query.device.type == "cpu" and options.softcap is None and (mask is None or options.window is None):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=mask, scale=options.scale
        )
    scores = (query @ key.transpose(-1, -2)).float() * options.scale
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    # A row may see nothing of a prompt that a window hides: its share is zero, not NaN.
    weights = torch.exp(scores - torch.where(lse.isinf(), 0.0, lse).unsqueeze(-1))
    return weights.to(value.dtype) @ value, lse
