"""Tokenised rows on disk, found again by what made them: contents, template, tokenizer, keys and code.

A lookup says why it hit or missed. An entry that does not match its checksum is not used. Knows nothing of formats:
a row is its token sequences plus one JSON value.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.files import digest_bytes, digest_file, digest_json, write_folder
from posttrain.types import TokenSeq

_KEPT = 4
_ABANDONED_S = 24 * 3600.0
_FILES = ("rows.npz", "extras.json")


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

    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("contents", "template", "tokenizer", "code", "keys")}


@dataclass(frozen=True, slots=True)
class Cached:
    """Per row its sequences and a JSON value; `facts` is whatever else was worth keeping, as JSON."""

    rows: list[tuple[list[tuple[tuple[int, ...], tuple[bool, ...]]], int, Any]]
    facts: dict[str, Any]


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


def store(key: CacheKey, rows: Sequence[tuple[Sequence[TokenSeq], Any]], facts: dict[str, Any]) -> str:
    """Write an entry and drop the oldest ones. Returns "" or why nothing was written: a cache never stops a run."""
    try:
        extras = json.dumps({"extras": [extra for _, extra in rows], "facts": facts}, ensure_ascii=True)
    except (TypeError, ValueError) as error:
        return f"; not stored: a column is not JSON ({error})"
    arrays = _pack(rows)

    def fill(folder: Path) -> None:
        (folder / "rows.npz").write_bytes(arrays)
        (folder / "extras.json").write_text(extras)
        checksums = {name: digest_bytes((folder / name).read_bytes()) for name in _FILES}
        (folder / "meta.json").write_text(json.dumps({"parts": key.parts(), "checksums": checksums}))

    try:
        write_folder(key.entry, fill)
        _drop_old(key.folder)
    except OSError as error:
        return f"; not stored: {error.strerror or error}"
    return ""


def _pack(rows: Sequence[tuple[Sequence[TokenSeq], Any]]) -> bytes:
    seqs = [seq for row, _ in rows for seq in row]
    total = sum(len(seq.ids) for seq in seqs)
    buffer = io.BytesIO()
    np.savez(
        buffer,
        ids_N=np.fromiter((i for seq in seqs for i in seq.ids), np.int32, total),
        mask_N=np.packbits(np.fromiter((m for seq in seqs for m in seq.loss_mask), np.bool_, total)),
        lengths=np.array([len(seq.ids) for seq in seqs], np.int64),
        seqs_per_row=np.array([len(row) for row, _ in rows], np.int64),
        lines=np.array([row[0].origin.line if row[0].origin else 0 for row, _ in rows], np.int64),
    )
    return buffer.getvalue()


def _read(entry: Path) -> Cached | None:
    """Raises nothing for damage: a wrong checksum, a missing file or broken JSON is `None`."""
    try:
        meta = json.loads((entry / "meta.json").read_text())
        raw = {name: (entry / name).read_bytes() for name in _FILES}
        if any(digest_bytes(raw[name]) != meta["checksums"][name] for name in _FILES):
            return None
        extras = json.loads(raw["extras.json"])
        with np.load(io.BytesIO(raw["rows.npz"]), allow_pickle=False) as arrays:
            return Cached(_unpack(arrays, extras["extras"]), extras["facts"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _unpack(arrays: Any, extras: list[Any]) -> list[tuple[list[tuple[tuple[int, ...], tuple[bool, ...]]], int, Any]]:
    ids_N = arrays["ids_N"].tolist()
    mask_N = np.unpackbits(arrays["mask_N"], count=len(ids_N)).astype(np.bool_).tolist()
    lengths, lines = iter(arrays["lengths"].tolist()), arrays["lines"].tolist()
    rows = []
    at = 0
    for count, line, extra in zip(arrays["seqs_per_row"].tolist(), lines, extras, strict=True):
        seqs = []
        for _ in range(count):
            end = at + next(lengths)
            seqs.append((tuple(ids_N[at:end]), tuple(mask_N[at:end])))
            at = end
        rows.append((seqs, line, extra))
    return rows


def _why_missing(key: CacheKey) -> str:
    entries = _entries(key.folder)
    if not entries:
        return "first time"
    try:
        last = json.loads((entries[-1] / "meta.json").read_text())["parts"]
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
    found = [path for path in folder.glob("*") if not path.name.startswith(".") and (path / "meta.json").exists()]
    return sorted(found, key=lambda path: ((path / "meta.json").stat().st_mtime_ns, path.name))


def _drop_old(folder: Path) -> None:
    """The oldest entries, and what a killed process left half-written, once nobody can still be writing it."""
    abandoned = [path for path in folder.glob(".*") if time.time() - path.stat().st_mtime > _ABANDONED_S]
    for path in (*_entries(folder)[:-_KEPT], *abandoned):
        shutil.rmtree(path, ignore_errors=True)


def rows_digest(rows: Sequence[tuple[Sequence[TokenSeq], Any]]) -> str:
    """Digest of ids, masks and extras: what a run is trained on, whatever file it came from."""
    hasher = hashlib.sha256()
    for seqs, extra in rows:
        hasher.update(_row_bytes(seqs, extra))
    return "sha256:" + hasher.hexdigest()


def row_digest(seqs: Sequence[TokenSeq], extra: Any) -> bytes:
    """Of one row."""
    return hashlib.sha256(_row_bytes(seqs, extra)).digest()


def _row_bytes(seqs: Sequence[TokenSeq], extra: Any) -> bytes:
    parts = [np.array(seq.ids, np.int32).tobytes() + bytes(seq.loss_mask) + b"|" for seq in seqs]
    return b"".join(parts) + json.dumps(extra, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n"
