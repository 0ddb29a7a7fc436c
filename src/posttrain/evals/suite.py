"""A suite is a JSONL file: what is asked, what is right, and how it is scored.

One object a line: `id`, `prompt` (text) or `messages`, `target`, and optionally `choices`, `scorer`, `split`, `cluster`;
every other column is handed to the scorer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import DataError, EvalError
from posttrain.files import canonical_json, digest_json, read_json_lines
from posttrain.grading.scorers import SCORERS, scorer_digest
from posttrain.types import Text

CHOICES = "choices"
"""The scorer of items that rank their choices by likelihood instead of sampling an answer."""
_KNOWN = {"id", "prompt", "messages", "target", "choices", "scorer", "split", "cluster"}


@dataclass(frozen=True, slots=True)
class Item:
    id: str
    prompt: Text
    target: str | None
    scorer: str
    split: str
    cluster: str | None = None
    choices: tuple[str, ...] = ()
    columns: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        return {"id": self.id, "prompt": prompt, "target": self.target, "scorer": self.scorer, "split": self.split,
                "cluster": self.cluster, "choices": list(self.choices), "columns": dict(self.columns)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Suite:
    """The items of all splits; items of one suite share a scorer."""

    name: str
    path: Path
    items: tuple[Item, ...]

    @property
    def scorer(self) -> str:
        return self.items[0].scorer

    def on(self, split: str) -> tuple[Item, ...]:
        """The items of a split, or of several: `gate+reserve`. Raises: EvalError if there are none."""
        items = tuple(item for item in self.items if item.split in split.split("+"))
        if not items:
            known = ", ".join(sorted({item.split for item in self.items}))
            raise EvalError(f"{self.path}: no items with split {split!r}; it has {known}")
        return items

    def sizes(self, split: str) -> tuple[int, int]:
        """Number of items and of clusters on a split, for planning a gate."""
        items = [item for item in self.items if item.split in split.split("+")]
        return len(items), len({item.cluster for item in items if item.cluster is not None})

    def digest(self, split: str, decoding: Mapping[str, Any]) -> str:
        """Digest of what a score on this split means: items, scorer code, decoding."""
        lines = [canonical_json(item.to_json()) for item in self.on(split)]
        scorer = CHOICES if self.scorer == CHOICES else scorer_digest(self.scorer)
        return digest_json([self.name, split, lines, scorer, dict(decoding)])


def load_suite(name: str, path: Path) -> Suite:
    """Raises: EvalError naming file and line of the first thing that is wrong."""
    items: list[Item] = []
    seen: dict[str, int] = {}
    try:
        rows = list(read_json_lines(path))
    except OSError as error:
        raise EvalError(f"evals.{name}: cannot read {path}: {error}") from error
    except DataError as error:
        raise EvalError(f"evals.{name}: {error}") from None
    for number, row in rows:
        item = _parse(row, f"{path.name}:{number}")
        if item.id in seen:
            raise EvalError(
                f"{path.name}:{number}: id {item.id!r} was used on line {seen[item.id]}; ids pair the answers of two models"
            )
        seen[item.id] = number
        items.append(item)
    if not items:
        raise EvalError(
            f"evals.{name}: {path} is empty; expected one JSON object per line with id, prompt or messages, and target"
        )
    if len(scorers := {item.scorer for item in items}) > 1:
        raise EvalError(
            f"{path.name}: items use several scorers ({', '.join(sorted(scorers))}); make one suite of each"
        )
    return Suite(name, path, tuple(items))


def _parse(row: Mapping[str, Any], where: str) -> Item:
    if not isinstance(row.get("id"), str):
        raise EvalError(f"{where}: expected an object with a string `id`")
    prompt = row.get("messages", row.get("prompt"))
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str) or not prompt:
        raise EvalError(
            f"{where}: expected `prompt` (text) or `messages` (a list of role and content), found {type(prompt).__name__}"
        )
    choices = tuple(row.get("choices") or ())
    scorer = row.get("scorer") or (CHOICES if choices else "exact")
    if scorer != CHOICES and scorer not in SCORERS:
        raise EvalError(f"{where}: scorer {scorer!r} is unknown; expected one of {', '.join([*SCORERS, CHOICES])}")
    target = row.get("target")
    if scorer == CHOICES and (len(choices) < 2 or target not in choices):
        raise EvalError(f"{where}: `choices` needs at least two texts, and `target` must be one of them")
    return Item(
        id=row["id"], prompt=prompt, target=None if target is None else str(target), scorer=scorer,
        split=str(row.get("split", "gate")), cluster=row.get("cluster"), choices=choices,
        columns={key: value for key, value in row.items() if key not in _KNOWN},
    )  # fmt: skip
