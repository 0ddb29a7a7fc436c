"""What a file of rows was made from, in a record beside it: `rows.jsonl` has `rows.jsonl.origin.json`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.files import digest_file, read_record, write_json
from posttrain.names import told_apart

log = logging.getLogger(__name__)

SUFFIX = ".origin.json"
_FILE = "file"


def write_origin(path: Path, record: Mapping[str, Any]) -> None:
    """Bound to the bytes that `path` has now. It names no place, so that the folder may be moved."""
    write_json(Path(f"{path}{SUFFIX}"), {_FILE: digest_file(path), **record})


def remove_rows(path: Path) -> None:
    """With their origin: rows of an earlier choice are not left beside the report of one that leaves none."""
    path.unlink(missing_ok=True)
    Path(f"{path}{SUFFIX}").unlink(missing_ok=True)


def data_origins(paths: Sequence[str]) -> dict[str, Any]:
    """File name (with folders where two have one name) → record, of the files that have one. One that was changed since has none any more, which is said."""
    found: dict[str, Any] = {}
    for given, name in told_apart(paths).items():
        path = Path(given)
        beside = Path(f"{path}{SUFFIX}")
        if not (path.is_file() and beside.is_file()):
            continue
        record = read_record(beside, dict, f"delete {beside} to train without knowing where the rows are from")
        if record.get(_FILE) == digest_file(path):
            found[name] = record
        else:
            log.warning("%s was changed since %s was written: its rows have no known origin", path, beside.name)
    return found
