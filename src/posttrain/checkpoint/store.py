"""Checkpoints that are whole or not there: temporary folder, hash of every file, fsync, rename.

Knows nothing of what is in a checkpoint: a caller fills a folder and reads it back.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from posttrain.errors import CheckpointError
from posttrain.files import digest_file, digest_json, fsync_dir, read_json, write_folder, write_json
from posttrain.types import CheckpointRef

log = logging.getLogger(__name__)

_SEAL = "SEAL.json"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class CheckpointStore:
    """A folder of checkpoints. Keeps the newest `keep_last`, and the best one besides."""

    folder: Path
    keep_last: int = 2

    def save(self, step: int, fill: Callable[[Path], None]) -> CheckpointRef:
        """Write the checkpoint of `step`. Raises: CheckpointError; what was there before is intact then."""
        target = self.folder / f"step-{step:08d}"

        def fill_and_seal(temporary: Path) -> None:
            fill(temporary)
            _seal(temporary, step)

        try:
            write_folder(target, fill_and_seal)
        except OSError as error:
            raise CheckpointError(_explain(error, self.folder)) from error
        self._retire(step)
        return _read(target)

    def newest_valid(self) -> CheckpointRef | None:
        """The newest checkpoint whose every byte is as written; broken ones are named and skipped."""
        for path in sorted(self._paths(), reverse=True):
            try:
                return _read(path)
            except (OSError, ValueError, KeyError) as error:
                log.warning("checkpoint %s is broken and is skipped: %s", path.name, error)
        return None

    def mark_best(self, step: int, score: float) -> None:
        """Exempt a checkpoint from retention until another one is better."""
        write_json(self.folder / "best.json", {"step": step, "score": score})

    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint so far."""
        path = self.folder / "best.json"
        if not path.exists():
            return None
        record = read_json(path)
        return int(record["step"]), float(record["score"])

    def at(self, step: int) -> CheckpointRef:
        """Raises: CheckpointError if that checkpoint is missing or broken."""
        try:
            return _read(self.folder / f"step-{step:08d}")
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"checkpoint of step {step} in {self.folder} is not usable: {error}") from error

    def _paths(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return [path for path in self.folder.iterdir() if _NAME.fullmatch(path.name)]

    def _retire(self, newest: int) -> None:
        best = self.best()
        kept = {newest} | ({best[0]} if best else set[int]())
        ordered = sorted(self._paths(), reverse=True)
        for path in ordered[self.keep_last :]:
            if int(path.name.removeprefix("step-")) not in kept:
                shutil.rmtree(path)
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def check_writable(folder: Path, needed_bytes: int) -> None:
    """Raises: CheckpointError, before any work, if the folder cannot hold what will be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        fsync_dir(folder)
    except OSError as error:
        raise CheckpointError(_explain(error, folder)) from error
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{folder}: {free / 1e9:.1f} GB free, a checkpoint needs {needed_bytes / 1e9:.1f} GB; free some space or move output_dir"
        )


def _seal(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }
    write_json(folder / _SEAL, {"step": step, "files": files})


def _read(path: Path) -> CheckpointRef:
    seal = read_json(path / _SEAL)
    for name, expected in seal["files"].items():
        found = digest_file(path / name)
        if found != expected:
            raise ValueError(f"{name} has digest {found[:19]}…, expected {expected[:19]}…")
    return CheckpointRef(step=int(seal["step"]), digest=digest_json(seal["files"]), path=path)


def _explain(error: OSError, folder: Path) -> str:
    reasons = {
        errno.ENOSPC: "the disk is full; free some space and start again",
        errno.EROFS: "the file system is read-only; move output_dir",
        errno.EACCES: "no permission to write; change the folder's owner or move output_dir",
        errno.EIO: "the disk reports an I/O error",
    }
    reason = reasons.get(error.errno or 0, str(error))
    return f"cannot write a checkpoint in {folder}: {reason}. The last good checkpoint is intact"
