"""A model's weights into its folder, a tensor at a time: the files that transformers writes, to the byte. Knows no adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from posttrain.protocols import Sharding

_STEM = "model"
MAX_SHARD_SIZE = "50GB"
"""The largest file, as transformers cuts them."""
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
"""Dtype → its name in a file; a file holds the last of them first."""


def write_weights(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, sharding: Sharding, *, is_main: bool,
    max_shard_size: str = MAX_SHARD_SIZE, between: Callable[[], None] = lambda: None,
) -> OSError | None:  # fmt: skip
    """Cast floats to `dtype` and write. All ranks call it; each tensor is gathered when it is its turn, and rank 0 writes it.

    A model whose file has other tensors than it has parameters (experts, one by one) is gathered a layer at a time.
    `between` is called between two tensors by all ranks, and may end it. Returns what rank 0 could not write, so that no rank
    waits for it in a collective.
    """
    own: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
    described = _described(model, own, dtype)
    stored = _stored(model, described)
    failed: OSError | None = None
    with ExitStack() as files:
        try:
            places = files.enter_context(_Files(model, folder, stored, max_shard_size)) if is_main else None
        except OSError as error:
            failed, places = error, None
        for names in _groups(model, described, stored):
            between()
            gathered = {name: _cast(sharding.whole(own[name]), dtype) for name in names}
            if places is None or failed is not None:
                continue
            try:
                for name, tensor in _reverted(model, gathered).items():
                    places.write(name, tensor)
            except OSError as error:
                failed = error
        assert places is None or failed is not None or places.are_full
    return failed


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _described(model: PreTrainedModel, own: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The model's tensors without data, tied ones once, less what transformers does not save."""
    ignored = model._keys_to_ignore_on_save or ()
    by_id = {id(tensor): _cast(_empty(tensor.shape, tensor.dtype), dtype) for tensor in own.values()}
    state = {name: by_id[id(tensor)] for name, tensor in own.items() if name not in ignored}
    return remove_tied_weights_from_state_dict(state, model)


def _empty(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _stored(model: PreTrainedModel, described: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of the file, without data."""
    reverted = _reverted(model, described)
    return {name: _empty(tensor.shape, tensor.dtype) for name, tensor in reverted.items()}


def _reverted(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return revert_weight_conversion(model, dict(state))


def _groups(
    model: PreTrainedModel, described: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
) -> list[list[str]]:
    """Names that are gathered together: what makes up tensors of the file."""
    if described.keys() == stored.keys():
        return [[name] for name in described]
    layers = [list(names) for _, names in groupby(sorted(described, key=_layer), key=_layer)]
    alone = [_reverted(model, {name: described[name] for name in names}) for names in layers]
    by_layer = {name: tensor.shape for state in alone for name, tensor in state.items()}
    # Where a tensor of the file is made of several layers, the model is gathered whole.
    return layers if by_layer == {name: tensor.shape for name, tensor in stored.items()} else [list(described)]


def _layer(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.up_proj.weight`; what is in no layer stands alone."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else name


class _Files:
    """The files of a folder, open, with a place for every tensor."""

    def __init__(
        self, model: PreTrainedModel, folder: Path, stored: Mapping[str, torch.Tensor], max_shard_size: str
    ) -> None:
        split = split_torch_state_dict_into_shards(
            dict(stored), filename_pattern=f"{_STEM}{{suffix}}.safetensors", max_shard_size=max_shard_size
        )
        self._opened = ExitStack()
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        for file, names in split.filename_to_tensors.items():
            handle = self._opened.enter_context((folder / file).open("wb"))
            header, starts = _header({name: stored[name] for name in names})
            handle.write(header)
            self._places |= {name: (handle, start) for name, start in starts.items()}
        if split.is_sharded:
            metadata: dict[str, Any] = {"total_parameters": model.num_parameters(), **split.metadata}
            index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / f"{_STEM}.safetensors.index.json").write_text(text, encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @property
    def are_full(self) -> bool:
        return not self._places

    def write(self, name: str, tensor: torch.Tensor) -> None:
        handle, start = self._places.pop(name)
        handle.seek(start)
        handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        handle.flush()


def _header(tensors: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, int]]:
    """How a file begins, and where in it each tensor does. Source: safetensors' format; its own order of tensors."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at, ranks = 0, list(_DTYPES)
    for name, tensor in sorted(tensors.items(), key=lambda item: (-ranks.index(item[1].dtype), item[0])):
        end = at + prod(tensor.shape) * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    starts = {name: 8 + len(text) + entries[name]["data_offsets"][0] for name in tensors}
    return len(text).to_bytes(8, "little") + text, starts
