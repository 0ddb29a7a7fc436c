"""The table of row formats: which columns tell them, which rows they give, and how a row becomes a noun.

Detection looks at every row, so a mixture is found and refused at its first odd line.
"""

from __future__ import annotations

from collections import Counter
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
    if named != "auto":
        return _check_named(rows, kind, named)
    found: dict[frozenset[str], str] = {}
    first: tuple[str, Origin] | None = None
    for origin, row in rows:
        columns = frozenset(name for name, value in row.items() if value is not None)
        if columns not in found:
            found[columns] = _best(columns, kind, origin)
        name = found[columns]
        if name == "preference":
            _refuse_prompt_beside(row, columns, origin)
        if first is None:
            first = (name, origin)
        elif name != first[0]:
            raise DataError(
                f"{origin}: this row is {name} ({FORMATS[name].shape}), but the rows from {first[1]} on are {first[0]} "
                f"({FORMATS[first[0]].shape}); expected one format per file; split the file, or name it with `type: {first[0]}`"
            )
    assert first is not None, "sources never give an empty list"
    return Detection(
        first[0], f"{_shown(FORMATS[first[0]], rows[0][1])} in all {len(rows):,} rows", _ignored(rows, first[0])
    )


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


def _check_named(rows: Sequence[SourceRow], kind: RowKind, named: str) -> Detection:
    fmt = FORMATS[named]
    origin, row = rows[0]
    if kind not in fmt.rows:
        takes = ", ".join(name for name, other in FORMATS.items() if kind in other.rows)
        extra = "; with `loss_type: kto` it is" if kind == "pairs" and "labels" in fmt.rows else ""
        raise DataError(
            f"{origin.path}: `type: {named}` is not for {kind}{extra}; expected one of {takes}, or `type: auto`"
        )
    for origin, row in rows:
        columns = frozenset(name for name, value in row.items() if value is not None)
        if not fmt.score(columns):
            shown = ", ".join(f"`{column}`" for column in sorted(columns)) or "none"
            raise DataError(
                f"{origin}: found columns {shown}; expected {fmt.shape} for `type: {named}`. {_hint(columns, kind)}"
            )
    return Detection(named, "named in the config", _ignored(rows, named))


def _shown(fmt: Format, row: Mapping[str, Any]) -> str:
    used = max((needed for needed in fmt.needs if set(row).issuperset(needed)), key=len)
    return "column " * (len(used) == 1) + "columns " * (len(used) > 1) + ", ".join(f"`{name}`" for name in used)


def _ignored(rows: Sequence[SourceRow], name: str) -> tuple[str, ...]:
    if name == "prompt":  # every other column is the reward functions'
        return ()
    counts = Counter(column for _, row in rows for column in row)
    return tuple(sorted(set(counts) - FORMATS[name].reads(counts)))
