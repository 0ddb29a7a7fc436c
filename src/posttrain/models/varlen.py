"""Attention of many sequences in one call of a kernel, and which kernel that is.

Sequences lie end to end; cumulative lengths say where each begins. A kernel returns the log-sum-exp of each query beside its
output, and its backward takes both back, so that calls over disjoint keys can be merged and differentiated. Knows no trees.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_LSE_ALIGNMENT = 32
"""The memory-efficient kernel pads the log-sum-exp of a sequence to a multiple of so many queries."""
_CAUSAL_FROM_BOTTOM_RIGHT = 2
"""`custom_mask_type` of the memory-efficient kernel."""


@dataclass(frozen=True)
class Sequences:
    """Where sequences begin and end among the queries and the keys of one call.

    `causal`: the last query of a sequence sees its last key, and each earlier query one key less. `window`: a query sees so
    many keys at most. Two sequences of 2 and 3 queries on 2 and 4 keys: lengths_q (2, 3), lengths_k (2, 4).
    """

    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    causal: bool
    window: int | None
    device: torch.device

    @cached_property
    def cu_q(self) -> Tensor:
        return self._cumulative(self.lengths_q)

    @cached_property
    def cu_k(self) -> Tensor:
        return self.cu_q if self.lengths_k == self.lengths_q else self._cumulative(self.lengths_k)

    @cached_property
    def max_q(self) -> int:
        return max(self.lengths_q)

    @cached_property
    def max_k(self) -> int:
        return max(self.lengths_k)

    @cached_property
    def place_T(self) -> tuple[Tensor, Tensor]:
        """Of each query: the number of its sequence, and its place there."""
        lengths = torch.tensor(self.lengths_q)
        number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        offset = torch.arange(len(number)) - torch.tensor((0, *accumulate(self.lengths_q)))[number]
        return number.to(self.device), offset.to(self.device)

    def _cumulative(self, lengths: Sequence[int]) -> Tensor:
        return torch.tensor((0, *accumulate(lengths)), dtype=torch.int32, device=self.device)


class Kernel(NamedTuple):
    """Shapes: query, out and their gradients [T, Hq, D]; key, value and theirs [K, Hkv, D]; lse [Hq, T]."""

    forward: Callable[[Tensor, Tensor, Tensor, Sequences, float], tuple[Tensor, Tensor]]
    """Of (query, key, value, sequences, scale): output and log-sum-exp."""
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequences, float], tuple[Tensor, Tensor, Tensor]
    ]
    """Of (grad_out, query, key, value, out, lse, sequences, scale): gradients of query, key and value."""


def kernel_for(query: Tensor) -> Kernel:
    """The flash kernel where it takes these queries, else the memory-efficient one (float32 on a GPU, wide heads, old GPUs).

    torch's own flash attention, FA3 and FA4 where they are installed, and the kernel that is registered here for CPUs all stand
    behind the same operator.
    """
    if query.device.type == "cpu":
        _register_on_cpu()
        return FLASH
    fits = query.dtype in _FLASH_DTYPES and query.shape[-1] <= _flash_behind(query.device).width
    if fits and query.device.type == "cuda" and torch.version.hip is None:
        fits = torch.cuda.get_device_capability(query.device) >= (8, 0)
    return FLASH if fits else EFFICIENT


# --- which flash attention -----------------------------------------------------------------------------------------


class FlashPackage(NamedTuple):
    """A flash attention that takes the operator over: cards (major capability) that it is for, widest heads, cards on which it reads pages."""

    module: str
    majors: tuple[int, ...]
    width: int
    paged: tuple[int, ...]


FLASH_PACKAGES: Mapping[str, FlashPackage] = {
    "FA3": FlashPackage("flash_attn_interface", (9,), 256, (9,)),
    "FA4": FlashPackage("flash_attn.cute", (10,), 128, (10,)),
}
"""Names are those of `torch.nn.attention.activate_flash_attention_impl`. Source: torch/nn/attention/_fa3.py, _fa4.py."""
_BUILT_IN = FlashPackage("torch", tuple(range(8, 16)), 256, tuple(range(8, 16)))


def flash_package_for(major: int, is_installed: Callable[[str], bool]) -> str | None:
    """The package made for such a card, where it is there."""
    return next((n for n, p in FLASH_PACKAGES.items() if major in p.majors and is_installed(p.module)), None)


def active_flash() -> str | None:
    """The package that stands behind the operator now; None: torch's own."""
    from torch.nn.attention import current_flash_attention_impl

    return current_flash_attention_impl()


def _flash_behind(device: torch.device) -> FlashPackage:
    if device.type != "cuda" or torch.version.hip is not None:
        return _BUILT_IN
    _activate(torch.cuda.get_device_capability(device)[0])
    return FLASH_PACKAGES.get(active_flash() or "", _BUILT_IN)


