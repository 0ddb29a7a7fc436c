"""Content-addressed files in a folder: what is asked for by digest is either exactly that or an error.

`objects/<aa>/<sha256>` holds file contents, read-only. A tree is one more object: the canonical JSON of
`{relative path: digest}`, so that a tree's digest is `posttrain.files.digest_tree` of the folder it came from.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from posttrain.errors import RegistryError
from posttrain.files import canonical_json, digest_bytes, digest_file, fsync_dir, write_folder

_CHUNK_BYTES = 1 << 20
_READ_ONLY = 0o444
_ABANDONED_S = 24 * 3600.0


class ContentStore:
    """Every write is temporary file, hash, fsync, rename: a crash leaves whole objects only, and no harm in repeating."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._objects = self.folder / "objects"
        self._objects.mkdir(parents=True, exist_ok=True)
        self.writable = os.access(self._objects, os.W_OK) and os.access(self.folder, os.W_OK)
        if self.writable:
            self._sweep()

    @contextmanager
    def adding(self) -> Generator[None]:
        """Around writes and the rows that mention them: nothing is collected and no half-written file is swept meanwhile."""
        with self._lock() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    @contextmanager
    def nobody_adding(self) -> Generator[bool]:
        """Whether no process is adding; if so none can begin until this ends. Locks are the kernel's and end with a process."""
        with self._lock() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True

    def _lock(self) -> IO[str]:
        return open(self.folder / ".lock", "a")

    def object_path(self, digest: str) -> Path:
        name = digest.removeprefix("sha256:")
        return self._objects / name[:2] / name

    def has(self, digest: str) -> bool:
        return self.object_path(digest).exists()

    def put_bytes(self, data: bytes) -> str:
        digest = digest_bytes(data)
        if not self.is_intact(digest):
            with self.adding():
                temporary, handle = self._temporary()
                with handle:
                    handle.write(data)
                self._adopt(temporary, digest)
        return digest

    def put_json(self, value: Any) -> str:
        """Its digest is `posttrain.files.digest_json(value)`."""
        return self.put_bytes(canonical_json(value).encode("utf-8", "surrogatepass"))

    def put_file(self, path: Path) -> str:
        """Copy a file in. What is hashed is what was copied, even if the source changes meanwhile."""
        with self.adding(), Path(path).open("rb") as source:
            return self.put_stream(source)

    def put_stream(self, source: IO[bytes]) -> str:
        """Copy an open file in, and say what it was."""
        temporary, handle = self._temporary()
        hasher = hashlib.sha256()
        with handle:
            while chunk := source.read(_CHUNK_BYTES):
                hasher.update(chunk)
                handle.write(chunk)
        digest = "sha256:" + hasher.hexdigest()
        if self.is_intact(digest):
            temporary.unlink()
        else:
            self._adopt(temporary, digest)
        return digest

    def put_tree(self, folder: Path) -> str:
        """Copy a folder in: names and contents. Raises: RegistryError if there is nothing in it."""
        folder = Path(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        if not paths:
            raise RegistryError(f"{folder}: got no files, expected a folder with a model or evidence in it")
        return self.put_files({path.relative_to(folder).as_posix(): path for path in paths})

    def put_files(self, files: Mapping[str, Path]) -> str:
        """Copy files in as a tree: relative path in it → where the file is."""
        return self.put_json({name: self.put_file(path) for name, path in sorted(files.items())})

    def get_json(self, digest: str, what: str = "record") -> Any:
        """Raises: RegistryError, naming `what`, if it is missing or has been changed."""
        self._check(digest, what)
        return json.loads(self.object_path(digest).read_text(encoding="utf-8", errors="surrogatepass"))

    def tree(self, digest: str) -> Mapping[str, str]:
        """Relative path → digest of the files of a tree."""
        return self.get_json(digest, "list of files")

    def materialize(self, digest: str, target: Path) -> Path:
        """Write a tree out as `target`, all or nothing, by hard link where the file system allows; keep it read-only."""
        with self.adding() if self.writable else nullcontext():
            return self._materialize(digest, target)

    def _materialize(self, digest: str, target: Path) -> Path:
        files = self.tree(digest)

        def fill(temporary: Path) -> None:
            for name, content in files.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self._link(content, temporary / name)

        written = write_folder(target, fill, keep=True)
        for name, content in files.items():
            if written[name] != content:
                raise RegistryError(f"{name}: got {written[name]}, expected {content}: the stored object is damaged")
        return Path(target)

    def verify_object(self, digest: str, what: str) -> None:
        """Raises: RegistryError, naming `what`, if the object is missing or a byte of it has changed."""
        self._check(digest, what)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever put into it."""
        return next(self._objects.glob("??/*"), None) is None

    def missing(self, digest: str) -> list[str]:
        """Files of a tree whose contents are not there. Raises: RegistryError if the list of files itself is damaged."""
        return sorted(name for name, content in self.tree(digest).items() if not self.has(content))

    def verify(self, digest: str) -> int:
        """Check every byte of a tree; the number of its files. Raises: RegistryError naming the file that is damaged."""
        files = self.tree(digest)
        for name, content in files.items():
            self._check(content, name)
        return len(files)

    def _sweep(self) -> None:
        """Remove what a killed process left half-written. Its age alone proves nothing: a clock may leap."""
        with self.nobody_adding() as idle:
            for path in self.folder.glob("*/.*.*") if idle else ():
                if time.time() - path.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _check(self, digest: str, what: str) -> None:
        path = self.object_path(digest)
        if not path.exists():
            raise RegistryError(f"{what}: its content {digest} is missing from {self._objects}; restore it from a copy")
        got = digest_file(path)
        if got != digest:
            raise RegistryError(f"{what}: content has changed, got {got}, expected {digest} ({path}); restore it")

    def is_intact(self, digest: str) -> bool:
        """Whether it is there with every byte."""
        path = self.object_path(digest)
        return path.exists() and digest_file(path) == digest

    def _temporary(self) -> tuple[Path, IO[bytes]]:
        descriptor, name = tempfile.mkstemp(dir=self._objects, prefix=".tmp.")
        return Path(name), os.fdopen(descriptor, "wb")

    def _adopt(self, temporary: Path, digest: str) -> None:
        target = self.object_path(digest)
        target.parent.mkdir(exist_ok=True)
        temporary.chmod(_READ_ONLY)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(target)
        fsync_dir(target.parent)

    def _link(self, digest: str, target: Path) -> None:
        try:
            os.link(self.object_path(digest), target)
        except FileNotFoundError as error:
            raise RegistryError(f"{target.name}: its content {digest} is missing from {self._objects}") from error
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(self.object_path(digest), target)
            target.chmod(_READ_ONLY)
