"""What becomes of a key of another tool, and the walk that gives every key of a file its fate.

A key that no row knows is refused: it may change what is learned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

from posttrain.config.importers.nested import unresolved
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.schema import arms, did_you_mean, group_in, keys_of, show_value
from posttrain.config.yaml_lines import plain_scalar
from posttrain.errors import ConfigError

Kind = str
Fate = Literal["mapped", "left out", "changed", "refused"]
Reading = Mapping[Any, Any] | Callable[[Any], Any]
"""Their value → ours: a table, or a function. Raises KeyError, TypeError or ValueError for what has no counterpart."""

OFF = (None, False, 0, "", "none", "None", "null", "no", "false", "False", [], {})
"""Values under which a feature is not asked for."""
_LONGEST_VALUE = 60
_MISSHAPEN = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading several keys together raises where one is a list, a text or a number and should be something else."""


@dataclass(frozen=True, slots=True)
class KeyFate:
    """The fate of one key.

    `to` is our key. `why` is the reason for what is left out, changed or refused; `todo` what the user can do instead.
    `read` turns the value into ours. A `joint` row is read together with others, by its tool's `finish`. `off` are
    further values of a refused key that ask for nothing.
    """

    fate: Fate
    to: str = ""
    why: str = ""
    todo: str = ""
    read: Reading | None = None
    joint: bool = False
    off: tuple[Any, ...] = ()


def to(key: str, read: Reading | None = None, why: str = "", todo: str = "") -> KeyFate:
    """The key is `key` here."""
    return KeyFate("mapped", key, why, todo or f"set {key} in a YAML of ours", read)


def joint(key: str, why: str = "", todo: str = "") -> KeyFate:
    """The key has its part in `key`, together with others."""
    return KeyFate("mapped", key, why, todo, joint=True)


def left(why: str) -> KeyFate:
    """The key changes nothing that is learned."""
    return KeyFate("left out", why=why)


def changed(why: str, off: tuple[Any, ...] = ()) -> KeyFate:
    """The key's work is done in another way here."""
    return KeyFate("changed", why=why, off=off)


def noted(read: Reading, todo: str) -> KeyFate:
    """The key's work is done in another way here, which `read` tells from its value; of a value that it does not know nothing is."""
    return KeyFate("changed", why="its note tells what this value comes to here", todo=todo, read=read)


def refused(why: str, todo: str, off: tuple[Any, ...] = ()) -> KeyFate:
    """The key changes what is learned and cannot be had here, unless its value asks for nothing."""
    return KeyFate("refused", why=why, todo=todo, off=off)


