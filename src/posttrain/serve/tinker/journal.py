"""Every request of a model in its order, on disk before its client hears of it: after a kill it says what is lost.

A line when a request is let in, and one when it is done. Knows nothing of what requests do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.files import named_if_damaged, read_json_lines
from posttrain.tracking.jsonl import cut_torn_line, write_whole

CHANGING = frozenset({"forward_backward", "optim_step", "load_weights"})
"""Kinds of request that change what a model is; the others only read it."""
SAVE, EXPORT = "save_weights", "save_weights_for_sampler"


@dataclass
class JournalEntry:
    """`result` is what the client is told, of those kinds whose result is small; `failure` why there is none."""

    seq: int
    kind: str
    digest: str
    name: str = ""
    """Of a save."""
    is_done: bool = False
    result: Mapping[str, Any] | None = None
    failure: str = ""

    def __str__(self) -> str:
        return f"{self.seq} {self.kind}"


class Journal:
    """Raises: DamagedFileError, DataError for a file with a line that is none of ours."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.entries: dict[int, JournalEntry] = {}
        if path.exists():
            cut_torn_line(path)  # which a machine that lost its power can leave, and nobody was told of
            with named_if_damaged(path, "put a copy of it back: it says what was let in and saved"):
                for _, line in read_json_lines(path):
                    self._take(line)
        self._descriptor = -1

    def accept(self, seq: int, kind: str, digest: str, name: str = "") -> None:
        self._write({"seq": seq, "kind": kind, "digest": digest, "name": name}, durable=False)

    def finish(self, seq: int, result: Mapping[str, Any] | None, failure: str = "") -> None:
        """A save is on the disk itself, with all that was before it, when this returns."""
        durable = self.entries[seq].kind == SAVE
        self._write({"seq": seq, "result": result, "failure": failure}, durable=durable)

    @property
    def last(self) -> int:
        """The highest number that was let in."""
        return max(self.entries, default=0)

    @property
    def last_save(self) -> JournalEntry | None:
        saves = [e for e in self.entries.values() if e.kind == SAVE and e.is_done and not e.failure]
        return max(saves, key=lambda entry: entry.seq, default=None)

    @property
    def unsaved(self) -> list[JournalEntry]:
        """What came after the last save, or since the model was made, and may have changed it."""
        save = self.last_save
        after = 0 if save is None else save.seq
        changing = [e for e in self.entries.values() if e.seq > after and e.kind in CHANGING]
        return sorted(changing, key=lambda entry: entry.seq)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _write(self, line: Mapping[str, Any], *, durable: bool) -> None:
        if self._descriptor < 0:  # of the many models there once were, few are written to
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        write_whole(self._descriptor, (json.dumps(line) + "\n").encode())
        if durable:
            os.fsync(self._descriptor)
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "kind" in line:
            self.entries[line["seq"]] = JournalEntry(line["seq"], line["kind"], line["digest"], line["name"])
        else:
            entry = self.entries[line["seq"]]
            entry.is_done, entry.result, entry.failure = True, line["result"], line["failure"]
