"""Tokenised rows on disk, found again by what made them: contents, template, tokenizer, keys and code.

A lookup says why it hit or missed. An entry that does not match its checksums is not used. Knows nothing of formats:
a row is its token sequences plus one JSON value. Rows are written as they come and read when they are asked for, so that nobody
holds all of them and the processes of a machine share the system's copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
import time
import weakref
import zipfile
from array import array
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from posttrain.errors import DataError
from posttrain.files import begin_folder, digest_bytes, digest_file, digest_json, put_folder
from posttrain.types import Origin, TokenSeq

log = logging.getLogger(__name__)

_KEPT = 4
_ABANDONED_S = 24 * 3600.0
_ID = np.dtype(np.int32)
_TOKENS = ("ids.bin", "mask.bin", "extras.jsonl")
"""What grows with the tokens: ids, masks (eight tokens a byte, each sequence on whole bytes), a line of JSON for each row."""
_INDEX, _FACTS, _META = "index.npz", "facts.json", "meta.json"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """`place` says which data (paths and stage), the others what made the entry."""

    place: Any
    contents: str
    template: str
    tokenizer: str
    code: str
    keys: dict[str, Any]

    @property
    def folder(self) -> Path:
        return cache_root() / digest_json(self.place).removeprefix("sha256:")[:16]

    @property
    def entry(self) -> Path:
        return self.folder / digest_json(self.parts()).removeprefix("sha256:")[:32]

    @property
    def shelf(self) -> Path:
        """Where parts of the entry lie until it is whole; dropped as abandoned when nobody goes on with them."""
        return self.folder / f".parts-{self.entry.name}"

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("contents", "template", "tokenizer", "code", "keys")}


class RowFile:
    """The bytes of a file by their place, also once it was taken away. One that was shortened says so; a page of it that is mapped would end
    the process without a word."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)

    def read(self, start: int, end: int) -> bytes:
        """Raises: DataError where they are not there."""
        try:
            raw = os.pread(self._handle, end - start, start)
        except OSError as error:
            raise self._unreadable(error.strerror or str(error)) from error
        if len(raw) < end - start:
            raise self._unreadable(
                f"got {len(raw)} of the {end - start} bytes from byte {start:,} on; it was shortened"
            )
        return raw

    def _unreadable(self, why: str) -> DataError:
        return DataError(
            f"{self._path}: tokenised rows cannot be read: {why}; start again, which makes them anew, and let nobody else change "
            "files in that folder"
        )


