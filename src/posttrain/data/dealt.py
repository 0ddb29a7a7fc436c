"""Parts of rows that several processes tokenise: each takes every n-th and lays it on the shelf, where who reads all of them finds it.

So what is read is what one process reads, in its order and with its errors: a part that nobody has made is made by the reader.
"""

from __future__ import annotations

import itertools
import logging
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.config.datasets import DatasetKeys, RowKind
from posttrain.data.opened import OpenSource
from posttrain.data.rendered import Survey, nouns_of, tokenized
from posttrain.data.shelf import Shelf
from posttrain.errors import ConfigError, DataError
from posttrain.supervised import SupervisedProcess

log = logging.getLogger(__name__)

_LOOK_S = 0.01
_ENTRY = f"{__name__}:main"


@dataclass(frozen=True)
class Deal:
    """What a process needs to make parts: sources with the digest and the format that were found, how their rows are drafted, and where parts go."""

    sources: Sequence[tuple[DatasetKeys, str, str]]
    kind: RowKind
    draft: Callable[[Any, Any], Any]
    tokenizer: Any
    folder: Path

    def packed(self, num_processes: int) -> bytes:
        """As other processes read it. Raises: ConfigError where it cannot be sent."""
        try:
            return pickle.dumps(self)
        except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"dataset_num_proc: {num_processes}, and what tokenises cannot be sent to another process ({error}); expected a tokenizer "
                "and functions that Python can pickle; set dataset_num_proc: 1"
            ) from error


@contextmanager
def dealt(deal: Deal, num_processes: int, num_parts: int) -> Generator[Shelf]:
    """Inside, so many processes make the parts of the shelf, which waits for a part until it is there or its process has ended. Raises: ConfigError."""
    packed, parts = deal.packed(num_processes), _DealtParts(deal.folder)
    shelf = Shelf(deal.folder, parts.wait_for)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as wrote:
        given.write(packed)
        given.flush()
        try:
            parts.start(min(num_processes, num_parts, len(os.sched_getaffinity(0))), given.fileno(), wrote)
            yield shelf
        finally:
            parts.end()


class _DealtParts:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[SupervisedProcess] = []
        self._told: set[int] = set()

    def start(self, count: int, given_fd: int, wrote: IO[bytes]) -> None:
        # Each is one of several: threads of its own would be more than there are cores.
        environment = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        for number in range(count):
            arguments = [str(given_fd), str(number), str(count)]
            self._processes.append(SupervisedProcess(_ENTRY, arguments, wrote, environment, [given_fd]))

    def wait_for(self, number: int) -> None:
        whose = number % len(self._processes)
        process = self._processes[whose]
        while not (self._folder / Shelf.name(number)).exists():
            if process.has_ended():
                self._tell(whose, process)
                return
            time.sleep(_LOOK_S)

    def _tell(self, whose: int, process: SupervisedProcess) -> None:
        if process.code and whose not in self._told:
            self._told.add(whose)
            said = (process.last_lines() or [""])[-1][:200]
            how = process.how_it_ended()
            log.warning("a process that tokenises ended (%s) %s: its other parts are made here", how, said)

    def end(self) -> None:
        for process in self._processes:
            process.end()


def deal_of(
    surveys: Sequence[Survey], kind: RowKind, draft: Callable[[Any, Any], Any], tokenizer: Any, folder: Path
) -> Deal:
    sources = [(one.source.keys, one.source.digest, one.name) for one in surveys]
    return Deal(sources, kind, draft, tokenizer, folder)


# --- in the new process --------------------------------------------------------------------------------------------


def main(given_fd: str, number: str, count: str) -> None:
    """Make every `count`-th part from part `number` on. An error of the rows is the reader's to tell."""
    descriptor = int(given_fd)
    # Not read: all processes have the place in the file in common.
    deal = pickle.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0))
    with suppress(DataError):
        make_parts(deal, int(number), int(count))


def make_parts(deal: Deal, number: int, count: int) -> None:
    """Raises: DataError."""
    shelf, numbers = Shelf(deal.folder), itertools.count()
    for keys, digest, name in deal.sources:
        source = OpenSource(keys)
        if source.digest != digest:
            raise DataError(f"{keys.path}: is not what it was when it was looked at")
        for part in source.parts():
            if next(numbers) % count != number:
                shelf.skip()
                continue
            nouns, _ = nouns_of(part.rows, name, keys, deal.kind)
            shelf.next(
                [noun.origin for noun in nouns], lambda nouns=nouns: tokenized(deal.draft, nouns, deal.tokenizer)
            )
            if not shelf.keeps:
                return
