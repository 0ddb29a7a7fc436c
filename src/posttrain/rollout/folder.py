"""A folder of an engine's own: its socket, weights on their way, adapters. What runs that were killed have left is swept."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_PREFIX = "posttrain-engine-"
_YOUNG_S = 60.0
"""A folder that was made just now may not be locked yet."""


class OwnFolder:
    """Only this user can enter it. It is locked while the process that made it lives. `parent`: where it lies, else with temporary files."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or Path(tempfile.gettempdir())
        sweep_killed(parent)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def sweep_killed(parent: Path) -> None:
    """Remove this user's folders whose process is gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        # Another process may sweep at the same time.
        with suppress(OSError):
            found = path.lstat()
            if found.st_uid == os.getuid() and time.time() - found.st_mtime > _YOUNG_S:
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    finally:
        os.close(lock)