@dataclass(frozen=True, slots=True)
class Cached:
    """The rows of an entry, read when they are asked for; `facts` is whatever else was worth keeping, as JSON.

    files: by name. starts: per sequence where its ids and its mask begin, per row its first sequence and
    where its extra begins, each with one end more than there are. `odd` are extras that are no JSON, by row.
    """

    files: dict[str, RowFile]
    starts: dict[str, np.ndarray]
    lines: np.ndarray
    facts: dict[str, Any]
    odd: dict[int, Any] = field(default_factory=dict[int, Any])

    def __len__(self) -> int:
        return len(self.lines)

    def seqs(self, row: int, path: str) -> tuple[TokenSeq, ...]:
        """The sequences of a row of the file `path`."""
        first, end = self.starts["seqs"][row : row + 2].tolist()
        origin = Origin(path, int(self.lines[row]))
        return tuple(TokenSeq(*self._seq(number), origin) for number in range(first, end))

    def extra(self, row: int) -> Any:
        first, end = self.starts["extras"][row : row + 2].tolist()
        return self.odd[row] if row in self.odd else json.loads(self.files["extras.jsonl"].read(first, end))

    def num_tokens(self, row: int) -> int:
        """Of all sequences of a row."""
        first, end = self.starts["seqs"][row : row + 2].tolist()
        return int(self.starts["ids"][end] - self.starts["ids"][first])

    def _seq(self, number: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        start, end = self.starts["ids"][number : number + 2].tolist()
        first, last = self.starts["mask"][number : number + 2].tolist()
        ids = np.frombuffer(self.files["ids.bin"].read(start * _ID.itemsize, end * _ID.itemsize), _ID)
        packed = np.frombuffer(self.files["mask.bin"].read(first, last), np.uint8)
        bits = np.unpackbits(packed, count=end - start)
        return tuple(ids.tolist()), tuple(bits.astype(np.bool_).tolist())


def cache_root() -> Path:
    """`$POSTTRAIN_CACHE`, or ~/.cache/posttrain/data."""
    given = os.environ.get("POSTTRAIN_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "posttrain" / "data"


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of everything that decides text → ids, template apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # left over from a call or a file, and set anew by every call: no part of text → ids
        backend.no_padding()
        backend.no_truncation()
    body = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return digest_json([type(tokenizer).__name__, digest_bytes(body.encode("utf-8", "surrogatepass")), special])


@lru_cache(maxsize=1)
def cache_code_digest() -> str:
    """Digest of this package's source, for any of it may make rows, and of the libraries that render and tokenise."""
    own = {path.name: digest_file(path) for path in Path(__file__).parent.glob("*.py")}
    return digest_json([own, {name: version(name) for name in ("transformers", "tokenizers", "jinja2")}])


def lookup(key: CacheKey) -> tuple[Cached | None, str]:
    """The entry, and `hit` or why there is none."""
    try:
        if key.entry.exists():
            found = _read(key.entry)
            return (found, "hit") if found else (None, "miss: the entry was damaged, rebuilt")
        return None, f"miss: {_why_missing(key)}"
    except OSError as error:
        return None, f"miss: the cache cannot be read ({error.strerror or error})"


@contextmanager
def alone(key: CacheKey) -> Generator[None]:
    """Inside, no other process of this machine tokenises the same data: the first one writes, the others read."""
    with ExitStack() as opened:
        try:
            key.folder.mkdir(parents=True, exist_ok=True)
            handle = opened.enter_context(open(key.folder / ".lock", "w"))
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("%s: another process tokenises the same data: waiting for it", key.folder)
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            log.debug("%s: not locked: %s", key.folder, error)  # then each process writes an entry of its own
        yield


class RowWriter:
    """Writes rows as they come. `read` ends it: what was written is then the entry of `key`, or nobody's.

    Nobody's are rows without a key, in a cache that cannot be written, or with a column that is no JSON; they last as long as their
    files are open.
    """

    def __init__(self, key: CacheKey | None) -> None:
        self._key, self._hasher = key, hashlib.sha256()
        self.why_not_kept = ""
        self._folder = self._begin()
        self._files: dict[str, BinaryIO] = {name: open(self._folder / name, "wb") for name in _TOKENS}  # noqa: SIM115
        self._checksums = {name: hashlib.sha256() for name in _TOKENS}
        self._index = {name: array("q") for name in ("lengths", "seqs_per_row", "extras", "lines")}
        self._odd: dict[int, Any] = {}

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # what could not be written has been said
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # not there any more where it has become the entry

    def add(self, seqs: Sequence[TokenSeq], extra: Any) -> None:
        """Raises: DataError where there is no room."""
        try:
            line = json.dumps(extra, ensure_ascii=True)
        except (TypeError, ValueError) as error:
            self.why_not_kept, line = f"; not stored: a column is not JSON ({error})", "null"
            self._odd[len(self._index["lines"])] = extra
        self._hasher.update(_row_bytes(seqs, extra))
        for seq in seqs:
            self._write("ids.bin", np.array(seq.ids, _ID).tobytes())
            self._write("mask.bin", np.packbits(np.array(seq.loss_mask, np.bool_)).tobytes())
            self._index["lengths"].append(len(seq.ids))
        self._write("extras.jsonl", f"{line}\n".encode())
        self._index["extras"].append(len(line) + 1)
        self._index["seqs_per_row"].append(len(seqs))
        self._index["lines"].append(seqs[0].origin.line if seqs[0].origin else 0)

    def read(self, facts: dict[str, Any]) -> Cached:
        """All rows, with `facts` and the digest of the rows. Raises: DataError where there is no room."""
        facts = {**facts, "rows_digest": "sha256:" + self._hasher.hexdigest()}
        with self._saying_why():
            for file in self._files.values():
                file.close()
            checksums = {name: "sha256:" + hasher.hexdigest() for name, hasher in self._checksums.items()}
            index = io.BytesIO()
            np.savez(
                index, allow_pickle=False, **{name: np.array(values, np.int64) for name, values in self._index.items()}
            )
            for name, raw in ((_INDEX, index.getvalue()), (_FACTS, json.dumps(facts).encode())):
                (self._folder / name).write_bytes(raw)
                checksums[name] = digest_bytes(raw)
            found = _opened(self._folder, self._odd)
        if self._key is not None and not self.why_not_kept:
            self._keep(self._key, checksums)
        return found

    def _keep(self, key: CacheKey, checksums: dict[str, str]) -> None:
        """Make the folder the entry of `key`. What is open stays so, whether that can be done or not."""
        try:
            (self._folder / _META).write_text(json.dumps({"parts": key.parts(), "checksums": checksums}))
            put_folder(self._folder, key.entry)
            _drop_old(key.folder)
        except OSError as error:
            self.why_not_kept = f"; not stored: {error.strerror or error}"

    def _begin(self) -> Path:
        if self._key is not None:
            try:
                return begin_folder(self._key.entry)
            except OSError as error:
                self.why_not_kept = f"; not stored: {error.strerror or error}"
        return Path(tempfile.mkdtemp(prefix="posttrain-rows-"))

    def _write(self, name: str, raw: bytes) -> None:
        with self._saying_why():
            self._files[name].write(raw)
        self._checksums[name].update(raw)

    @contextmanager
    def _saying_why(self) -> Generator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._folder.parent}: tokenised rows cannot be written: {error.strerror or error}; they take some 5 bytes a token; "
                "make room, or name a folder with room in POSTTRAIN_CACHE"
            ) from error


