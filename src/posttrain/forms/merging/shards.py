"""Tensors to a folder as they come: in shards of bounded size, with transformers' index. Holds one shard in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


@dataclass(slots=True)
class ShardWriter:
    """`add` each tensor, then `close`."""

    folder: Path
    limit: int = SHARD_BYTES
    total: int = 0
    _pending: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    _size: int = 0
    _written: list[list[str]] = field(default_factory=list[list[str]])

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._size + size > self.limit:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._size += size
        self.total += size

    def _flush(self) -> None:
        save_file(self._pending, self._part(len(self._written)), metadata={"format": "pt"})
        self._written.append(list(self._pending))
        self._pending, self._size = {}, 0

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"

    def close(self) -> None:
        self._flush()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self.folder / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._written):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(places.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