@lru_cache(maxsize=8)
def _activate(major: int) -> None:
    """Once a process, before the first call; what the user activated stays."""
    from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls

    name = flash_package_for(major, _is_installed)
    if name not in list_flash_attention_impls() or active_flash() is not None:
        return
    try:
        activate_flash_attention_impl(name)
    except (ImportError, OSError, RuntimeError) as error:  # built for another torch, or only half of it is there
        why = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning("%s is installed and could not be activated (%s); torch's own flash attention is used", name, why)


def _is_installed(module: str) -> bool:
    """Without importing more than a package that has it inside."""
    parent = module.partition(".")[0]
    return find_spec(parent) is not None and find_spec(module) is not None


# --- flash ---------------------------------------------------------------------------------------------------------


def _flash_options(sequences: Sequences, scale: float) -> dict[str, Any]:
    left = -1 if sequences.window is None else sequences.window - 1
    return {"scale": scale, "window_size_left": left, "window_size_right": 0 if sequences.causal else -1}


def _is_plainly_causal(sequences: Sequences) -> bool:
    return sequences.causal and sequences.window is None


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k,
        0.0, _is_plainly_causal(sequences), False, **_flash_options(sequences, scale),
    )  # fmt: skip
    return out, lse


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, sequences: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Without dropout no random state is read, but the operator wants one.
    rng, unused = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        grad_out, query, key, value, out, lse.contiguous(), sequences.cu_q, sequences.cu_k, sequences.max_q,
        sequences.max_k, 0.0, _is_plainly_causal(sequences), rng, unused, **_flash_options(sequences, scale),
    )  # fmt: skip


FLASH = Kernel(_flash_forward, _flash_backward)


def reads_pages(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the flash kernel takes keys in pages there; operators of older torches have no `block_table`."""
    names = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
    if device.type != "cuda" or torch.version.hip is not None or not {"block_table", "seqused_k"} <= names:
        return False
    behind = _flash_behind(device)
    return (
        dtype in _FLASH_DTYPES and width <= behind.width and width % 8 == 0
        and torch.cuda.get_device_capability(device)[0] in behind.paged
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    used: Tensor,
    table: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """One query a sequence, to the first `used` tokens of its pages. It reads no number on the host, so that a graph can hold it.

    Shapes: query [S, Hq, D]; key, value [pages, page, Hkv, D]; cu_q [S + 1]; used [S]; table [S, W] → [S, Hq, D].
    Source: the paged call of torchtitan's experiments/rl. One split: with several, the numbers depend on the batch.
    """
    if query.device.type == "cpu":
        _register_on_cpu()
    size = table.shape[1] * key.shape[1]
    # The kernel of FlashAttention-2 wants cumulative lengths of the keys too; `used` goes before them. FA3 and FA4 refuse them.
    cu_k = None if active_flash() in FLASH_PACKAGES else cu_q * size
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, cu_q, cu_k, 1, size, 0.0, False, False, scale=scale,
        window_size_left=-1 if window is None else window - 1, window_size_right=-1 if window is None else 0,
        seqused_k=used, block_table=table, num_splits=1,
    )  # fmt: skip
    return out


# --- memory-efficient ----------------------------------------------------------------------------------------------


def _efficient_options(sequences: Sequences, scale: float) -> dict[str, Any]:
    return {"scale": scale, "window_size": sequences.window}


def _mask_type(sequences: Sequences) -> int:
    return _CAUSAL_FROM_BOTTOM_RIGHT if sequences.causal else 0


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """This kernel knows no grouped heads."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)


def _efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    out, padded, *_ = torch.ops.aten._efficient_attention_forward(
        query[None], _per_query_head(key, query)[None], _per_query_head(value, query)[None], None,
        sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k, 0.0, _mask_type(sequences), True,
        **_efficient_options(sequences, scale),
    )  # fmt: skip
    number, offset = sequences.place_T
    return out[0], padded[number, :, offset].transpose(0, 1)


def _efficient_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, sequences: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    number, offset = sequences.place_T
    width = -(-sequences.max_q // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    # Behind the end of a sequence the kernel writes, and expects, infinity: exp(score - inf) is no share at all.
    padded = lse.new_full((len(sequences.lengths_q), query.shape[1], width), torch.inf)
    padded[number, :, offset] = lse.transpose(0, 1)
    seed = torch.zeros((), dtype=torch.int64, device=query.device)
    grad_query, grad_key, grad_value, _ = torch.ops.aten._efficient_attention_backward(
        grad_out[None], query[None], _per_query_head(key, query)[None], _per_query_head(value, query)[None], None,
        out[None], sequences.cu_q, sequences.cu_k, sequences.max_q, sequences.max_k, padded, 0.0, seed, seed,
        _mask_type(sequences), False, **_efficient_options(sequences, scale),
    )  # fmt: skip
    heads = key.shape[1]
    return grad_query[0], grad_key[0].unflatten(1, (heads, -1)).sum(2), grad_value[0].unflatten(1, (heads, -1)).sum(2)


EFFICIENT = Kernel(_efficient_forward, _efficient_backward)


# --- the flash operator on a CPU -----------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _register_on_cpu() -> torch.library.Library:
    """Give the flash operator a CPU kernel, so that the code of a GPU runs, and is tested, on a CPU. Held by the cache."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", _forward_on_cpu, "CPU")
    library.impl("_flash_attention_backward", _backward_on_cpu, "CPU")
    return library


def _forward_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, dropout: float,
    causal: bool, debug: bool, *, scale: float | None = None, window_size_left: int | None = None,
    window_size_right: int | None = None, seqused_k: Tensor | None = None, block_table: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Sequence by sequence through torch's flash kernel for CPUs."""
    if block_table is not None and seqused_k is not None:
        key, value = (_out_of_pages(tensor, seqused_k, block_table) for tensor in (key, value))
        cu_k = torch.nn.functional.pad(seqused_k.cumsum(0), (1, 0))
    query, key, value = (_headed(tensor) for tensor in (query, key, value))
    outs, lses = list[Tensor](), list[Tensor]()
    window = (window_size_left or 0, window_size_right or 0) if not causal else (-1, 0)
    for rows, columns, is_causal, mask in _on_cpu(cu_q, cu_k, window, query.dtype):
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, :, rows], key[:, :, columns], value[:, :, columns], 0.0, is_causal, attn_mask=mask, scale=scale,
        )  # fmt: skip
        outs.append(part[0].transpose(0, 1))
        lses.append(part_lse[0])
    return _joined(outs), _joined(lses, 1), *(query.new_empty(0) for _ in range(3))


