"""Tensors on disk in parts: each rank writes the rows that it holds, and a reader asks for rows of the whole.

In one process there is one part, an ordinary safetensors file. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  # has no types

from posttrain.errors import CheckpointError
from posttrain.protocols import Share

_WHOLE = "whole"
"""Metadata: name → first row of this part and shape of the whole tensor."""
_COLUMNS = "columns"
"""Metadata: name → first column of this part, where it has not all of them."""
_PATIENCE_S = 600.0
_POLL_S = 0.01


def part_name(stem: str, rank: int, ranks: int) -> str:
    """A file's name, as model files in several parts are called."""
    return f"{stem}.safetensors" if ranks == 1 else f"{stem}-{rank + 1:05d}-of-{ranks:05d}.safetensors"


def write_part(path: Path, tensors: Mapping[str, Share]) -> None:
    """Complete under its name or not there."""
    whole = {name: [share.start, *share.shape] for name, share in tensors.items() if share.shape != share.rows.shape}
    columns = {
        name: share.column
        for name, share in tensors.items()
        if len(share.shape) > 1 and share.shape[1] != share.rows.shape[1]
    }
    temporary = path.with_name(f".{path.name}.unfinish")
    rows = {name: share.rows.contiguous() for name, share in tensors.items()}
    said = {key: json.dumps(value) for key, value in ((_WHOLE, whole), (_COLUMNS, columns)) if value}
    save_file(rows, temporary, metadata=said or None)
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def collect_part(source: Path, target: Path, stopped: Callable[[], bool]) -> None:
    """Move the part that another rank writes to `source`, as soon as it is complete.

    Raises: CheckpointError where it does not come, or `stopped` says that it will not.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while not source.exists():
        if stopped() or time.monotonic() > deadline:
            raise CheckpointError(
                f"{source.name} was not written by its rank; expected it in {source.parent} within {_PATIENCE_S:.0f} s: the "
                "ranks of a run need one file system for output_dir"
            )
        time.sleep(_POLL_S)
    os.replace(source, target)


class TensorParts:
    """The tensors of all parts of `stem` in a folder, by rows."""

    def __init__(self, folder: Path, stem: str) -> None:
        self._files = ExitStack()
        self._places: dict[str, dict[tuple[int, int], list[tuple[int, int, Any]]]] = {}
        """Name → of so many columns, parts by first and last row. Tensors without columns have one."""
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob(f"{stem}*.safetensors")):
            opened: Any = safe_open(path, "pt")
            self._files.push(opened)
            file: Any = opened.__enter__()
            metadata: dict[str, str] = file.metadata() or dict[str, str]()
            whole: dict[str, list[int]] = json.loads(metadata.get(_WHOLE, "{}"))
            columns: dict[str, int] = json.loads(metadata.get(_COLUMNS, "{}"))
            names: list[str] = list(file.keys())
            for name in names:
                own: list[int] = list(file.get_slice(name).get_shape())
                start, *shape = whole.get(name, [0, *own])
                self._shapes[name] = tuple(shape)
                left = columns.get(name, 0)
                strip = (left, left + (own[1] if len(own) > 1 else 1))
                rows = (start, start + (own[0] if own else 1), file)
                self._places.setdefault(name, {}).setdefault(strip, []).append(rows)
        if not any(folder.glob(f"{stem}*.safetensors")):
            raise CheckpointError(f"{folder} has no {stem}.safetensors")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.close()

    def names(self) -> list[str]:
        """In the same order on every rank: state is built in it, and collectives follow that."""
        return sorted(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(
        self, name: str, start: int = 0, stop: int | None = None, columns: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Rows [start, stop) of the whole tensor, and of these columns; a copy. Raises: CheckpointError where parts are missing."""
        shape, strips = self._shapes[name], self._places[name]
        if not shape:
            return next(iter(strips.values()))[0][2].get_tensor(name)
        stop = shape[0] if stop is None else stop
        left, right = columns or (0, shape[1] if len(shape) > 1 else 1)
        found: list[torch.Tensor] = []
        at = left
        for (first, last), places in sorted(strips.items()):
            if first <= at < last and at < right:
                rows = self._rows(name, places, start, stop)
                cuts = (first, last) != (at, min(last, right))
                found.append(rows[:, at - first : min(last, right) - first] if cuts else rows)
                at = min(last, right)
        if at < right:
            raise CheckpointError(f"{name}: columns {at} to {right} are in no part of the checkpoint")
        return found[0].contiguous() if len(found) == 1 else torch.cat(found, 1)

    def _rows(self, name: str, places: Sequence[tuple[int, int, Any]], start: int, stop: int) -> torch.Tensor:
        found: list[torch.Tensor] = []
        at = start
        for first, last, file in sorted(places, key=lambda place: place[:2]):
            if first <= at < last and at < stop:
                found.append(file.get_slice(name)[at - first : min(last, stop) - first])
                at = min(last, stop)
        if at < stop:
            raise CheckpointError(
                f"{name}: rows {at} to {stop} of {self._shapes[name][0]} are in no part of the checkpoint"
            )
        return torch.cat(found) if found else places[0][2].get_slice(name)[0:0].clone()