def rows(row: KeyFate, *keys: str) -> dict[str, KeyFate]:
    """The same fate for several keys."""
    return dict.fromkeys(keys, row)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A key that stops the import: what it is, why, and what to do."""

    key: str
    why: str
    todo: str

    def __str__(self) -> str:
        return " ".join(f"{self.key}: {self.why}; {self.todo}".splitlines())


@dataclass(slots=True)
class ImportDraft:
    """A configuration of ours as it grows: `keys`, and for each the notes on where it came from.

    `source` is their file as read (null keys taken out), `home` the folders its relative paths may start from.
    """

    tool: str
    kind: Kind
    source: Mapping[str, Any]
    home: tuple[Path, ...]
    keys: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    came_from: dict[str, str] = field(default_factory=dict)
    other: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def put(self, ours: str, value: Any, key: str, note: str = "") -> None:
        """Set our key from theirs. A second, different value for it is refused; several may each give keys of a group."""
        info = keys_of(STAGE_KINDS[self.kind].keys)[ours]
        value = _as_number(value, info.annotation)
        if group_in(info.annotation) and not value:
            self.leave(key, f"it says nothing of {ours}")
            return
        before = self.keys.get(ours)
        if group_in(info.annotation) and before and all(before.get(name, item) == item for name, item in value.items()):
            self.keys[ours] = value = {**before, **value}
        if ours in self.keys and self.keys[ours] != value:
            text = (
                f"{show_value(value)} stands against {ours}: {show_value(self.keys[ours])} from {self.came_from[ours]}"
            )
            self.refuse(key, text, "keep one of the two")
            return
        default = "" if info.required or show_value(value) != info.default else "the default here"
        text = "; ".join(part for part in (f"mapped from {key}", note, default) if part)
        self.keys[ours] = value
        self.came_from[ours] = key
        self.notes.setdefault(ours, []).append(text)

    def assume(self, ours: str, value: Any) -> None:
        """What the tool does where its file says nothing, and we would not."""
        if ours not in self.keys and ours in keys_of(STAGE_KINDS[self.kind].keys):
            self.keys[ours] = value
            self.came_from[ours] = f"{self.tool}'s default"
            here = keys_of(STAGE_KINDS[self.kind].keys)[ours].default
            self.notes[ours] = [f"{self.tool}'s default{'' if here == show_value(value) else f'; here it is {here}'}"]

    def drop(self, ours: str, why: str) -> None:
        """Take back a key of ours, if it is set."""
        if ours in self.keys:
            del self.keys[ours], self.notes[ours]
            self.leave(self.came_from.pop(ours), why)

    def leave(self, key: str, why: str) -> None:
        self.other.append((key, f"left out because {why}"))

    def change(self, key: str, why: str) -> None:
        self.other.append((key, f"changed because {why}"))

    def refuse(self, key: str, why: str, todo: str) -> None:
        self.refusals.append(Refusal(key, why, todo))

    def asks(self, key: str) -> bool:
        """Whether their file switches `key` on."""
        return not is_off(self.source.get(key))

    def number(self, key: str) -> float | None:
        """Their number, 0 where it is switched off; None where it is unset, and where it is none, which is refused."""
        value = self.source.get(key)
        if value is None or is_off(value):
            return None if value is None else 0.0
        try:
            found = math.nan if isinstance(value, bool) else as_float(value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found):
            return found
        self.refuse(key, f"{show_short(value)} is no number", "give one, or take it out")
        return None

    def size(self, key: str, default: int) -> int:
        """Their whole number from 1 on; `default` where it is unset, and where it is none, which is refused."""
        amount = self.number(key)
        if amount is not None and (amount < 1 or amount != int(amount)):
            self.refuse(key, f"{show_short(self.source[key])} is no size", "give a whole number from 1 on, or take it out")  # fmt: skip
            return default
        return default if amount is None else int(amount)


@dataclass(frozen=True, slots=True)
class Tool:
    """Another tool: its keys and their fates, what it does where nothing is said, and how its stage is told.

    `stage` returns the kind, or the refusal of a method we lack. `finish` reads what several keys say together.
    `marks` are keys by which a file of this tool is known. Of a `nested` tool keys stand by their path (`optimizer.lr`), and a row
    `critic.*` is for all keys inside, `*._target_` for all of that name.
    """

    name: str
    rows: Mapping[str, KeyFate]
    stage: Callable[[Mapping[str, Any]], Kind | Refusal]
    finish: Callable[[ImportDraft], None]
    marks: frozenset[str]
    defaults: Callable[[ImportDraft], Mapping[str, Any]] = lambda draft: {}
    nested: bool = False

    def row_of(self, key: str) -> KeyFate | None:
        """The key's row, or that of all keys inside the nearest of its holders."""
        row = self.rows.get(key) or self.rows.get(f"*.{key.rpartition('.')[2]}")
        while row is None and "." in key:
            key = key.rpartition(".")[0]
            row = self.rows.get(f"{key}.*")
        return row

    def knows(self, key: str) -> bool:
        """Whether it is a key of the tool, or holds keys of it."""
        return self.row_of(key) is not None or any(name.startswith(f"{key}.") for name in self.rows)


def is_off(value: Any) -> bool:
    return any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in (*OFF, 0.0))


def convert(
    tool: Tool, source: Mapping[str, Any], nulls: Sequence[str], home: tuple[Path, ...], kind: Kind | None = None
) -> ImportDraft:
    """Every key of `source` with its fate. Refusals are in the draft."""
    try:
        return _converted(tool, source, nulls, home, kind)
    except _MISSHAPEN:
        # Without the keys of the wrong form the rest reads; without another that hides them, such as the data, something is missing.
        for number in (1, 2):
            tried = {keys: _without(tool, source, keys, home, kind) for keys in combinations(source, number)}
            good = {keys: draft for keys, draft in tried.items() if draft is not None}
            if good:
                break
        else:
            raise
        # Of several that would do, a word (`adapter: lora`) is least likely the wrong one: what it switches on is read no more.
        odd = min(good, key=lambda keys: (len(good[keys].refusals), sum(isinstance(source[key], str) for key in keys)))
        for key in odd:
            why = f"{show_short(source[key])} has a form that is not known here"
            good[odd].refuse(key, why, "write it as the tool's docs do, or take it out")
        return good[odd]


def _without(
    tool: Tool, source: Mapping[str, Any], keys: Sequence[str], home: tuple[Path, ...], kind: Kind | None
) -> ImportDraft | None:
    """What comes of a file without `keys`; None if it cannot be read even so."""
    try:
        return _converted(tool, {name: value for name, value in source.items() if name not in keys}, (), home, kind)
    except _MISSHAPEN:
        return None


