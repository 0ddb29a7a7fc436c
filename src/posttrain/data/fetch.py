"""Files that lie elsewhere (https://, s3:// and whatever fsspec reads) or are compressed, as plain files on this machine.

A copy is kept in the data cache and taken again only while the server says that the file is the same one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from posttrain.config.places import is_uri
from posttrain.data.cache import cache_root
from posttrain.errors import DataError, MissingExtraError
from posttrain.files import digest_file, digest_json
from posttrain.uris import without_secrets

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Ending → fsspec's name of what undoes it."""


def name_inside(path: str) -> str:
    """The file's name without its folder, a query and the ending of a compression."""
    name = PurePosixPath(urlsplit(path).path if is_uri(path) else path).name
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in COMPRESSIONS else name


def needs_fetching(path: str) -> bool:
    """Whether rows cannot be read from `path` itself."""
    return is_uri(path) or Path(path).suffix.lower() in COMPRESSIONS


def fetch(path: str) -> Path:
    """The plain file, in the cache. Raises: DataError, MissingExtraError."""
    try:
        version = _version(path)
        target = cache_root() / "files" / digest_json([path, version]).removeprefix("sha256:")[:16] / name_inside(path)
        if not target.exists():
            _copy(path, target)
    except ImportError as error:
        raise MissingExtraError(f"{without_secrets(path)}: {error}") from None
    except ValueError as error:  # fsspec's, of a protocol that it does not know
        raise DataError(
            f"{without_secrets(path)}: {error}; expected https://, s3://, gs:// or another of fsspec's"
        ) from None
    except (OSError, EOFError) as error:
        what = str(error).strip() or type(error).__name__
        raise DataError(
            f"{without_secrets(path)}: could not be read: {without_secrets(what)}; check the name, the network and that you may read it"
        ) from None
    return target


def _version(path: str) -> str:
    """What changes when the file does: a digest of its contents here, what the server says elsewhere."""
    if not is_uri(path):
        return digest_file(Path(path))
    import fsspec

    system, inside = fsspec.url_to_fs(path)
    system.invalidate_cache()
    told = cast("dict[str, Any]", system.info(inside))
    known = {
        key: str(told[key])
        for key in ("ETag", "etag", "LastModified", "mtime", "created", "size", "last_modified")
        if told.get(key) is not None
    }
    return digest_json(known)


def _copy(path: str, target: Path) -> None:
    """Download and unpack; the file is in its place whole or not at all."""
    import fsspec

    compression = COMPRESSIONS.get(PurePosixPath(urlsplit(path).path).suffix.lower())
    if compression == "zstd":
        _need_zstd()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as into:
        try:
            with fsspec.open(path, "rb", compression=compression) as source:
                shutil.copyfileobj(cast("BinaryIO", source), into)
        except BaseException:
            Path(into.name).unlink()
            raise
    os.replace(into.name, target)


def _need_zstd() -> None:
    """Raises: ImportError with what to install."""
    from fsspec.compression import compr

    if "zstd" not in compr:
        raise ImportError("zstd is not here; pip install zstandard")
