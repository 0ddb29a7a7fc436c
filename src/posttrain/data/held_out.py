"""Rows for training and rows for validation: from files of their own, or split off by the digest of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

from posttrain.config.stages import TrainKeys
from posttrain.data.dataset import Dataset, sequences
from posttrain.errors import DataError
from posttrain.files import digest_json

T = TypeVar("T")
_RANGE = 1 << 64


def load_with_held_out(
    load: Callable[..., Dataset[T]], keys: Any, tokenizer: Any
) -> tuple[Dataset[T], Dataset[T] | None]:
    """The training rows, and those for the validation loss if there are any. Raises: DataError."""
    data = load(keys, tokenizer)
    if keys.eval_datasets:
        return data, load(keys, tokenizer, sources=keys.eval_datasets)
    return hold_out(data, keys) if keys.val_size else (data, None)


def hold_out(data: Dataset[T], keys: TrainKeys) -> tuple[Dataset[T], Dataset[T]]:
    """Hold out the rows whose content has the lowest digests: a share below 1, else so many.

    A row stays on its side whatever stands beside it in the file, and equal rows are on the same side; so a share is
    met on average, and a number may be passed by copies of the last row. Raises: DataError if a side has no row.
    """
    places = [_place(row) for row in data.rows]
    bound = int(keys.val_size * _RANGE) if keys.val_size < 1 else _bound(places, int(keys.val_size))
    kept, held = (_taken(data, [(place < bound) is side for place in places], str(side)) for side in (False, True))
    if not kept.rows or not held.rows:
        raise DataError(
            f"val_size={keys.val_size:g} of {len(data)} rows holds out {len(held)} and leaves {len(kept)} for training; "
            "expected rows on both sides; change val_size, or name a file in eval_datasets"
        )
    return kept, held


def _place(row: Any) -> int:
    """Where the row's content lies between 0 and 2**64, as if drawn at random."""
    ids = [seq.ids for seq in sequences(row)]
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:8], "big")


def _bound(places: Sequence[int], count: int) -> int:
    return sorted(places)[min(count, len(places)) - 1] + 1


def _taken(data: Dataset[T], chosen: Sequence[bool], side: str) -> Dataset[T]:
    """The chosen rows; weights stay with their sources. A source without a row left is kept, with none."""
    starts = [0, *accumulate(data.sizes)]
    sizes = tuple(sum(chosen[start : start + size]) for start, size in zip(starts, data.sizes, strict=False))
    rows = [row for row, take in zip(data.rows, chosen, strict=True) if take]
    return replace(data, rows=rows, sizes=sizes, digest=digest_json([data.digest, side, sizes]))