def _converted(
    tool: Tool, source: Mapping[str, Any], nulls: Sequence[str], home: tuple[Path, ...], kind: Kind | None
) -> ImportDraft:
    stage = tool.stage(source) if kind is None else kind
    draft = ImportDraft(tool.name, "sft" if isinstance(stage, Refusal) else stage, source, home)
    if isinstance(stage, Refusal):
        draft.refusals.append(stage)
        return draft
    for key in nulls:
        draft.leave(key, "it is unset, so the default applies")
    for key, value in source.items():
        row = tool.row_of(key)
        if row is None:
            close = did_you_mean(key, tool.rows)
            todo = (
                f"take it out if nothing that is learned depends on it, else set what it does in a YAML of ours{close}"
            )
            draft.refuse(key, f"no key of {tool.name}'s that is known here; it may change what is learned", todo)
        elif row.fate == "mapped" and unresolved(value):
            draft.refuse(key, f"{show_short(value)} names something that is not in the file", "write the value itself")
        elif not row.joint:
            follow(row, key, value, draft)
    tool.finish(draft)
    for ours, value in tool.defaults(draft).items():
        draft.assume(ours, value)
    _tell_the_rest(tool, draft)
    return draft


def _tell_the_rest(tool: Tool, draft: ImportDraft) -> None:
    """A key that was read beside others, and that no note names: where it went."""
    told = "\n".join([*(text for texts in draft.notes.values() for text in texts), *draft.came_from.values()])
    known = {key for key, _ in draft.other} | {refusal.key for refusal in draft.refusals}
    for key in draft.source:
        row = tool.row_of(key)
        named = re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", told)
        if row is not None and row.joint and key not in known and not named:
            draft.other.append((key, f"read with others for {row.to}"))


def follow(row: KeyFate, key: str, value: Any, draft: ImportDraft) -> None:
    """Give the key the fate of its row."""
    if row.fate in ("changed", "refused") and row.read is None and (is_off(value) or value in row.off):
        draft.leave(key, f"{show_short(value)} asks for nothing that is not so here")
    elif row.fate == "left out":
        draft.leave(key, row.why)
    elif row.fate == "changed" and row.read is not None:
        _note(row, row.read, key, value, draft)
    elif row.fate == "changed":
        draft.change(key, row.why)
    elif row.fate == "refused":
        draft.refuse(key, f"{show_short(value)}: {row.why}", row.todo)
    elif row.to not in keys_of(STAGE_KINDS[draft.kind].keys):
        draft.leave(key, f"it plays no part in {draft.kind}")
    else:
        _map(row, key, value, draft)


def _note(row: KeyFate, reading: Reading, key: str, value: Any, draft: ImportDraft) -> None:
    try:
        draft.change(key, f"{show_short(value)}: {read_as(reading, value)}")
    except (KeyError, TypeError, ValueError, OverflowError):
        if is_off(value):
            draft.leave(key, f"{show_short(value)} asks for nothing that is not so here")
        else:
            draft.refuse(key, f"{show_short(value)} has no counterpart here", row.todo)


def _map(row: KeyFate, key: str, value: Any, draft: ImportDraft) -> None:
    try:
        ours = value if row.read is None else read_as(row.read, value)
    except (KeyError, TypeError, ValueError, OverflowError):
        draft.refuse(key, f"{show_short(value)} has no counterpart here", row.todo)
        return
    note = (
        row.why
        if show_value(ours) == show_value(value)
        else "; ".join(filter(None, (f"{show_short(value)} there", row.why)))
    )
    draft.put(row.to, ours, key, note)


def read_as(reading: Reading, value: Any) -> Any:
    """Raises: what `reading` raises for a value that has no counterpart."""
    return reading(value) if callable(reading) else reading[value]


def _as_number(value: Any, annotation: Any) -> Any:
    """Text that is a number, where a number is expected: YAML 1.1 reads `2e-5` as text."""
    kinds = arms(annotation)
    if isinstance(value, str) and str not in kinds and {int, float} & set(kinds):
        value = plain_scalar(value)
    if isinstance(value, float) and value.is_integer() and int in kinds and float not in kinds:
        value = int(value)
    return value


def as_float(value: Any) -> float:
    """Raises: ValueError."""
    return float(plain_scalar(value)) if isinstance(value, str) else float(value)


def flag(value: Any) -> bool:
    """Raises: KeyError."""
    return {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}[str(value).lower()]


def choices(key: str, kind: Kind) -> tuple[str, ...]:
    return tuple(
        choice
        for arm in arms(keys_of(STAGE_KINDS[kind].keys)[key].annotation)
        for choice in get_args(arm) or ()
        if isinstance(choice, str)
    )


def names(value: Any) -> list[str]:
    """A list, or names with commas or blanks between them."""
    if isinstance(value, str):
        return [part for part in value.replace(",", " ").split() if part]
    return [str(part) for part in value]


def show_short(value: Any) -> str:
    text = show_value(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def raise_if_refused(draft: ImportDraft, place: Path) -> None:
    """Raises: ConfigError with a line per refusal."""
    if draft.refusals:
        lines = [f"{place}: {refusal}" for refusal in draft.refusals]
        raise ConfigError("\n".join(dict.fromkeys(lines)))
