"""Digests, JSON lines and crash-safe files: what is written here is either wholly there or not there.

Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from posttrain.errors import DamagedFileError, DataError, PosttrainError, RunLockedError

log = logging.getLogger(__name__)

T = TypeVar("T")

_CHUNK_BYTES = 1 << 20
JSON_PER_LINE = "one JSON object per line"


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces; equal values give equal text. Raises: ValueError on NaN or inf."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_bytes(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_start(digest: str) -> str:
    """Enough of a digest to tell it by."""
    return digest.removeprefix("sha256:")[:12]


def digest_json(value: Any) -> str:
    return digest_bytes(canonical_json(value).encode("utf-8", "surrogatepass"))


def digest_file(path: Path) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return "sha256:" + hasher.hexdigest()


def file_digests(folder: Path, *, ignore: Iterable[str] = ()) -> dict[str, str]:
    """Digest of every file below `folder`, keyed by its relative POSIX path."""
    skipped = set(ignore)
    paths = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.name not in skipped)
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in paths}


def digest_tree(folder: Path, *, ignore: Iterable[str] = ()) -> str:
    """One digest of a folder: names and contents, not times or permissions."""
    return digest_json(file_digests(folder, ignore=ignore))


def neighbours(path: Path, *suffixes: str) -> str:
    """What stands where `path` was looked for, to end a message with."""
    if not path.parent.is_dir():
        return f" (nor is there a folder {path.parent})"
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix in suffixes)
    return f"; {path.parent}/ has {', '.join(names[:5])}{' …' * (len(names) > 5)}" if names else ""


def size_text(num_bytes: float) -> str:
    """A number of bytes for a reader: `6.1 GiB`, `0.4 MiB`."""
    return f"{num_bytes / (1 << 30):.1f} GiB" if num_bytes >= 1 << 28 else f"{num_bytes / (1 << 20):.1f} MiB"


def fsync_dir(folder: Path) -> None:
    """Make renames in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data`: temporary file, fsync, rename. A crash leaves the old or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(raw)
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8", errors="surrogatepass"))


def read_json_lines(path: Path, *, growing: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank: the one reader of JSON lines.

    Of a `growing` file, a last line without its newline is not there yet. Raises: DataError with file and line.
    """
    for number, line in read_lines(path, str(path)):
        if line.strip() and not (growing and not line.endswith("\n")):
            value = parse_json(line, f"{path}:{number}", JSON_PER_LINE)
            if not isinstance(value, dict):
                raise DataError(f"{path}:{number}: got a {type(value).__name__}; expected {JSON_PER_LINE}")
            yield number, value


def read_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    r"""Line number and text, cut at `\n` only: U+2028, U+0085 and others may stand inside a JSON string.

    A byte-order mark is dropped; surrogates come through, since our own files may hold them. Raises: DataError.
    """
    with Path(path).open("rb") as handle:
        for number, raw in enumerate(handle, start=1):
            yield number, decode_utf8(raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw, f"{name}:{number}")


def decode_utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start}; expected UTF-8 text; "
            "convert the file (iconv -t utf-8)"
        ) from None


def parse_json(text: str, where: str, expected: str) -> Any:
    """The value of JSON `text`; an object that names a key twice says two things, so it says nothing. Raises: DataError."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        at = f"{where}:{error.lineno}" if "\n" in text.strip() else where
        raise DataError(f"{at}: not JSON: {error.msg} at column {error.colno}; expected {expected}") from None
    except RecursionError:
        raise DataError(f"{where}: not JSON: nested too deeply; expected {expected}") from None
    except _RepeatedKeyError as error:
        raise DataError(f"{where}: the key {error} stands twice in one object; expected it once; remove one") from None


class _RepeatedKeyError(Exception):
    """The key that an object names twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(json.dumps(next(name for name in names if names.count(name) > 1)))
    return found


def read_record(path: Path, build: Callable[[Any], T], go_on: str) -> T:
    """What `build` makes of the JSON in `path`. Raises: as `named_if_damaged` does."""
    with named_if_damaged(path, go_on):
        return build(read_json(path))


@contextmanager
def named_if_damaged(path: Path, go_on: str) -> Generator[None]:
    """Around reading a file of ours: what is not as it was written is said in one line, with how to go on.

    Raises: DamagedFileError; a PosttrainError from inside as it is.
    """
    try:
        yield
    except PosttrainError:
        raise
    except OSError as error:
        raise DamagedFileError(f"{path} cannot be read: {error.strerror or error}; {go_on}") from error
    except KeyError as error:
        raise DamagedFileError(f"{path} is damaged: {error.args[0]} is missing; {go_on}") from error
    except (ValueError, TypeError, AttributeError, IndexError, RecursionError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise DamagedFileError(f"{path} is damaged: {why}; {go_on}") from error


def write_folder(target: Path, fill: Callable[[Path], None], *, keep: bool = False) -> Mapping[str, str]:
    """Create `target` with the files that `fill(temporary_folder)` writes, all or nothing.

    Returns the digests of its files. An existing `target` is replaced only after the new one is complete; with `keep`, for
    contents that are the same whoever writes them, one that another process has put there meanwhile stays.
    """
    temporary = begin_folder(target)
    try:
        fill(temporary)
        return finish_folder(temporary, target, keep=keep)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def begin_folder(target: Path) -> Path:
    """Where the files of `target` are written until `finish_folder`."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))


def finish_folder(temporary: Path, target: Path, *, keep: bool = False) -> Mapping[str, str]:
    """Put a folder that is complete in the place of `target`; see `write_folder`."""
    digests = file_digests(temporary)
    put_folder(temporary, Path(target), keep=keep)
    return digests


def put_folder(temporary: Path, target: Path, *, keep: bool = False) -> None:
    """`finish_folder` for who knows the digests already."""
    for folder, _, names in os.walk(temporary):
        for name in names:
            with open(Path(folder) / name, "rb") as handle:
                os.fsync(handle.fileno())
        fsync_dir(Path(folder))
    os.chmod(temporary, 0o755)
    _put_in_place(temporary, target, keep)
    fsync_dir(target.parent)


def _put_in_place(temporary: Path, target: Path, keep: bool) -> None:
    """Rename `temporary` to `target`, whatever other processes put there or take away meanwhile."""
    taken: list[Path] = []
    while True:
        try:
            if keep or not target.exists():
                os.replace(temporary, target)
                break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if keep:
                shutil.rmtree(temporary)
                break
        taken.append(Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old.")))
        with suppress(FileNotFoundError):
            os.replace(target, taken[-1] / target.name)
    for folder in taken:
        shutil.rmtree(folder)


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
"""What a file system answers that has no locks for folders."""


@contextmanager
def reading(folder: Path) -> Generator[None]:
    """While this lasts whoever asks by `nobody_reading` leaves the folder where it is; the kernel ends it with its holder.

    A folder that is not there is not held. Raises: RunLockedError if it is being taken away.
    """
    with _locked(Path(folder).expanduser(), fcntl.LOCK_SH, "is being taken away by"):
        yield


@contextmanager
def nobody_reading(folder: Path) -> Generator[None]:
    """While this lasts nobody begins to read it. Raises: RunLockedError naming the processes that do."""
    with _locked(folder, fcntl.LOCK_EX, "is read by"):
        yield


@contextmanager
def _locked(folder: Path, kind: int, why: str) -> Generator[None]:
    with ExitStack() as opened:
        with suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, descriptor)
            _lock(descriptor, folder, kind, why)
        yield


def _lock(descriptor: int, folder: Path, kind: int, why: str) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holders = _lock_holders(descriptor)
        raise RunLockedError(f"{folder} {why} {holders}; stop that first, or wait for its end") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: its file system has no locks, so `posttrain runs prune` does not know who reads it", folder)


def _lock_holders(descriptor: int) -> str:
    """The processes that hold a lock on it, where the system lists them."""
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    except OSError:
        return "another process"
    held = os.fstat(descriptor)
    file = f"{os.major(held.st_dev):02x}:{os.minor(held.st_dev):02x}:{held.st_ino}"  # another file system has the same inodes
    found = {int(words[4]) for words in lines if words[1] == "FLOCK" and words[5] == file} - {0}
    return f"process {', '.join(map(str, sorted(found)))}" if found else "another process"
