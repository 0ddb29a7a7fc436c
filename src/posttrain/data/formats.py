"""The table of row formats: which columns tell them, which rows they give, and how a row becomes a noun.

Detection looks at every row, so a mixture is found and refused at its first odd line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.config.datasets import ROWS_OF_TYPE, DatasetKeys, RowKind
from posttrain.config.kinds import kinds_with
from posttrain.data import parse
from posttrain.data.additions import Noun, with_additions
from posttrain.data.sources import SourceRow
from posttrain.errors import DataError
from posttrain.types import Origin

FormatName = Literal[
    "chat",
    "sharegpt",
    "alpaca",
    "completion",
    "text",
    "preference",
    "alpaca_preference",
    "kto",
    "alpaca_kto",
    "stepwise_supervised",
    "prompt",
]


@dataclass(frozen=True, slots=True)
class Format:
    """`needs` are alternative sets of columns; `also` are further columns that are read."""

    rows: tuple[RowKind, ...]
    needs: tuple[tuple[str, ...], ...]
    parse: Callable[[Mapping[str, Any], Origin], Noun | parse.Skip]
    also: tuple[str, ...] = ()
    by_name: bool = False
    """Whether it is taken where `type` names it, and never found: its columns mean another thing elsewhere."""

    def score(self, columns: Iterable[str]) -> int:
        """How many of its columns are there; 0 unless one alternative is complete."""
        present = set(columns)
        return max((len(needed) for needed in self.needs if present.issuperset(needed)), default=0)

    def reads(self, columns: Iterable[str]) -> set[str]:
        named = {name for needed in self.needs for name in needed} | set(self.also)
        return set(columns) & named

    @property
    def shape(self) -> str:
        return " or ".join(" + ".join(f"`{name}`" for name in needed) for needed in self.needs)


FORMATS: dict[str, Format] = {
    "chat": Format(ROWS_OF_TYPE["chat"], (("messages",),), parse.parse_chat, ("tools",)),
    "sharegpt": Format(ROWS_OF_TYPE["sharegpt"], (("conversations",),), parse.parse_sharegpt, ("system", "tools")),
    "alpaca": Format(
        ROWS_OF_TYPE["alpaca"],
        (("instruction", "output"),),
        parse.parse_alpaca,
        ("input", "system", "history", "tools"),
    ),
    "completion": Format(ROWS_OF_TYPE["completion"], (("prompt", "completion"),), parse.parse_completion, ("tools",)),
    "text": Format(ROWS_OF_TYPE["text"], (("text",),), parse.parse_text),
    "preference": Format(
        ROWS_OF_TYPE["preference"],
        (("chosen", "rejected"),),
        parse.parse_preference,
        ("prompt", "conversations", "tools"),
    ),
    "alpaca_preference": Format(
        ROWS_OF_TYPE["alpaca_preference"],
        (("instruction", "chosen", "rejected"),),
        parse.parse_alpaca_preference,
        ("input", "system", "history", "tools"),
        by_name=True,
    ),
    "kto": Format(
        ROWS_OF_TYPE["kto"], (("prompt", "completion", "label"), ("messages", "label")), parse.parse_kto, ("tools",)
    ),
    "stepwise_supervised": Format(
        ROWS_OF_TYPE["stepwise_supervised"], (("prompt", "completions", "labels"),), parse.parse_stepwise, ("tools",)
    ),
    "alpaca_kto": Format(
        ROWS_OF_TYPE["alpaca_kto"],
        (("instruction", "output", "label"),),
        parse.parse_alpaca_kto,
        ("input", "system", "history", "tools"),
        by_name=True,
    ),
    "prompt": Format(ROWS_OF_TYPE["prompt"], (("prompt",), ("messages",)), parse.parse_prompt, ("tools",)),
}
"""Name → format. Where two score alike, the earlier one is taken."""

ALIASES: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "conversations": ("conversation", "turns"),
    "prompt": ("question", "query", "instruction", "problem", "input"),
    "completion": ("answer", "response", "output", "solution", "target"),
    "instruction": ("question", "query"),
    "output": ("response", "answer"),
    "text": ("content", "body", "document", "raw_content"),
    "chosen": ("preferred", "chosen_response", "win", "response_chosen"),
    "rejected": ("dispreferred", "rejected_response", "lose", "response_rejected"),
    "completions": ("steps", "solution_steps"),
    "labels": ("ratings", "step_labels"),
    "label": ("kto_tag", "is_good", "thumbs_up"),
}
"""Our column → what others call it; used to propose `columns:` in errors."""


@dataclass(frozen=True, slots=True)
class Detection:
    """The format of a source, why, and which columns nobody reads."""

    name: str
    why: str
    ignored: tuple[str, ...] = ()

    def __str__(self) -> str:
        ignored = f"; columns not read: {', '.join(self.ignored)}" if self.ignored else ""
        return f"{self.name} ({self.why}{ignored})"


def detect_format(rows: Sequence[SourceRow], kind: RowKind, named: str = "auto") -> Detection:
    """The one format of all `rows` for `kind`. Raises: DataError on wrong columns, a wrong `type` or a mixture."""
    detector = Detector(kind, named)
    detector.add(rows)
    return detector.found()


class Detector:
    """`detect_format` for rows that are told part by part."""

    def __init__(self, kind: RowKind, named: str = "auto") -> None:
        self._kind: RowKind = kind
        self._named = named
        self._of: dict[frozenset[str], str] = {}
        self._first: tuple[Origin, Mapping[str, Any]] | None = None
        self._columns: set[str] = set()
        self._num_rows = 0
        self.name = named
        """The format of the rows so far."""

    def add(self, rows: Sequence[SourceRow]) -> None:
        """Raises: DataError at the first row that does not fit."""
        if rows and self._first is None:
            self._first = rows[0]
            if self._named != "auto":
                _check_kind(rows[0][0], self._kind, self._named)
        for origin, row in rows:
            columns = frozenset(name for name, value in row.items() if value is not None)
            if self._named == "auto":
                self._add(origin, row, columns)
            else:
                _check_named(origin, columns, self._kind, self._named)
            self._columns.update(row)
        self._num_rows += len(rows)

    def _add(self, origin: Origin, row: Mapping[str, Any], columns: frozenset[str]) -> None:
        if columns not in self._of:
            self._of[columns] = _best(columns, self._kind, origin)
        name = self._of[columns]
        if name == "preference":
            _refuse_prompt_beside(row, columns, origin)
        if self.name == "auto":
            self.name = name
        elif name != self.name:
            assert self._first is not None, "a row was the first"
            raise DataError(
                f"{origin}: this row is {name} ({FORMATS[name].shape}), but the rows from {self._first[0]} on are {self.name} "
                f"({FORMATS[self.name].shape}); expected one format per file; split the file, or name it with `type: {self.name}`"
            )

    def found(self) -> Detection:
        assert self._first is not None, "sources never give an empty list"
        used = _shown(FORMATS[self.name], self._first[1]) if self._named == "auto" else ""
        why = f"{used} in all {self._num_rows:,} rows" if used else "named in the config"
        return Detection(self.name, why, _ignored(self._columns, self.name))


def rows_of(columns: Iterable[str]) -> RowKind:
    """What rows with these columns most likely are; examples where nothing is known of them."""
    scores = {name: form.score(columns) for name, form in FORMATS.items() if not form.by_name}
    best = max(scores, key=lambda name: scores[name])
    return FORMATS[best].rows[0] if scores[best] else "examples"


def parse_rows(rows: Sequence[SourceRow], name: str, source: DatasetKeys) -> tuple[list[Noun], list[parse.Skip]]:
    """The rows of `source`, with what it adds to them. Raises: DataError at the first malformed row."""
    nouns: list[Noun] = []
    skips: list[parse.Skip] = []
    read = FORMATS[name].parse
    for origin, row in rows:
        noun = read(row, origin)
        if isinstance(noun, parse.Skip):
            skips.append(noun)
        else:
            nouns.append(with_additions(noun, source))
    return nouns, skips


def _best(columns: frozenset[str], kind: RowKind, origin: Origin) -> str:
    scores = {name: fmt.score(columns) for name, fmt in FORMATS.items() if kind in fmt.rows and not fmt.by_name}
    name = max(scores, key=lambda candidate: scores[candidate])
    if scores[name]:
        return name
    shown = ", ".join(f"`{column}`" for column in sorted(columns)) or "none"
    expected = "; ".join(f"{name}: {FORMATS[name].shape}" for name in scores)
    raise DataError(f"{origin}: found columns {shown}; expected for {kind} one of: {expected}. {_hint(columns, kind)}")


def _refuse_prompt_beside(row: Mapping[str, Any], columns: frozenset[str], origin: Origin) -> None:
    """Answers as text beside a question under another name: read as they are, the question would be left out."""
    question = _alias("prompt", columns)
    if not {"prompt", "conversations"} & columns and question and isinstance(row["chosen"], str):
        renamed = "" if question == "instruction" else f" and `columns: {{instruction: {question}}}`"
        raise DataError(
            f"{origin}: `chosen` and `rejected` are text, and `{question}` beside them would be left out; expected it as the prompt; "
            f"set `type: alpaca_preference`{renamed} for a conversation, or `columns: {{prompt: {question}}}` for plain text"
        )


def _hint(columns: frozenset[str], kind: RowKind) -> str:
    """What to write so that these columns are understood."""
    scores = {name: fmt.score(columns) for name, fmt in FORMATS.items() if kind not in fmt.rows and not fmt.by_name}
    other = max(scores, key=lambda candidate: scores[candidate])
    if scores[other]:
        if kind == "pairs" and other == "kto":
            return "This is the kto format: set `loss_type: kto`"
        return f"This is the {other} format, which is for {' and '.join(kinds_with(other))}"
    for name, fmt in FORMATS.items():
        if kind not in fmt.rows or fmt.by_name:
            continue
        for needed in fmt.needs:
            renames = {ours: _alias(ours, columns) for ours in needed if ours not in columns}
            if all(renames.values()) and len(set(renames.values())) == len(renames):
                pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in renames.items())
                return f"Name them with `columns: {{{pairs}}}` (then the format is {name})"
    first = next(fmt for fmt in FORMATS.values() if kind in fmt.rows).needs[0][0]
    return f"Name them with `columns: {{{first}: <your column>}}`"


def _alias(ours: str, columns: frozenset[str]) -> str | None:
    lowered = {column.lower(): column for column in columns}
    return next((lowered[other] for other in (ours, *ALIASES.get(ours, ())) if other in lowered), None)


def _check_kind(origin: Origin, kind: RowKind, named: str) -> None:
    """Raises: DataError for a `type` that gives no such rows."""
    if kind not in FORMATS[named].rows:
        takes = ", ".join(name for name, other in FORMATS.items() if kind in other.rows)
        extra = "; with `loss_type: kto` it is" if kind == "pairs" and "labels" in FORMATS[named].rows else ""
        raise DataError(
            f"{origin.path}: `type: {named}` is not for {kind}{extra}; expected one of {takes}, or `type: auto`"
        )


def _check_named(origin: Origin, columns: frozenset[str], kind: RowKind, named: str) -> None:
    if not FORMATS[named].score(columns):
        shown = ", ".join(f"`{column}`" for column in sorted(columns)) or "none"
        raise DataError(
            f"{origin}: found columns {shown}; expected {FORMATS[named].shape} for `type: {named}`. {_hint(columns, kind)}"
        )


def _shown(fmt: Format, row: Mapping[str, Any]) -> str:
    used = max((needed for needed in fmt.needs if set(row).issuperset(needed)), key=len)
    return "column " * (len(used) == 1) + "columns " * (len(used) > 1) + ", ".join(f"`{name}`" for name in used)


def _ignored(columns: set[str], name: str) -> tuple[str, ...]:
    if name == "prompt":  # every other column is the reward functions'
        return ()
    return tuple(sorted(columns - FORMATS[name].reads(columns)))
