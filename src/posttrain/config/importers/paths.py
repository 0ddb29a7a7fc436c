"""Paths in other tools' files: relative to where the tool was started, or to the file."""

from __future__ import annotations

import os
from pathlib import Path

from posttrain.config.importers.fates import ImportDraft


def local_file(draft: ImportDraft, path: str) -> str:
    """The file at `path` from one of the folders it may be relative to; as it is written where none has it."""
    for folder in draft.home:
        # Of `os`, which says of a name that no file can have (too long, with a zero byte) that it is not there.
        found = os.path.join(folder, os.path.expanduser(path))
        if path and os.path.exists(found):
            return str(Path(found).resolve())
    return path


def reward_file(draft: ImportDraft, name: str) -> str:
    """`rewards.correct` there is `rewards.py:correct` here, from where it may stand; a plain name stays."""
    module, _, function = name.rpartition(".")
    return f"{local_file(draft, module.replace('.', '/') + '.py')}:{function}" if module else name
