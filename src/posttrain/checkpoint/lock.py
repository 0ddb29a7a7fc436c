"""One process per run folder. The lock is the kernel's, so it is gone when its holder is, however it died."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from posttrain.errors import CheckpointError, RunLockedError

_LOOK_S = 0.05


@contextmanager
def run_lock(folder: Path, patience_s: float = 0.0) -> Generator[None]:
    """Hold `folder`, waiting so long for it. Raises: RunLockedError naming the process that holds it; CheckpointError if it cannot be written."""
    deadline = time.monotonic() + patience_s
    with _opened(folder) as handle:
        while not _locked(handle):
            if time.monotonic() < deadline:
                time.sleep(_LOOK_S)
                continue
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            raise RunLockedError(
                f"{folder} is in use by process {holder}; wait for it, stop it, or set another output_dir"
            )
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _locked(handle: IO[str]) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "a+")
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be the folder of a run: {error.strerror}; set output_dir to a folder that can be written"
        ) from error
