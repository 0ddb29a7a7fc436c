"""Paths in other tools' files: relative to where the tool was started, or to the file."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.importers.fates import Draft


def local_file(draft: Draft, path: str) -> str:
    """The file at `path` from one of the folders it may be relative to; as it is written where none has it."""
    for folder in draft.home:
        found = folder / Path(path).expanduser()
        if path and found.exists():
            return str(found.resolve())
    return path
