"""Rows from files and the hub, each with where it came from.

Knows nothing of what the columns mean.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import hub
from posttrain.config.datasets import DatasetKeys
from posttrain.config.places import is_uri
from posttrain.data.fetch import COMPRESSIONS, fetch, name_inside
from posttrain.data.prompt_format import write_prompts
from posttrain.errors import DataError
from posttrain.files import JSON_PER_LINE, decode_utf8, parse_json, read_lines
from posttrain.types import Origin
from posttrain.uris import without_secrets

_ROWS_PER_BATCH = 1000

SourceRow = tuple[Origin, dict[str, Any]]

BLANK = object()
"""What a reader yields for a line without a row."""


@dataclass(frozen=True, slots=True)
class Source:
    """The rows of one dataset entry. `blank_lines` were skipped; `digest` covers the contents read.

    `invented_nulls` counts rows from which nulls were taken that Arrow's nested types had put there.
    """

    rows: list[SourceRow]
    blank_lines: tuple[Origin, ...]
    digest: str
    invented_nulls: int = 0


def an_object(value: Any, origin: Origin) -> dict[str, Any]:
    """A row as it was read. Raises: DataError for anything else."""
    if not isinstance(value, dict):
        raise DataError(f"{origin}: a row is {_json_type(value)}; expected an object with named columns")
    return value


def prepared(rows: list[SourceRow], source: DatasetKeys, *, is_first: bool = True) -> tuple[list[SourceRow], int]:
    """Rows under our names, with prompts written, and in how many of them Arrow's types had put nulls. Raises: DataError.

    Among the `first` rows each of `columns` must be found.
    """
    if is_first:
        check_columns(rows, source)
    rows = write_prompts(_rename(rows, source), source)
    has_types = not is_local(source.path) or Path(name_inside(source.path)).suffix.lower() == ".parquet"
    return _without_invented_nulls(rows) if has_types else (rows, 0)


def fetched(path: str) -> Path:
    """Raises: DataError before anything is fetched that could not be read."""
    inside = Path(name_inside(path)).suffix.lower()
    if inside not in READERS:
        raise DataError(
            f"{short_path(path)}: got a {inside or 'nameless'} file; expected one of {', '.join(READERS)}, compressed or not"
        )
    return fetch(path if is_uri(path) else str(_there(path)))


def is_local(path: str) -> bool:
    """Whether `path` names a file (present, missing or elsewhere) and not a hub dataset."""
    local = Path(path).expanduser()
    suffixes = {*READERS, *COMPRESSIONS}
    return local.exists() or path.startswith((".", "/", "~")) or local.suffix.lower() in suffixes or path.count("/") > 1


def short_path(path: Path | str) -> str:
    """`path` as messages show it: relative to the working directory when it is below it; a URI as it is."""
    if is_uri(str(path)):
        return without_secrets(str(path))
    resolved = Path(path).expanduser().resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)


def _there(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(path.name, _names(path.parent), n=1)
        hint = f"did you mean {near[0]}?" if near else "check `datasets: path` (relative to the YAML)"
        raise DataError(f"{short_path(path)}: no such file; expected a JSONL, JSON, Parquet or CSV file; {hint}")
    return path


def checked(name: str) -> Path:
    path = _there(name)
    if path.is_dir():
        raise DataError(f"{short_path(path)}: is a folder; expected a file; name one of {_names(path)[:5]}")
    if path.suffix.lower() not in READERS:
        raise DataError(
            f"{short_path(path)}: got a {path.suffix or 'nameless'} file; expected one of {', '.join(READERS)}"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{short_path(path)}: the file is empty; expected at least one row")
    return path


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


def check_columns(rows: Iterable[SourceRow], source: DatasetKeys) -> None:
    """Raises: DataError for a column that no row has; reads on until all are found."""
    missing, first = dict(source.columns), None
    for _, row in rows:
        first = row if first is None else first
        missing = {ours: name for ours, name in missing.items() if not (name in row or inside(row, name) is not None)}
        if not missing:
            return
    if first is not None and missing:
        ours, theirs = next(iter(missing.items()))
        found = ", ".join(f"`{name}`" for name in first)
        raise DataError(
            f"{source.path}: `columns: {{{ours}: {theirs}}}` names a column that no row has; found {found}; "
            "write it as our name → the file's name"
        )


def _rename(rows: list[SourceRow], source: DatasetKeys) -> list[SourceRow]:
    """All at once, so that two columns can be swapped. Raises: DataError where a column would be lost."""
    names = {theirs: ours for ours, theirs in source.columns.items()}
    if len(names) < len(source.columns):
        twice = next(theirs for theirs in names if list(source.columns.values()).count(theirs) > 1)
        raise DataError(f"{source.path}: `columns` reads `{twice}` under two names; expected one of them")
    if not names:
        return rows
    return [(origin, _renamed(row, names, origin, source)) for origin, row in rows]


def _renamed(row: dict[str, Any], names: dict[str, str], origin: Origin, source: DatasetKeys) -> dict[str, Any]:
    """A column is taken away under its old name; what lies inside one stays there too."""
    given = {ours: row[theirs] if theirs in row else inside(row, theirs) for theirs, ours in names.items()}
    given = {ours: value for ours, value in given.items() if value is not None or source.columns[ours] in row}
    lost = next((name for name, value in given.items() if value is not None and row.get(name) is not None and name not in names), None)  # fmt: skip
    if lost is not None:
        raise DataError(
            f"{origin}: `columns: {{{lost}: {source.columns[lost]}}}` would overwrite the row's own `{lost}`; "
            f"rename that one too (`columns: {{old_{lost}: {lost}}}`), or take it out"
        )
    return {name: value for name, value in row.items() if name not in names} | given


def inside(row: Mapping[str, Any], path: str) -> Any:
    """What `outer.inner` names in a row; None where there is nothing."""
    value: Any = row if "." in path else None
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _without_invented_nulls(rows: list[SourceRow]) -> tuple[list[SourceRow], int]:
    """Conversations and tools without null fields: Arrow gives every struct of a column the fields of all of them."""
    kept = [
        (origin, {name: _bare(value) if _is_nested(name, value) else value for name, value in row.items()})
        for origin, row in rows
    ]
    return kept, sum(before[1] != after[1] for before, after in zip(rows, kept, strict=True))


def _is_nested(name: str, value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        return False
    return name == "tools" or all("role" in part or "from" in part for part in value)


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _bare(inner) for name, inner in value.items() if inner is not None}
    return [_bare(inner) for inner in value] if isinstance(value, list) else value


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", int: "a number", float: "a number", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _read_jsonl(path: Path) -> Iterator[tuple[Origin, Any]]:
    name = short_path(path)
    return json_rows(read_lines(path, name), name)


def json_rows(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[Origin, Any]]:
    """A row of each line of `name`."""
    for number, line in lines:
        origin = Origin(name, number)
        yield origin, parse_json(line, str(origin), JSON_PER_LINE) if line.strip() else BLANK


def _read_json(path: Path) -> Iterable[tuple[Origin, Any]]:
    """A list of rows, or an object with the list under `data`; `line` is the row's number. JSONL is recognised."""
    name = short_path(path)
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if _is_jsonl(raw):
        return _read_jsonl(path)
    value = parse_json(decode_utf8(raw, f"{name}:1"), name, "a list of objects, or one object per line")
    rows = value.get("data", value) if isinstance(value, dict) else value
    if isinstance(rows, dict):  # a JSONL file of one row
        rows = [rows]
    if not isinstance(rows, list):
        raise DataError(f'{name}: got {_json_type(rows)}; expected a list of objects or {{"data": [...]}}')
    return ((Origin(name, number), row) for number, row in enumerate(rows, start=1))


