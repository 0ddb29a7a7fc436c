"""Tokenised parts of rows on their way to the cache, kept one by one: who was killed goes on behind the last one that is whole.

Knows nothing of what rows are: a part is its sequences by row, and what was counted while they were made.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from posttrain.types import Origin, TokenSeq

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The sequences of each row of a part, and notes: what → how often."""

    rows: list[tuple[TokenSeq, ...]]
    notes: dict[str, int]


class Shelf:
    """The parts of one cache entry in their order; without a folder, or where it cannot be written, none is kept.

    `awaited` is asked for a part by its number before it is looked for.
    """

    def __init__(self, folder: Path | None, awaited: Callable[[int], None] = lambda _: None) -> None:
        self._folder, self._await = folder, awaited
        self._asked = self._found = 0
        self._earlier = {path.name for path in folder.glob("[0-9]*.npz")} if folder else set[str]()

    @property
    def found_text(self) -> str:
        return f"; {self._found} of {self._asked} parts were there from a start that was cut off" * bool(self._found)

    def next(self, origins: Sequence[Origin], make: Callable[[], Rendered]) -> Rendered:
        """The next part, whose rows are from `origins`: as it was kept, or made now."""
        name = self.name(self._asked)
        self._await(self._asked)
        self._asked += 1
        found = _read(self._folder / name, origins) if self._folder else None
        if found is None:
            found = make()
            self._keep(name, found)
        else:
            self._found += name in self._earlier
        return found

    def skip(self) -> None:
        """The next part is somebody else's."""
        self._asked += 1

    @staticmethod
    def name(number: int) -> str:
        return f"{number:06}.npz"

    @property
    def keeps(self) -> bool:
        return self._folder is not None

    def clear(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _keep(self, name: str, part: Rendered) -> None:
        if self._folder is None:
            return
        seqs = list(chain(*part.rows))
        kept = {
            "seqs_per_row": np.array([len(row) for row in part.rows], np.int32),
            "lengths": np.array([len(seq.ids) for seq in seqs], np.int32),
            "ids": np.fromiter(chain.from_iterable(seq.ids for seq in seqs), np.int32),
            "mask": np.packbits(np.fromiter(chain.from_iterable(seq.loss_mask for seq in seqs), np.bool_)),
            "notes": np.frombuffer(json.dumps(part.notes).encode(), np.uint8),
        }
        try:
            self._folder.mkdir(exist_ok=True)
            new = self._folder / f"new.{os.getpid()}.{name}"
            np.savez(new, allow_pickle=False, **kept)
            os.replace(new, self._folder / name)
        except OSError as error:
            log.warning(
                "%s: parts of tokenised rows are not kept on the way: %s", self._folder, error.strerror or error
            )
            self.clear()
            self._folder = None


def _read(path: Path, origins: Sequence[Origin]) -> Rendered | None:
    """None for one that is not there, or not whole: its own checksums say so."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            per_row, lengths = kept["seqs_per_row"].tolist(), kept["lengths"].tolist()
            ids, bits = kept["ids"].tolist(), np.unpackbits(kept["mask"]).astype(np.bool_).tolist()
            notes = json.loads(kept["notes"].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if len(per_row) != len(origins) or sum(per_row) != len(lengths) or sum(lengths) != len(ids):
        return None
    rows: list[tuple[TokenSeq, ...]] = []
    at = number = 0
    for origin, count in zip(origins, per_row, strict=True):
        seqs: list[TokenSeq] = []
        for length in lengths[number : number + count]:
            seqs.append(TokenSeq(tuple(ids[at : at + length]), tuple(bits[at : at + length]), origin))
            at += length
        number += count
        rows.append(tuple(seqs))
    return Rendered(rows, notes)
