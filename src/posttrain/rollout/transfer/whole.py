"""Whole versions: the tensors themselves within a process, or safetensors files that are gone once they have been read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from posttrain.types import Moved

_PORTION_BYTES = 256 << 20


class CopySender:
    """The sending end within a process."""

    def connect(self, init: Callable[[dict[str, Any]], None]) -> None:
        init({})

    def send(
        self, tensors: Iterator[tuple[str, torch.Tensor]], version: int, update: Callable[[dict[str, Any]], None]
    ) -> Moved:
        moved = 0
        for portion in portions(tensors):
            update({"tensors": portion})
            moved += num_bytes(portion)
        return Moved(moved, moved)

    def close(self) -> None:
        pass


class CopyReceiver:
    """The receiving end within a process."""

    def take(self, message: dict[str, Any]) -> Iterable[tuple[str, torch.Tensor]]:
        return message["tensors"]

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class FileSender:
    """Writes portions into `folder`; each file goes when all workers have read it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def connect(self, init: Callable[[dict[str, Any]], None]) -> None:
        init({})

    def send(
        self, tensors: Iterator[tuple[str, torch.Tensor]], version: int, update: Callable[[dict[str, Any]], None]
    ) -> Moved:
        moved = 0
        for number, portion in enumerate(portions(tensors)):
            path = self._folder / f"weights-{version}-{number}.safetensors"
            try:
                save_file({name: tensor.cpu().contiguous() for name, tensor in portion}, path)
                update({"path": str(path)})
            finally:
                path.unlink(missing_ok=True)
            moved += num_bytes(portion)
        return Moved(moved, moved)

    def close(self) -> None:
        pass


class FileReceiver:
    """Reads them."""

    def take(self, message: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(message["path"], "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


def portions(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """The tensors in lists of 256 MiB or one tensor, so that never the whole model is held at once."""
    portion: list[tuple[str, torch.Tensor]] = []
    for named in tensors:
        portion.append(named)
        if num_bytes(portion) >= _PORTION_BYTES:
            yield portion
            portion = []
    if portion:
        yield portion


def num_bytes(portion: Iterable[tuple[str, torch.Tensor]]) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in portion)
