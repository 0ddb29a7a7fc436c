"""What may be a name: each becomes part of a file's name, and some go to other tools.

One rule per noun, in words too, so that a message can say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

PREVIOUS = "previous"
LM_EVAL = "lm-eval:"
"""How the path of an eval suite begins that is a task of lm-eval."""
REWARD_MODEL, JUDGE = "model:", "judge:"
"""How a reward or a scorer begins that is a model's opinion: of a reward model's folder, by a judge's file."""
ENVIRONMENT = "environment"
"""The reward of the library, and the scorer, that is what an episode's environment paid."""
STAGE = "stage:"
"""How a stage of the same pipeline is named, by its kind or its place from 1: `model:stage:reward_model`."""
PREFIXES = (LM_EVAL, REWARD_MODEL, JUDGE)
"""What may stand before a path."""
QUESTIONS = "questions.jsonl"
"""File beside the report on such a task that holds what was asked."""
_MOST = 100
_MOST_BYTES = 200
"""A file's name may have 255, and ours get an end (`-gate`, `-2`)."""


@dataclass(frozen=True, slots=True)
class NameRule:
    pattern: re.Pattern[str]
    words: str

    def against(self, value: str) -> str:
        """Why `value` cannot be such a name, or nothing."""
        if not self.pattern.fullmatch(value):
            shown = value if len(value) <= 60 else f"{value[:59]}…"
            return f"got {shown!r}, expected {self.words}"
        if len(value) > _MOST or len(value.encode("utf-8", "surrogatepass")) > _MOST_BYTES:
            size = f"{len(value)} characters, {len(value.encode('utf-8', 'surrogatepass'))} bytes"
            return f"got a name of {size}, expected at most {_MOST} characters and {_MOST_BYTES} bytes"
        return ""


FREE = NameRule(
    re.compile(r"\w(?:[\w .-]*[\w.-])?"),
    "letters, digits, spaces and . _ - with a letter, a digit or _ first and no space last: it becomes the name of a folder",
)
"""Of a run, a suite, a split."""
STRICT = NameRule(
    re.compile(r"[A-Za-z][A-Za-z0-9_.-]*"), "a letter of a to z followed by such letters, digits, '.', '_' or '-'"
)
"""Of a registered model or an alias, which other tools take over."""


def kept_alias(value: str) -> str:
    """Why `value` is no alias that a user can set, or nothing."""
    if value == PREVIOUS or value.endswith(f".{PREVIOUS}"):
        return f"got {value!r}, which is kept by the registry itself, for the holder before: roll back to move it"
    return ""


def name_of(text: str) -> str:
    """A free name made of any text, such as the name of a file."""
    kept = re.sub(r"[^\w .-]", "_", text)[:_MOST]
    return kept.strip(" .-") or "run"


REPOSITORY = NameRule(
    re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII),
    "the name of a repository of the hub, OWNER/NAME: letters, digits and . _ -",
)
"""Of a model or of data on the Hugging Face hub."""


def reward_name(spec: str) -> str:
    """What a reward is called, in `reward_kwargs` too: its function; of a model's opinion the folder, the stage or the judge's file."""
    if spec.startswith(REWARD_MODEL + STAGE):
        return spec.removeprefix(REWARD_MODEL + STAGE)
    if spec.startswith(REWARD_MODEL):
        return Path(spec.removeprefix(REWARD_MODEL)).name
    if spec.startswith(JUDGE):
        return Path(spec.removeprefix(JUDGE)).stem
    return spec.rpartition(":")[2]


def reward_names(specs: Sequence[str]) -> list[str]:
    """The name each reward is logged under: its own, with the file's stem where two functions are alike."""
    names = [reward_name(spec) for spec in specs]
    unique: list[str] = []
    for spec, name in zip(specs, names, strict=True):
        is_function = ":" in spec and not spec.startswith((REWARD_MODEL, JUDGE))
        label = f"{Path(spec.rpartition(':')[0]).stem}.{name}" if is_function and names.count(name) > 1 else name
        while label in unique:
            label += "_"
        unique.append(label)
    return unique


def told_apart(paths: Iterable[str]) -> dict[str, str]:
    """Path → the file's name, after as many of its folders as tell it from the other paths."""
    parts = {path: Path(path).parts for path in paths}

    def tail(path: str, depth: int) -> str:
        return "/".join(parts[path][-depth:])

    def name(path: str) -> str:
        others = [other for other in parts if parts[other] != parts[path]]
        depths = range(1, len(parts[path]) + 1)
        return tail(path, next(d for d in depths if all(tail(other, d) != tail(path, d) for other in others)))

    return {path: name(path) for path in parts}


def is_pattern(entry: str) -> bool:
    """Whether an entry of `lora_target` is a regular expression for whole names of modules: a name has none of these signs."""
    return any(sign in entry for sign in "*+?[](){}|\\^$")
