"""Keys and values of running rows: a prompt's once, shared by its completions; each row's own tokens beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

from posttrain.models.attention import AttendOptions
from posttrain.models.device import uploaded
from posttrain.models.native import PromptsInMemory, RowsInMemory
from posttrain.models.tree_attention import Window
from posttrain.rollout.prompts import PromptKV, PromptPool, in_memory

_GROWTH = 64
_WIDEST_STEP = 128
_LEAST_SHARED = 2048
"""Rows times tokens of a prompt from which products of matrices, which read its keys once for all rows, are faster than a row at a time: a count, with no clock."""
_CALL_FLOPS = 4e5
"""What a CPU could compute of attention in the time that one call of its kernel costs beside: taken as 20 µs at 20 GFLOP/s, an estimate."""


@dataclass(frozen=True)
class Padding:
    """When prompts and groups are filled up, so that fewer calls attend to them; one call costs as much as `call_pairs` of a row and a key."""

    call_pairs: int

    @classmethod
    def of(cls, query_channels: int) -> Padding:
        """For layers with so many channels of queries."""
        return cls(max(1, int(_CALL_FLOPS / (4 * query_channels))))

    def width(self, length: int) -> int:
        """Of the pool that a prompt lies in: the next multiple of what a call costs, halved, so that few widths occur."""
        step = 1 << (min(_WIDEST_STEP, max(1, self.call_pairs // 2)).bit_length() - 1)
        return -(-length // step) * step

    def joins(self, run: Sequence[PromptKV], prompt: PromptKV) -> bool:
        """Whether the prompt after a run is better attended to with it, all filled up to the longest and to the most rows."""
        together = [*run, prompt]
        longest, most = max(one.length for one in together), max(one.num_rows for one in together)
        filler = len(together) * most * longest - sum(one.num_rows * one.length for one in together)
        return filler <= self.call_pairs * len(run)


@dataclass(frozen=True)
class _SideBySide:
    """Prompts side by side in their pool, attended to in one call; fewer rows than `rows_each` are filled up."""

    pool: PromptPool
    first: int
    lengths: tuple[int, ...]
    rows_each: int

    @property
    def num_prompts(self) -> int:
        return len(self.lengths)

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.rows_each

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def each(self) -> list[_SideBySide]:
        """Prompt by prompt."""
        return [_SideBySide(self.pool, self.first + n, (one,), self.rows_each) for n, one in enumerate(self.lengths)]

    @cached_property
    def behind_end(self) -> torch.Tensor | None:
        """True at keys that are no prompt's; None where there are none. Shape: [P, K]."""
        if min(self.lengths) == self.longest:
            return None
        return torch.arange(self.longest) >= torch.tensor(self.lengths)[:, None]


@dataclass(frozen=True)
class _Plan:
    """Rows in the order in which their prompts lie, filled up (`rows`, `order`), and back, until one comes or goes."""

    runs: list[_SideBySide]
    rows: list[int]
    order: torch.Tensor | None
    inverse: torch.Tensor | None


class _Step:
    """What rows write at once. Row 0, of 5 tokens, writes two more, row 1, of 3, one: before [5, 3], counts [2, 1], width 2; the
    three tokens lie end to end. Queries are attended to as [rows, width], a row's first token standing in where it has fewer.
    """

    def __init__(self, before: Sequence[int], counts: Sequence[int], device: torch.device) -> None:
        self.before, self.counts = list(before), list(counts)
        self.width = max(counts, default=1)
        self.rows_N = [row for row, count in enumerate(counts) for _ in range(count)]
        self.columns_N = [first + n for first, count in zip(before, counts, strict=True) for n in range(count)]
        self.last = 0
        """The largest position that is written."""
        self.where = uploaded(self.rows_N, device), uploaded(self.columns_N, device)
        if self.width > 1:
            firsts = accumulate(counts, initial=0)
            slots = [
                first + (n if n < count else 0)
                for first, count in zip(firsts, counts, strict=False)
                for n in range(self.width)
            ]
            places = [row * self.width + n for row, count in enumerate(counts) for n in range(count)]
            self._slots, self._places = uploaded(slots, device), uploaded(places, device)

    def by_row(self, query: torch.Tensor, num_kv: int) -> torch.Tensor:
        """The query heads of one kv head act as so many query positions: no head is repeated. Shapes: [Hq, N, D] → [R, Hkv, width × G, D]."""
        if self.width == 1:
            return query.view(num_kv, -1, *query.shape[1:]).permute(2, 0, 1, 3)
        padded = query.transpose(0, 1)[self._slots]
        padded = padded.view(len(self.before), self.width, num_kv, -1, query.shape[-1])
        return padded.transpose(1, 2).flatten(2, 3)

    def by_token(self, out_R: torch.Tensor) -> torch.Tensor:
        """The way back. Shapes: [R, Hkv, width × G, D] → [Hq, N, D]."""
        if self.width == 1:
            return out_R.reshape(len(out_R), -1, out_R.shape[-1]).transpose(0, 1)
        out = out_R.unflatten(2, (self.width, -1)).transpose(1, 2)
        out = out.reshape(len(out_R) * self.width, -1, out_R.shape[-1])
        return out[self._places].transpose(0, 1)


