"""A suite is a JSONL file: what is asked, what is right, and how it is scored.

One object a line: `id`, `prompt` (text) or `messages`, `target`, and optionally `choices`, `scorer`, `scorer_kwargs`, `split`, `cluster`;
every other column is handed to the scorer.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, cast

from posttrain.errors import ConfigError, DataError, EvalError
from posttrain.files import canonical_json, digest_file, digest_json, neighbours, read_json_lines
from posttrain.grading.learned import check_learned_options, learned_digest, learned_source, split_learned
from posttrain.grading.scorers import SCORERS, scorer_digest, unusable
from posttrain.grading.source import defined_names, dependency_versions, parse_source, source_of, split_spec
from posttrain.names import JUDGE, LM_EVAL, reward_name
from posttrain.types import Text

CHOICES = "choices"
"""The scorer of items with choices that name none."""
RANKINGS: dict[str, Callable[[float, str], float]] = {
    CHOICES: lambda logp, choice: logp,
    "acc": lambda logp, choice: logp,
    "acc_norm": lambda logp, choice: logp / max(len(choice.lstrip()), 1),
}
"""Scorer → what a choice is ranked by, instead of sampling an answer. Source: lm-eval's `multiple_choice`; its length is in characters,
without the space that parts prompt and choice."""
_KNOWN = {"id", "prompt", "messages", "target", "choices", "scorer", "scorer_kwargs", "split", "cluster"}


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
    scorer_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else [dict(m) for m in self.prompt]
        options = {"scorer_kwargs": dict(self.scorer_kwargs)} if self.scorer_kwargs else {}
        return {"id": self.id, "prompt": prompt, "target": self.target, "scorer": self.scorer, "split": self.split,
                "cluster": self.cluster, "choices": list(self.choices), "columns": dict(self.columns), **options}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Suite:
    """The items of all splits; items of one suite share a scorer and its options."""

    name: str
    path: Path
    items: tuple[Item, ...]

    @property
    def scorer(self) -> str:
        return self.items[0].scorer

    @property
    def scorer_kwargs(self) -> Mapping[str, Any]:
        """Options of a scorer of its own, as rewards have them."""
        return self.items[0].scorer_kwargs

    def on(self, split: str) -> tuple[Item, ...]:
        """The items of a split, or of several: `gate+reserve`. Raises: EvalError if there are none."""
        items = tuple(item for item in self.items if item.split in split.split("+"))
        if not items:
            counts = Counter(item.split for item in self.items)
            known = ", ".join(f"{count} on {name}" for name, count in sorted(counts.items()))
            raise EvalError(f"{self.path}: no items with split {split!r}; it has {known}")
        return items

    def sizes(self, split: str) -> tuple[int, int]:
        """Number of items and of clusters on a split, for planning a gate."""
        items = [item for item in self.items if item.split in split.split("+")]
        return len(items), len({item.cluster for item in items if item.cluster is not None})

    def digest(self, split: str, decoding: Mapping[str, Any]) -> str:
        """Digest of what a score on this split means: items, scorer code, decoding."""
        lines = [canonical_json(item.to_json()) for item in self.on(split)]
        return digest_json([self.name, split, lines, self.scorer_digest(), dict(decoding)])

    def scorer_digest(self) -> str:
        if self.scorer in RANKINGS:
            return self.scorer
        if split_learned(self.scorer):
            return learned_digest(self.scorer, self.path.parent)
        if own := split_spec(self.scorer):
            digests, modules = source_of(self.path.parent / own[0])
            return digest_json([own[1], digests, dependency_versions(modules)])
        return scorer_digest(self.scorer)


def by_name(files: Iterable[str | Path]) -> dict[str, str]:
    """Files under the names of the suites that they are. Raises: EvalError where two would be one."""
    found: dict[str, str] = {}
    for file in map(str, files):
        name = Path(file).stem
        if name in found:
            raise EvalError(f"{file} and {found[name]} would both be suite {name!r}; rename one of them")
        found[name] = file
    return found


def load_suite(name: str, path: Path) -> Suite:
    """Raises: EvalError naming file and line of the first thing that is wrong."""
    if str(path).startswith(LM_EVAL):
        from posttrain.evals.harness import load_task_suite

        return load_task_suite(name, str(path))
    items: list[Item] = []
    seen: dict[str, int] = {}
    try:
        rows = list(read_json_lines(path))
    except FileNotFoundError:
        raise EvalError(f"evals.{name}: {path}: no such file{neighbours(path, '.jsonl')}") from None
    except OSError as error:
        raise EvalError(f"evals.{name}: {path} cannot be read: {error.strerror}") from error
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
    if other := next((item for item in items if item.scorer_kwargs != items[0].scorer_kwargs), None):
        raise EvalError(
            f"{path.name}: items give their scorer other options ({items[0].id}: {dict(items[0].scorer_kwargs)}, {other.id}: "
            f"{dict(other.scorer_kwargs)}); make one suite of each"
        )
    _check_own_scorer(items[0].scorer, items[0].scorer_kwargs, path)
    return Suite(name, path, tuple(items))


def suite_files(path: Path) -> dict[str, Path]:
    """The suite's file, and beside it all that its own scorer is made of: path below the folder they share → file.

    The suite is the one that is no Python. A task of lm-eval is no file: what it asks is kept by its digest. Raises: EvalError.
    """
    if str(path).startswith(LM_EVAL):
        return {}
    scorer, path = load_suite(path.stem, path).scorer, path.resolve()
    files = [path]
    if scorer.startswith(JUDGE):
        files.append(Path(learned_source(scorer, path.parent)))
    if own := split_spec(scorer):
        file = (path.parent / own[0]).resolve()
        files += [file.parent / name for name in source_of(file)[0]]
    shared = os.path.commonpath([file.parent for file in files])
    return {os.path.relpath(file, shared): file for file in files}


def suite_file_digest(path: Path) -> str:
    """Digest of the file, and of its own scorer with all that this is made of; of a task its YAML and documents. Raises: EvalError."""
    suite = load_suite(path.stem, path)
    if str(path).startswith(LM_EVAL):
        return suite.digest(suite.items[0].split, {})
    digest = digest_file(path)
    return digest_json([digest, suite.scorer_digest()]) if is_own(suite.scorer) else digest


def is_own(scorer: str) -> bool:
    """Whether it is no scorer of ours by name: a function in a file, a reward model, a judge."""
    return (split_spec(scorer) or split_learned(scorer)) is not None


def _check_own_scorer(scorer: str, options: Mapping[str, Any], path: Path) -> None:
    if split_learned(scorer):
        try:
            learned_source(scorer, path.parent)
        except ConfigError as error:
            raise EvalError(f"{path.name}: scorer {error}; its path is relative to the suite") from None
        if options:
            _check_options(scorer, options, path)
    own = split_spec(scorer)
    if own is None:
        return
    file = path.parent / own[0]
    if not file.is_file():
        raise EvalError(f"{path.name}: scorer {scorer!r}: no file {file}; a scorer's path is relative to its suite")
    try:
        defined = defined_names(parse_source(file))
    except ConfigError as error:
        raise EvalError(f"{path.name}: scorer {scorer!r}: {error}") from None
    if own[1] not in defined:
        raise EvalError(f"{path.name}: scorer {scorer!r}: {file} defines {', '.join(sorted(defined)) or 'nothing'}")


def _check_options(scorer: str, options: Mapping[str, Any], path: Path) -> None:
    try:
        check_learned_options(reward_name(scorer), scorer, options, path.parent, key="scorer_kwargs")
    except ConfigError as error:
        raise EvalError(f"{path.name}: {error}") from None


def _options_of(scorer: str, options: Any, where: str) -> Mapping[str, Any]:
    """Raises: EvalError for what is no mapping, and for a scorer by name, which has none."""
    if not isinstance(options, dict):
        raise EvalError(
            f'{where}: `scorer_kwargs` is {options!r}; expected options by name, e.g. {{"aggregate": "product"}}'
        )
    if options and not is_own(scorer):
        raise EvalError(
            f"{where}: `scorer_kwargs`: scorer {scorer!r} takes no options; remove them, or name one of your own"
        )
    return cast("Mapping[str, Any]", options)


def _parse(row: Mapping[str, Any], where: str) -> Item:
    if not isinstance(row.get("id"), str):
        raise EvalError(f"{where}: expected an object with a string `id`")
    prompt = row.get("messages") or row.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(m, dict) and "role" in m for m in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str) or not prompt:
        raise EvalError(
            f"{where}: expected `prompt` (text) or `messages` (a list of role and content), found {type(prompt).__name__}"
        )
    choices = row.get("choices") or ()
    scorer = row.get("scorer") or (CHOICES if choices else "exact")
    if not isinstance(scorer, str) or not (scorer in RANKINGS or scorer in SCORERS or is_own(scorer)):
        known = ", ".join([*SCORERS, *RANKINGS])
        raise EvalError(
            f"{where}: scorer {scorer!r} is unknown; expected one of {known}, or file.py:function, model:FOLDER, judge:FILE.yaml"
        )
    if choices and scorer not in RANKINGS:
        ranked = ", ".join(RANKINGS)
        raise EvalError(
            f"{where}: scorer {scorer!r} judges a sampled answer, and `choices` are ranked ({ranked}); name one of these, or leave `choices` out"
        )
    cluster = row.get("cluster")
    if not isinstance(cluster, (str, int, NoneType)):
        raise EvalError(
            f"{where}: `cluster` is {cluster!r}; expected a text or a number that rows of one cluster share"
        )
    target = row.get("target")
    target = _right_choice(choices, target, where) if scorer in RANKINGS else _target_text(target)
    columns = {key: value for key, value in row.items() if key not in _KNOWN}
    if scorer in SCORERS and (reason := unusable(scorer, target, columns)):
        raise EvalError(f"{where}: scorer {scorer!r} could never score it: {reason}")
    return Item(
        id=row["id"], prompt=prompt, target=target, scorer=scorer,
        split=str(row.get("split") or "gate"), cluster=None if cluster is None else str(cluster), choices=tuple(choices),
        columns=columns, scorer_kwargs=_options_of(scorer, row.get("scorer_kwargs") or {}, where),
    )  # fmt: skip


def _right_choice(choices: Any, target: Any, where: str) -> str:
    """The text of the right choice; an integer is its index, from 0, as in lm-eval."""
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice for choice in choices)
    if not texts or len(choices) < 2 or len(set(choices)) < len(choices):
        raise EvalError(f"{where}: `choices` needs at least two texts that differ, found {choices!r}")
    if type(target) is int and 0 <= target < len(choices):
        return str(choices[target])
    if isinstance(target, str) and target in choices:
        return target
    last = len(choices) - 1
    raise EvalError(
        f"{where}: of `choices`, `target` must be one of them or an index from 0 to {last}, found {target!r}"
    )


def _target_text(target: Any) -> str | None:
    """Text and numbers as they stand, all else as JSON: it is what `json_schema` compares with."""
    if target is None or isinstance(target, str):
        return target
    return json.dumps(target) if isinstance(target, (bool, list, dict)) else str(target)