def _is_jsonl(raw: bytes) -> bool:
    """Whether the first line is an object by itself, and others follow."""
    first, _, rest = raw.lstrip().partition(b"\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_parquet(path: Path) -> Iterator[tuple[Origin, Any]]:
    return parquet_rows(path, short_path(path))


def parquet_rows(file: Any, name: str, start: int = 0) -> Iterator[tuple[Origin, Any]]:
    """Rows of a path or an open file from row `start` on, a batch at a time; row groups before it are not read."""
    import pyarrow
    import pyarrow.parquet

    try:
        table, first = pyarrow.parquet.ParquetFile(file), 0
        for group in range(table.num_row_groups):
            number, first = first, first + table.metadata.row_group(group).num_rows
            for batch in table.iter_batches(_ROWS_PER_BATCH, row_groups=[group]) if first > start else ():
                for row in batch.to_pylist():
                    number += 1
                    if number > start:
                        yield Origin(name, number), row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not Parquet: {first_line(error)}; expected a Parquet file") from None


def _read_csv(path: Path) -> Iterator[tuple[Origin, Any]]:
    name = short_path(path)
    return csv_rows(read_lines(path, name), name)


def csv_rows(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[Origin, Any]]:
    """Every value is a string; empty fields are dropped."""
    csv.field_size_limit(1 << 30)
    reader = csv.DictReader((line for _, line in lines), strict=True)
    try:
        for row in reader:
            origin = Origin(name, reader.line_num)
            if None in row:
                columns = len(reader.fieldnames or ())
                raise DataError(
                    f"{origin}: got {columns + len(row[None])} fields; expected {columns}, as in the header"
                )
            yield origin, {key: value for key, value in row.items() if value not in (None, "")}
    except csv.Error as error:
        raise DataError(
            f"{name}:{reader.line_num + 1}: not CSV: {error}; expected a header and quoted fields"
        ) from None


READERS: dict[str, Callable[[Path], Iterable[tuple[Origin, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
"""File name ending → its reader. A reader yields `BLANK` for a blank line."""


def hub_table(source: DatasetKeys, *, streaming: bool) -> Any:
    """The split, as `datasets` gives it. Raises: DataError."""
    offline = hub.prepare()
    import datasets
    import datasets.config as client

    client.HF_HUB_OFFLINE = client.HF_HUB_OFFLINE or bool(offline)
    try:
        return datasets.load_dataset(
            source.path, source.name, split=source.split, data_files=list(source.data_files) or None,
            streaming=streaming,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - the hub's client: each HTTP library has errors of its own
        raise DataError(
            f"{source.path}: not a local file, and the hub could not give it ({offline or first_line(error)}); "
            "check the name, `split` and `name`, go online, or give a local file"
        ) from None


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(".")
