"""Checkpoints that are whole or not there: temporary folder, hash of every file, fsync, rename.

Knows nothing of what is in a checkpoint: a caller fills a folder and reads it back.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from posttrain.errors import CheckpointError
from posttrain.files import digest_file, digest_json, fsync_dir, read_json, size_text, write_folder, write_json
from posttrain.types import CheckpointRef

log = logging.getLogger(__name__)

_SEAL = "SEAL.json"
_NAME = re.compile(r"step-(\d{8})")
_LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}")
"""What `write_atomic` and `write_folder` call what they have not finished."""
_OS_ERROR = re.compile(r"os error (\d+)")


@dataclass(frozen=True)
class CheckpointStore:
    """A folder of checkpoints. Keeps the newest `keep_last`, the best one, and those of every `keep_every`-th step."""

    folder: Path
    keep_last: int = 2
    keep_every: int = 0

    def save(self, step: int, fill: Callable[[Path], None]) -> CheckpointRef:
        """Write the checkpoint of `step`. Raises: CheckpointError; what was there before is intact then."""
        self._check_present()
        target = self.folder / f"step-{step:08d}"

        def fill_and_seal(temporary: Path) -> None:
            fill(temporary)
            _seal(temporary, step)

        with disk_errors(self.folder):
            write_folder(target, fill_and_seal)
            self.retire(step)
            return _read(target)

    def beside(self, step: int) -> Path:
        """Where other ranks put their parts of the checkpoint of `step` until it is sealed; swept like what is unfinished."""
        return self.folder / f".step-{step:08d}.of_ranks"

    def newest_valid(self, before: int | None = None) -> CheckpointRef | None:
        """The newest checkpoint (of a step below `before`) whose every byte is as written; broken ones are named and skipped."""
        for path in sorted(self._paths(), reverse=True):
            if before is not None and _step_of(path) >= before:
                continue
            try:
                return _read(path)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("checkpoint %s is broken and is skipped: %s", path.name, error)
        return None

    def discard(self, abandoned: Callable[[int, Path], bool]) -> None:
        """Forget checkpoints by step and folder; each is gone at once, whenever this is interrupted."""
        for path in self._paths():
            if abandoned(_step_of(path), path):
                gone = path.with_name(f".{path.name}.discarded")
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(path, gone)
        for leftover in self.folder.glob(".step-*.discarded"):
            shutil.rmtree(leftover)

    def mark_best(self, step: int, score: float) -> None:
        """Exempt a checkpoint from retention until another one is better."""
        self._check_present()
        with disk_errors(self.folder):
            write_json(self.folder / "best.json", {"step": step, "score": score})

    def unmark_best(self) -> None:
        (self.folder / "best.json").unlink(missing_ok=True)

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint so far. Raises: CheckpointError if the note of it is broken."""
        path = self.folder / "best.json"
        if not path.exists():
            return None
        try:
            record = read_json(path)
            return int(record["step"]), float(record["score"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is broken ({error}); delete it to go on without the best checkpoint so far"
            ) from error

    def at(self, step: int) -> CheckpointRef:
        """Raises: CheckpointError if that checkpoint is missing or broken."""
        try:
            return _read(self.folder / f"step-{step:08d}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint of step {step} in {self.folder} is not usable: {error}") from error

    def resumable_from(self) -> int:
        """The earliest step that a start may go on from: that of the oldest of the `keep_last` newest checkpoints."""
        newest = sorted((_step_of(path) for path in self._paths()), reverse=True)[: self.keep_last]
        return newest[-1] if len(newest) == self.keep_last else 0

    def has(self, step: int) -> bool:
        return (self.folder / f"step-{step:08d}").is_dir()

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]

    def retire(self, newest: int) -> None:
        """Remove what is not kept; a start does it too, for a crash may have come between a save and this."""
        best = self.best()
        kept = {newest} | ({best[0]} if best else set[int]())
        ordered = sorted(self._paths(), reverse=True)
        for path in ordered[self.keep_last :]:
            step = _step_of(path)
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(path)
        sweep(self.folder)

    def _check_present(self) -> None:
        """A folder that went away is not made again: that would split a run over two places."""
        if not self.folder.parent.is_dir():
            raise CheckpointError(
                f"{self.folder.parent} is gone; bring it back (was its disk unmounted, or the folder moved?) and start "
                "again. The last good checkpoint is where the folder is now"
            )


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Raises: CheckpointError, before any work, if the folder cannot hold what will be written."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        fsync_dir(folder)
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: {size_text(free)} free, a checkpoint needs {size_text(needed_bytes)}; free some space or move output_dir"
        )


def _seal(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    write_json(folder / _SEAL, {"step": step, "files": files})


def sweep(folder: Path) -> None:
    """Remove what a process that was killed had not finished writing here."""
    for path in folder.glob(".*"):
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def disk_errors(folder: Path) -> Generator[None]:
    """What fails below for the disk's sake says so. Raises: CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(_explain(error, folder)) from error
    except SafetensorError as error:
        # Its own kind of error, with the system's number in the text.
        number = _OS_ERROR.search(str(error))
        if number is None:
            raise
        raise CheckpointError(_explain(OSError(int(number[1]), str(error)), folder)) from error


def _read(path: Path) -> CheckpointRef:
    """Raises: OSError, ValueError, KeyError or TypeError for a checkpoint that is not as it was written."""
    seal: Any = read_json(path / _SEAL)
    step, files = int(seal["step"]), dict[str, str](seal["files"])
    if step != _step_of(path):
        raise ValueError(f"{_SEAL} is that of step {step}")
    for name, expected in files.items():
        found = digest_file(path / name)
        if found != expected:
            raise ValueError(f"{name} has digest {found[:19]}…, expected {expected[:19]}…")
    return CheckpointRef(step=step, digest=digest_json(files), path=path)


def _explain(error: OSError, folder: Path) -> str:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and start again",
        errno.EROFS: "the file system is read-only; move output_dir",
        errno.EACCES: "no permission to write; change the folder's owner or move output_dir",
        errno.EIO: "the disk reports an I/O error",
        errno.EDQUOT: "the disk quota is used up; free some space and start again",
        errno.EFBIG: "the file would exceed the limit on file sizes; raise it (ulimit -f) and start again",
        errno.ENOENT: f"the folder is gone; bring it back (was its disk unmounted?) and start again ({error})",
    }
    reason = reasons.get(error.errno or 0, str(error))
    return f"cannot write a checkpoint in {folder}: {reason}. The last good checkpoint is intact"