def _backward_on_cpu(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor,
    max_q: int, max_k: int, dropout: float, causal: bool, rng: Tensor, unused: Tensor, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    grad_out, query, key, value, out = (_headed(tensor) for tensor in (grad_out, query, key, value, out))
    found: list[tuple[Tensor, ...]] = []
    window = (window_size_left or 0, window_size_right or 0) if not causal else (-1, 0)
    for rows, columns, is_causal, mask in _on_cpu(cu_q, cu_k, window, query.dtype):
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[:, :, rows], query[:, :, rows], key[:, :, columns], value[:, :, columns], out[:, :, rows],
            lse[None, :, rows], 0.0, is_causal, attn_mask=mask, scale=scale,
        )  # fmt: skip
        found.append(tuple(grads))
    # Joined by heads, as the rotation before attention reads them fastest.
    return tuple(_joined(list(parts), 2)[0].transpose(0, 1) for parts in zip(*found, strict=True))


def _out_of_pages(pages: Tensor, used: Tensor, table: Tensor) -> Tensor:
    """[pages, page, H, D] → the tokens of each sequence, end to end."""
    return torch.cat([pages[row].flatten(0, 1)[:count] for row, count in zip(table, used.tolist(), strict=True)])


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _headed(tensor: Tensor) -> Tensor:
    """[T, H, D] → [1, H, T, D]"""
    return tensor.transpose(0, 1)[None]


def _on_cpu(
    cu_q: Tensor, cu_k: Tensor, window: tuple[int, int], dtype: torch.dtype
) -> list[tuple[slice, slice, bool, Tensor | None]]:
    """Of each sequence: its queries and keys, whether it is plainly causal, else its mask where one is needed."""
    spans: list[tuple[slice, slice, bool, Tensor | None]] = []
    for (begin, end), (first, last) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        num_q, num_k = end - begin, last - first
        if num_q == 0:
            continue
        reach = num_k if window[0] < 0 else window[0] + 1
        square = window[1] == 0 and num_q == num_k and reach >= num_k
        mask = None if square or window[1] < 0 else _banded(num_q, num_k, reach, dtype)
        spans.append((slice(begin, end), slice(first, last), square, mask))
    return spans


@lru_cache(maxsize=8)
def _banded(num_q: int, num_k: int, reach: int, dtype: torch.dtype) -> Tensor:
    """[num_q, num_k]: 0 where a query sees a key, -inf elsewhere; the last query sees the last key."""
    age = (torch.arange(num_q)[:, None] + num_k - num_q) - torch.arange(num_k)[None]
    return torch.zeros(num_q, num_k, dtype=dtype).masked_fill_((age < 0) | (age >= reach), -torch.inf)[None, None]
