"""Rows for training and rows for validation: from files of their own, or split off by the digest of their content."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, TypeVar

from posttrain.config.stages import TrainKeys
from posttrain.data.dataset import Dataset, sequences
from posttrain.data.rows import ChosenRows
from posttrain.errors import DataError
from posttrain.files import digest_json

T = TypeVar("T")
_RANGE = 1 << 64


def load_with_held_out(
    load: Callable[..., Dataset[T]], keys: Any, tokenizer: Any
) -> tuple[Dataset[T], dict[str, Dataset[T]]]:
    """The training rows, and the validation sets by name ("" for the one without a name), if there are any.

    Raises: DataError.
    """
    data = load(keys, tokenizer)
    if keys.eval_datasets:
        return data, load_eval_sets(load, keys, tokenizer)
    return hold_out(data, keys) if keys.holds_out else (data, {})


def load_eval_sets(load: Callable[..., Dataset[T]], keys: Any, tokenizer: Any) -> dict[str, Dataset[T]]:
    """The sets of `eval_datasets` by name. Raises: DataError."""
    return {
        name: load(keys, tokenizer, sources=[one for one in keys.eval_datasets if (one.eval_name or "") == name])
        for name in (keys.eval_names if keys.eval_datasets else ())
    }


def hold_out(data: Dataset[T], keys: TrainKeys) -> tuple[Dataset[T], dict[str, Dataset[T]]]:
    """Hold out the rows whose content has the lowest digests: a share below 1, else so many.

    A row stays on its side whatever stands beside it in the file, and equal rows are on the same side, whatever source
    they are from; so a share is met on average, and a number may be passed by copies. Raises: DataError if a side has no row.
    """
    places = [_place(row) for row in data.rows]
    source_of = [source for source, size in enumerate(data.sizes) for _ in range(size)]
    # Sources that follow the stage's val_size are measured together, a source with its own alone.
    groups = [-1 if source.val_size is None else number for number, source in enumerate(keys.datasets)]
    held: set[int] = set()
    for group in dict.fromkeys(groups):
        size = keys.val_size if group < 0 else keys.datasets[group].val_size
        assert size is not None, "a source without a val_size is in the stage's group"
        found = [place for place, source in zip(places, source_of, strict=True) if groups[source] == group]
        bound = int(size * _RANGE) if size < 1 else _bound(found, int(size))
        held |= {place for place in found if place < bound}
    name_of = [source.eval_name or "" for source in keys.datasets]
    kept = _taken(data, [place not in held for place in places], "False")
    sets = {
        name: _taken(
            data, [p in held and name_of[s] == name for p, s in zip(places, source_of, strict=True)], f"True{name}"
        )
        for name in keys.eval_names
    }
    for name, rows in sets.items():
        if not kept.rows or not rows.rows:
            raise DataError(
                f"val_size{f' of {name}' if name else f'={keys.val_size:g}'} of {len(data)} rows holds out {len(rows)} and leaves "
                f"{len(kept)} for training; expected rows on both sides; change val_size, or name a file in eval_datasets"
            )
    return kept, sets


def _place(row: Any) -> int:
    """Where the row's content lies between 0 and 2**64, as if drawn at random."""
    ids = [seq.ids for seq in sequences(row)]
    return int.from_bytes(hashlib.sha256(repr(ids).encode()).digest()[:8], "big")


def _bound(places: Sequence[int], count: int) -> int:
    return sorted(places)[min(count, len(places)) - 1] + 1 if places else 0


def _taken(data: Dataset[T], chosen: Sequence[bool], side: str) -> Dataset[T]:
    """The chosen rows; weights stay with their sources. A source without a row left is kept, with none."""
    starts = [0, *accumulate(data.sizes)]
    sizes = tuple(sum(chosen[start : start + size]) for start, size in zip(starts, data.sizes, strict=False))
    rows = ChosenRows(data.rows, array("l", (place for place, take in enumerate(chosen) if take)))
    return replace(data, rows=rows, sizes=sizes, digest=digest_json([data.digest, side, sizes]))
