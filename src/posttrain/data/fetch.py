"""Files that lie elsewhere (https://, s3:// and whatever fsspec reads) or are compressed, as plain files on this machine.

A copy is kept in the data cache and taken again only while the server says that the file is the same one.
"""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from posttrain.config.places import is_uri
from posttrain.data.cache import cache_root
from posttrain.errors import DataError, MissingExtraError
from posttrain.files import digest_file, digest_json
from posttrain.uris import without_secrets

_PIECE = 1 << 20


def name_inside(path: str) -> str:
    """The file's name without its folder, a query and the ending of a compression. Raises: DataError."""
    try:
        name = PurePosixPath(urlsplit(path).path if is_uri(path) else path).name
    except ValueError as error:
        raise DataError(f"{without_secrets(path)}: {error}; expected https://HOST/FILE") from None
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in COMPRESSIONS else name


def needs_fetching(path: str) -> bool:
    """Whether rows cannot be read from `path` itself."""
    return is_uri(path) or Path(path).suffix.lower() in COMPRESSIONS


def fetch(path: str) -> Path:
    """The plain file, in the cache. Raises: DataError, MissingExtraError."""
    with _explained(path):
        version = _version(path)
        target = cache_root() / "files" / digest_json([path, version]).removeprefix("sha256:")[:16] / name_inside(path)
        if version is None or not target.exists():
            _copy(path, target)
    return target


def stream_lines(path: str) -> Iterator[bytes]:
    """The lines of a file here or elsewhere, compressed or not, as they come. Raises: DataError, MissingExtraError."""
    import fsspec

    rest = b""
    with _explained(path), fsspec.open(path, "rb") as source:
        for piece in _parts_of(path)(cast("BinaryIO", source)):
            *lines, rest = (rest + piece).split(b"\n")
            yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What goes wrong in reading `path`, as a typed error of one line."""
    try:
        yield
    except ImportError as error:
        raise MissingExtraError(f"{without_secrets(path)}: {error}") from None
    except ValueError as error:  # fsspec's, of a protocol that it does not know
        raise DataError(
            f"{without_secrets(path)}: {error}; expected https://, s3://, gs:// or another of fsspec's"
        ) from None
    except Exception as error:  # noqa: BLE001 - each driver and each compression has errors of its own
        raise DataError(
            f"{without_secrets(path)}: could not be read: {without_secrets(_why(error))}; "
            "check the name, the network, that you may read it, and that it is whole"
        ) from None


def _why(error: BaseException) -> str:
    """The first line of what went wrong; fsspec says of a web server's answer only whose it was."""
    status = getattr(error.__cause__, "status", None)
    if isinstance(status, int):
        return f"the server answered {status}"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


_SAYS_WHEN = frozenset(
    {"etag", "md5", "contentmd5", "md5hash", "digest", "checksum", "crc", "crc32c", "sha", "sha256", "generation", "blobid", "xethash",
     "lastmodified", "lastmodifieddate", "mtime", "modified", "modify", "modificationtime", "updated", "created", "lastwritetime", "datetime"}
)  # fmt: skip
"""What drivers call that which is another one once the file is."""


def _version(path: str) -> str | None:
    """What changes when the file does: a digest of its contents here, what the server says elsewhere; None if that says nothing."""
    if not is_uri(path):
        return digest_file(Path(path))
    import fsspec

    system, inside = fsspec.url_to_fs(path)
    system.invalidate_cache()
    told = cast("dict[str, Any]", system.info(inside))
    named = {key.lower().replace("-", "").replace("_", ""): str(value) for key, value in told.items() if value}
    known = {key: value for key, value in named.items() if key in _SAYS_WHEN}
    return digest_json(known | {"size": named.get("size", "")}) if known else None


def _copy(path: str, target: Path) -> None:
    """Download and unpack; the file is in its place whole or not at all."""
    import fsspec

    parts = _parts_of(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as into:
        try:
            with fsspec.open(path, "rb") as source:
                for part in parts(cast("BinaryIO", source)):
                    into.write(part)
            into.flush()
            os.replace(into.name, target)
        except BaseException:
            Path(into.name).unlink()
            raise


def _parts_of(path: str) -> Callable[[BinaryIO], Iterator[bytes]]:
    return COMPRESSIONS.get(PurePosixPath(urlsplit(path).path if is_uri(path) else path).suffix.lower(), _as_it_is)


def _as_it_is(source: BinaryIO) -> Iterator[bytes]:
    while part := source.read(_PIECE):
        yield part


def _gunzipped(source: BinaryIO) -> Iterator[bytes]:
    with gzip.open(source) as inside:
        yield from _as_it_is(cast("BinaryIO", inside))


def _unzstd(source: BinaryIO) -> Iterator[bytes]:
    """Frame after frame. Raises: EOFError where the last one is cut off, which zstandard's own reader takes for the end."""
    try:
        import zstandard
    except ImportError:
        raise ImportError("zstd is not here; pip install zstandard") from None
    start = zstandard.ZstdDecompressor().decompressobj
    frame, begun = start(), False
    for piece in _as_it_is(source):
        while piece:
            yield frame.decompress(piece)
            begun, piece = not frame.eof, frame.unused_data if frame.eof else b""
            frame = start() if frame.eof else frame
    if begun:
        raise EOFError("the compressed file ends in the middle of it")


COMPRESSIONS = {".gz": _gunzipped, ".zst": _unzstd}
"""Ending → the parts of what is inside."""