class RowCache:
    """The K/V store that a model's attention layers read and write while the engine decodes.

    Rows 0..R-1 are alive; a finished row is overwritten by the last one, so every tensor stays dense. `padding`: prompts of near
    length are attended to together; without it those of one length.
    """

    def __init__(self, device: torch.device, padding: Padding | None = None) -> None:
        self.prompt_of: list[PromptKV] = []
        self.lengths: list[int] = []
        self._padding = padding
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._mask = torch.empty(0, 0, device=device)
        self._prefilling: list[tuple[PromptKV, int, int]] = []
        self._pools: dict[int, PromptPool] = {}
        self._plan: _Plan | None = None
        self._prompts_at: PromptsInMemory | None = None
        self._longest, self._step = 0, _Step([], [], device)
        self._hidden: dict[Window | None, torch.Tensor] = {}

    @property
    def num_rows(self) -> int:
        return len(self.lengths)

    # --- prefill -----------------------------------------------------------------------------------------------

    def expect(self, spans: Sequence[tuple[int, int]]) -> list[PromptKV]:
        """Announce the packed ranges [start, stop) of the coming prefill, each of a prompt."""
        lengths = [stop - start for start, stop in spans]
        widths = [self._padding.width(length) if self._padding else length for length in lengths]
        self._pools = {width: pool for width, pool in self._pools.items() if pool.is_held}
        places: dict[int, Iterator[PromptKV]] = {}
        for width in dict.fromkeys(widths):
            pool = self._pools.setdefault(width, PromptPool(width))
            places[width] = iter(pool.reserve([n for n, own in zip(lengths, widths, strict=True) if own == width]))
        kept = [next(places[width]) for width in widths]
        self._prompts_at = None
        self._prefilling = [(prompt, *span) for prompt, span in zip(kept, spans, strict=True)]
        return kept

    def take(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> PromptKV:
        """A prompt that was encoded elsewhere. Shapes: per layer [Hkv, P, D]."""
        [prompt] = self.expect([(0, keys[0].shape[1])])
        for layer, (key, value) in enumerate(zip(keys, values, strict=True)):
            self.keep(layer, key[None], value[None])
        return prompt

    def keep(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for prompt, start, stop in self._prefilling:
            prompt.pool.keep(layer, prompt, key[0, :, start:stop], value[0, :, start:stop])

    # --- rows --------------------------------------------------------------------------------------------------

    def add_row(self, prompt: PromptKV) -> None:
        prompt.pool.enter(prompt)
        self.prompt_of.append(prompt)
        self.lengths.append(0)
        self._plan = self._prompts_at = None
        if len(self.lengths) > self._mask.shape[0]:
            self._resize(rows=max(8, 2 * self._mask.shape[0], len(self.lengths)), columns=self._mask.shape[1])
        self._mask[len(self.lengths) - 1] = -torch.inf

    def drop_row(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        last = self.num_rows - 1
        self.prompt_of[row].pool.leave(self.prompt_of[row])
        self._plan = self._prompts_at = None
        if row != last:
            length = self.lengths[last]
            for tensor in (*self._keys, *self._values):
                tensor[row, :, :length] = tensor[last, :, :length]
            self._mask[row] = self._mask[last]
            self.lengths[row], self.prompt_of[row] = length, self.prompt_of[last]
        self.lengths.pop()
        self.prompt_of.pop()

    def begin_step(self, counts: Sequence[int]) -> None:
        """Every row is about to write so many tokens: make room. Where it is one of each it stays, else `keep_step` says what does."""
        self._step = step = _Step(self.lengths, counts, self._mask.device)
        self._longest = max(self.lengths) + step.width
        if self._longest > self._mask.shape[1]:
            self._resize(rows=self._mask.shape[0], columns=self._longest + _GROWTH)
        step.last = max(self.positions())
        self._hidden.clear()
        if step.width == 1:
            self.keep_step(counts)

    def keep_step(self, counts: Sequence[int]) -> None:
        """Of what each row wrote its first tokens stay."""
        step = self._step
        kept = step if list(counts) == step.counts else _Step(step.before, counts, self._mask.device)
        self._mask[kept.where] = 0.0
        self.lengths = [first + count for first, count in zip(step.before, counts, strict=True)]

    def _planned(self) -> _Plan:
        """What all layers share, until a row comes or goes."""
        if self._plan is not None:
            return self._plan
        rows_of: dict[int, list[int]] = {}
        for row, prompt in enumerate(self.prompt_of):
            rows_of.setdefault(id(prompt), []).append(row)
        runs, order, inverse = list[_SideBySide](), list[int](), [0] * self.num_rows
        for pool in dict.fromkeys(prompt.pool for prompt in self.prompt_of):
            for alike in self._side_by_side(pool.live()):
                most = max(prompt.num_rows for prompt in alike)
                runs.append(_SideBySide(pool, alike[0].place, tuple(prompt.length for prompt in alike), most))
                for rows in (rows_of[id(prompt)] for prompt in alike):
                    for number, row in enumerate(rows):
                        inverse[row] = len(order) + number
                    order += rows + [rows[0]] * (most - len(rows))
        device, in_order = self._mask.device, order == list(range(self.num_rows))
        self._plan = _Plan(
            runs,
            order,
            order=None if in_order else uploaded(order, device),
            inverse=None if in_order else uploaded(inverse, device),
        )
        return self._plan

    def _side_by_side(self, live: Sequence[PromptKV]) -> Iterator[list[PromptKV]]:
        """Neighbours that one call attends to."""
        run: list[PromptKV] = []
        for prompt in live:
            alike = run and (run[0].num_rows, run[0].length) == (prompt.num_rows, prompt.length)
            if run and not (self._padding.joins(run, prompt) if self._padding else alike):
                yield run
                run = []
            run.append(prompt)
        if run:
            yield run

    def positions(self) -> list[int]:
        """Absolute position of each token that is being written."""
        step = self._step
        return [self.prompt_of[row].length + column for row, column in zip(step.rows_N, step.columns_N, strict=True)]

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttendOptions
    ) -> torch.Tensor:
        """Of all tokens that are being written. Shapes: query [1, Hq, N, D], key and value [1, Hkv, N, D] → [1, Hq, N, D]."""
        num_kv, num_rows, step = key.shape[1], self.num_rows, self._step
        self._write(layer, key, value)
        window = options.window if options.window is not None and step.last >= options.window.size else None
        query_R = step.by_row(query[0], num_kv)
        own_k, own_v = (cache[layer][:num_rows, :, : self._longest] for cache in (self._keys, self._values))
        mask = self._own_mask(num_rows, query_R.shape[2] // step.width, window, query.dtype)
        out_R, lse_R = attend_masked(query_R, own_k, own_v, mask, options)
        out_P, lse_P = self._attend_prompts(layer, query_R, window, options)
        # As `merge` of models/tree_attention.py, whose log-sum-exp nobody needs here.
        share = torch.sigmoid(lse_R - lse_P).unsqueeze(-1).to(out_R.dtype)
        return step.by_token(torch.lerp(out_P, out_R, share))[None]

    def _attend_prompts(
        self, layer: int, query_R: torch.Tensor, window: Window | None, options: AttendOptions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row to its prompt, a run in one call. Shapes: [R, Hkv, G, D] → the same, and [R, Hkv, G]."""
        plan = self._planned()
        if plan.order is not None:
            query_R = query_R[plan.order]
        _, num_kv, group, width = query_R.shape
        runs = plan.runs
        if not (self._padding or _in_flash(query_R, window, options)):
            # What is written out in products of matrices rounds otherwise when several are stacked.
            runs = [one for run in runs for one in run.each()]
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        first = 0
        for run in runs:
            shape = (run.num_prompts, run.rows_each, num_kv, group)
            query = query_R[first : first + run.num_rows].view(*shape, width).transpose(1, 2).flatten(2, 3)
            places, columns = slice(run.first, run.first + run.num_prompts), slice(0, run.longest)
            key, value = (kv[layer][places, :, columns] for kv in (run.pool.keys, run.pool.values))
            mask = self._prompt_mask(run, first, group, window, query.dtype)
            out, lse = attend_masked(query, key, value, mask, options)
            by_row = (run.num_prompts, num_kv, run.rows_each, group)
            parts.append(
                (
                    out.view(*by_row, -1).transpose(1, 2).flatten(0, 1),
                    lse.view(by_row).transpose(1, 2).flatten(0, 1),
                )
            )
            first += run.num_rows
        out, lse = parts[0] if len(parts) == 1 else (torch.cat(found) for found in zip(*parts, strict=True))
        return (out, lse) if plan.inverse is None else (out[plan.inverse], lse[plan.inverse])

    def _write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self._make(layer, key, value)
        rows, columns = self._step.where
        self._keys[layer][rows, :, columns] = key[0].transpose(0, 1)
        self._values[layer][rows, :, columns] = value[0].transpose(0, 1)

    def _make(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Room for a layer's own tokens, if there is none yet. Shapes: [_, Hkv, _, D]."""
        if layer == len(self._keys):
            shape = (self._mask.shape[0], key.shape[1], self._mask.shape[1])
            self._keys.append(key.new_zeros(*shape, key.shape[-1]))
            self._values.append(value.new_zeros(*shape, value.shape[-1]))

    @property
    def shares_much(self) -> bool:
        """Whether rows have a prompt in common that is long for so many."""
        return any(one.num_rows > 1 and one.num_rows * one.length >= _LEAST_SHARED for one in self.prompt_of)

    def in_memory(self) -> RowsInMemory:
        """For a step of one token a row."""
        if self._prompts_at is None:
            self._prompts_at = in_memory(self.prompt_of)
        pool = self.prompt_of[0].pool
        for layer, (key, value) in enumerate(zip(pool.keys, pool.values, strict=True)):
            self._make(layer, key, value)
        own_R, own = np.array(self._step.before, np.int64), list(zip(self._keys, self._values, strict=True))
        return RowsInMemory(own_R, own, self._prompts_at, self._step.last + 1)

    def _own_mask(self, num_rows: int, group: int, window: Window | None, dtype: torch.dtype) -> torch.Tensor:
        """Shape: [R, 1, 1 or width × group, K]."""
        if self._step.width == 1 and window is None:
            return self._mask[:num_rows, None, None, : self._longest].to(dtype)
        if window not in self._hidden:
            device = self._mask.device
            newest_RS = self._newest_RS(self._step.before, device)
            age_RSK = newest_RS[..., None] - torch.arange(self._longest, device=device)
            hidden = age_RSK < 0
            if window is not None:
                hidden |= age_RSK >= window.reach(self._positions_RS(device))[..., None]
            hidden = hidden.repeat_interleave(group, 1) if self._step.width > 1 else hidden
            self._hidden[window] = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)
        return self._hidden[window][:, None].to(dtype)

    def _newest_RS(self, first: Sequence[int], device: torch.device) -> torch.Tensor:
        return uploaded(first, device)[:, None] + torch.arange(self._step.width, device=device)

    def _positions_RS(self, device: torch.device) -> torch.Tensor:
        """Of each row's tokens, as if all wrote as many."""
        before = zip(self.prompt_of, self._step.before, strict=True)
        return self._newest_RS([prompt.length + own for prompt, own in before], device)

    def _prompt_mask(
        self, run: _SideBySide, first: int, group: int, window: Window | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """None where every row sees all that lies there. Shape: [P, 1, 1 or rows × queries, K]."""
        if window is None and run.behind_end is None:
            return None
        hidden = torch.zeros(run.num_prompts, 1, run.longest, dtype=torch.bool)
        if run.behind_end is not None:
            hidden = hidden | run.behind_end[:, None]
        if window is not None:
            rows = self._planned().rows[first : first + run.num_rows]
            positions = self._positions_RS(torch.device("cpu"))[rows].flatten()  # masks of prompts are made on the host
            age = positions[:, None] - torch.arange(run.longest)
            too_old = (age >= window.reach(positions)[:, None]).repeat_interleave(group // self._step.width, 0)
            hidden = hidden | too_old.unflatten(0, (run.num_prompts, -1))
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        return mask.to(self._mask.device, non_blocking=True)[:, None]

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


def _in_flash(query: torch.Tensor, window: Window | None, options: AttendOptions) -> bool:
    return query.device.type == "cpu" and options.softcap is None and window is None


def attend_masked(
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
