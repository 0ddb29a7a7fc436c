"""One process per run folder. The lock is the kernel's, so it is gone when its holder is, however it died."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from posttrain.errors import CheckpointError, RunLockedError


@contextmanager
def run_lock(folder: Path) -> Generator[None]:
    """Hold `folder`. Raises: RunLockedError naming the process that holds it; CheckpointError if it cannot be written."""
    with _opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise RunLockedError(
                f"{folder} is in use by process {holder}; wait for it, stop it, or set another output_dir"
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _opened(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "a+")
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be the folder of a run: {error.strerror}; set output_dir to a folder that can be written"
        ) from error
