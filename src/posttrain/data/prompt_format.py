"""`prompt_format`: a prompt written as plain text from the columns of a row."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import Any

from posttrain.config.datasets import DatasetKeys
from posttrain.errors import DataError
from posttrain.types import Origin

_COLUMN = "prompt"
_TURN = "instruction"
"""The column that is written where rows are `alpaca`: a user's turn, which the chat template renders."""


def write_prompts(
    rows: list[tuple[Origin, dict[str, Any]]], source: DatasetKeys
) -> list[tuple[Origin, dict[str, Any]]]:
    """Each row with its `prompt`, without the columns that are read by a format. Raises: DataError."""
    if not source.prompt_format:
        return rows
    formats = [(text, columns_of(text)) for text in source.prompt_format]
    read = {name for _, names in formats for name in names}
    column = _TURN if source.type == "alpaca" else _COLUMN
    return [(origin, _written(origin, row, formats, read, column)) for origin, row in rows]


def columns_of(text: str) -> list[str]:
    """The columns that a format names. Raises: DataError for one that Python's str.format cannot read."""
    try:
        parts = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise DataError(
            f"prompt_format: {error}; expected columns in braces, and {{{{ }}}} for braces themselves"
        ) from None
    for name, spec, conversion in parts:
        if not name.isidentifier() or spec or conversion:
            raise DataError(
                f"prompt_format: {{{name}}} names no column; expected a name alone, and {{{{ }}}} for braces"
            )
    return [name for name, _, _ in parts]


def _written(
    origin: Origin, row: dict[str, Any], formats: Sequence[tuple[str, list[str]]], read: set[str], column: str
) -> dict[str, Any]:
    if row.get(column) is not None and column not in read:
        raise DataError(
            f"{origin}: the row has a `{column}` of its own, which prompt_format would overwrite; take prompt_format out, "
            f"or name {{{column}}} in it"
        )
    for text, names in formats:
        values = {name: row.get(name) for name in names}
        if all(isinstance(value, str) and value for value in values.values()):
            kept = {name: value for name, value in row.items() if name not in read}
            return {column: text.format(**values), **kept}
    found = ", ".join(f"`{name}`" for name in row)
    wanted = "; or ".join(", ".join(names) for _, names in formats)
    raise DataError(f"{origin}: no prompt_format fits: expected text in {wanted}; this row has {found}")
