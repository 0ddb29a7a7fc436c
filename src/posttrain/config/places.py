"""What a path in a configuration names: a file here, one elsewhere, or something of the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

LOCAL_SUFFIXES = frozenset(
    {".jsonl", ".json", ".parquet", ".csv", ".jinja", ".jinja2", ".j2", ".gz", ".zst", ".arrow", ".txt"}
)


def is_an_adapter(folder: str) -> str:
    """Why the folder of an adapter is no model, and what to do."""
    return (
        f"{folder} is an adapter, not a model; merge it first: posttrain merge {folder} --out DIR "
        "(a finished stage has its merged model beside it, in `model`)"
    )


def is_uri(path: str) -> bool:
    """Whether `path` names a file elsewhere: `https://…`, `s3://…`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def looks_local(path: str) -> bool:
    """Whether `path` can only be a file or folder: `./x`, `/x`, `~/x`, `data.jsonl`."""
    return not is_uri(path) and (path.startswith((".", "/", "~")) or Path(path).suffix.lower() in LOCAL_SUFFIXES)


def resolve_path(path: str, folder: Path) -> str:
    """`path` relative to `folder` where it exists there or looks local; a hub id is returned as it is."""
    local = folder / os.path.expanduser(path)
    return str(local.resolve()) if path and (looks_local(path) or os.path.exists(local)) else path
