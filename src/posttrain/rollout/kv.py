"""Keys and values of running rows: a prompt's once, shared by its completions; each row's own tokens beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from posttrain.models.attention import AttendOptions, merge

_GROWTH = 64


@dataclass
class PromptKV:
    """K and V of one prompt, per layer: [Hkv, P, D]."""

    length: int
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


class RowCache:
    """The K/V store that a model's attention layers read and write while the engine decodes.

    Rows 0..R-1 are alive; a finished row is overwritten by the last one, so every tensor stays dense.
    """

    def __init__(self) -> None:
        self.prompt_of: list[PromptKV] = []
        self.lengths: list[int] = []
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._mask = torch.empty(0, 0)
        self._prefilling: list[tuple[PromptKV, int, int]] = []
        self._groups: list[tuple[PromptKV, torch.Tensor]] = []
        self._order: torch.Tensor | None = None

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
        by_prompt: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.prompt_of):
            by_prompt.setdefault(id(prompt), []).append(row)
        self._groups = [
            (self.prompt_of[members[0]], torch.tensor(members, device=device)) for members in by_prompt.values()
        ]

    def positions(self) -> list[int]:
        """Absolute position of each row's newest token."""
        return [prompt.length + length - 1 for prompt, length in zip(self.prompt_of, self.lengths, strict=True)]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Shapes: query [1, Hq, R, D], key and value [1, Hkv, R, D] → [1, Hq, R, D]."""
        num_kv, num_rows, width = key.shape[1:]
        self._write(layer, key, value)
        # The query heads of one kv head act as so many query positions: no head is repeated.
        query_R = query[0].transpose(0, 1).reshape(num_rows, num_kv, -1, width)
        longest = max(self.lengths)
        own_k, own_v = self._keys[layer][:num_rows, :, :longest], self._values[layer][:num_rows, :, :longest]
        window = options.window if options.window is not None and max(self.positions()) >= options.window else None
        out_R, lse_R = _attend(query_R, own_k, own_v, self._own_mask(num_rows, longest, window, query.dtype), options)
        for prompt, members in self._groups:
            part = query_R[members].transpose(0, 1).reshape(1, num_kv, -1, width)
            mask = self._prompt_mask(prompt, members, part.shape[2] // len(members), window, query.dtype)
            out, lse = _attend(part, prompt.keys[layer][None], prompt.values[layer][None], mask, options)
            out = out.reshape(num_kv, len(members), -1, out.shape[-1]).transpose(0, 1)
            lse = lse.reshape(num_kv, len(members), -1).transpose(0, 1)
            out_R[members], lse_R[members] = merge(out_R[members], lse_R[members], out, lse)
        return out_R.reshape(num_rows, -1, out_R.shape[-1]).transpose(0, 1)[None]

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        if layer == len(self._keys):
            shape = (self._mask.shape[0], key.shape[1], self._mask.shape[1])
            self._keys.append(key.new_zeros(*shape, key.shape[-1]))
            self._values.append(value.new_zeros(*shape, value.shape[-1]))
        rows, columns = self._where
        self._keys[layer][rows, :, columns] = key[0].transpose(0, 1)
        self._values[layer][rows, :, columns] = value[0].transpose(0, 1)

    def _own_mask(self, num_rows: int, longest: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        mask = self._mask[:num_rows, None, None, :longest]
        if window is not None:
            age = (
                torch.tensor(self.lengths, device=mask.device)[:, None] - 1 - torch.arange(longest, device=mask.device)
            )
            mask = mask.masked_fill(age[:, None, None] >= window, -torch.inf)
        return mask.to(dtype)

    def _prompt_mask(
        self, prompt: PromptKV, members: torch.Tensor, per_row: int, window: int | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """None unless a window hides part of the prompt. Shape: [1, 1, rows × queries, P]."""
        if window is None:
            return None
        positions = torch.tensor(self.positions(), device=members.device)[members]
        age = positions[:, None] - torch.arange(prompt.length, device=members.device)
        mask = torch.zeros(age.shape, dtype=dtype, device=members.device).masked_fill(age >= window, -torch.inf)
        return mask.repeat_interleave(per_row, 0)[None, None]

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