def _read(entry: Path) -> Cached | None:
    """Raises nothing for damage: a wrong checksum, a missing file or broken JSON is `None`."""
    try:
        meta = json.loads((entry / _META).read_text())
        names = (*_TOKENS, _INDEX, _FACTS)
        if any(digest_file(entry / name) != meta["checksums"][name] for name in names):
            return None
        return _opened(entry, {})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _opened(folder: Path, odd: dict[int, Any]) -> Cached:
    with np.load(folder / _INDEX, allow_pickle=False) as index:
        lengths, lines = index["lengths"], index["lines"]
        counts = {"ids": lengths, "mask": -(-lengths // 8), "seqs": index["seqs_per_row"], "extras": index["extras"]}
    starts = {name: np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64) for name, sizes in counts.items()}
    files = {name: RowFile(folder / name) for name in _TOKENS}
    return Cached(files, starts, lines, json.loads((folder / _FACTS).read_text()), odd)


def _why_missing(key: CacheKey) -> str:
    entries = _entries(key.folder)
    if not entries:
        return "first time"
    try:
        last = json.loads((entries[-1] / _META).read_text())["parts"]
    except (OSError, ValueError, KeyError):
        return "the last entry was damaged"
    now = key.parts()
    reasons = [
        f"{name} changed" for name in ("contents", "template", "tokenizer", "code") if last.get(name) != now[name]
    ]
    old, new = last.get("keys", {}), now["keys"]
    changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return "; ".join(reasons + ([f"keys changed: {', '.join(changed)}"] if changed else [])) or "the entry was removed"


def _entries(folder: Path) -> list[Path]:
    """Complete entries, oldest first."""
    found = [path for path in folder.glob("*") if not path.name.startswith(".") and (path / _META).exists()]
    return sorted(found, key=lambda path: ((path / _META).stat().st_mtime_ns, path.name))


def _drop_old(folder: Path) -> None:
    """The oldest entries, and what a killed process left half-written, once nobody can still be writing it."""
    abandoned = [path for path in folder.glob(".*") if time.time() - path.stat().st_mtime > _ABANDONED_S]
    for path in (*_entries(folder)[:-_KEPT], *abandoned):
        shutil.rmtree(path, ignore_errors=True)


def row_digest(seqs: Sequence[TokenSeq], extra: Any) -> bytes:
    """Of one row."""
    return hashlib.sha256(_row_bytes(seqs, extra)).digest()


def _row_bytes(seqs: Sequence[TokenSeq], extra: Any) -> bytes:
    parts = [np.array(seq.ids, np.int32).tobytes() + bytes(seq.loss_mask) + b"|" for seq in seqs]
    return b"".join(parts) + json.dumps(extra, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n"
