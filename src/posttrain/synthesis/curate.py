"""`posttrain data curate`: a set without its repeats, eval prompts, odd lengths and bad answers; what left, and why."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import posttrain
from posttrain.checkpoint.lock import run_lock
from posttrain.config.curate import ColumnRangeKeys, CurateKeys, QualityKeys
from posttrain.config.datasets import DatasetKeys
from posttrain.config.synth import LEFT, ROWS
from posttrain.data.curation import Leaving, eval_prompts, repeats, without
from posttrain.data.formats import FORMATS, Noun, detect_format, parse_rows, rows_of
from posttrain.data.lint_input import answers_of, prompt_of, whole
from posttrain.data.opened import read_source
from posttrain.data.origin import data_origins, remove_rows, write_origin
from posttrain.data.sources import Source, SourceRow
from posttrain.errors import DataError
from posttrain.files import write_atomic, write_json
from posttrain.grading.learned import check_learned_options, split_learned
from posttrain.names import reward_name, told_apart
from posttrain.recipes.measure.learned import load_learned
from posttrain.rewards.resolve import reward_digest
from posttrain.rewards.workers import RewardPool
from posttrain.rollout.collect import as_reward_input
from posttrain.synthesis.synth import REPORT, suite_digests, suite_prompts
from posttrain.types import Example, LabelledCompletion, PreferencePair, Prompt, SteppedCompletion


@dataclass(frozen=True, slots=True)
class _ReadRow:
    """As it stands in its file, under our column names, and as its format reads it; None where that skips it."""

    source: SourceRow
    noun: Noun | None
    others: Mapping[str, Any]
    why: str = ""


def curate_rows(keys: CurateKeys) -> dict[str, Any]:
    """The rows that stay, those that leave with their reason, and a report, in `output_dir`. Raises: DataError, ConfigError."""
    for quality in keys.quality:
        if quality.scorer_kwargs and split_learned(quality.scorer):
            name = reward_name(quality.scorer)
            check_learned_options(name, quality.scorer, quality.scorer_kwargs, key="quality: scorer_kwargs")
    read = [read_source(source) for source in keys.datasets]
    rows = [row for source, found in zip(keys.datasets, read, strict=True) for row in _parsed(found, source, keys)]
    staying, left = without(range(len(rows)), list(_filters(keys, rows)))
    report = {
        "read": len(rows),
        "kept": len(staying),
        "left": dict(Counter(why.partition(":")[0] for why in left.values()).most_common()),
    }
    folder = Path(keys.output_dir)
    with run_lock(folder):
        gone = [
            {"origin": str(rows[place].source[0]), "reason": left[place], "row": rows[place].source[1]}
            for place in sorted(left)
        ]
        write_atomic(folder / LEFT, "".join(map(_line, gone)))
        write_json(folder / REPORT, report)
        if not staying:
            remove_rows(folder / ROWS)
            raise DataError(
                f"{folder}: no row of {len(rows)} is left: {report['left']}; loosen the key that takes most of them out"
            )
        write_atomic(folder / ROWS, "".join(_line(rows[place].source[1]) for place in staying))
        write_origin(folder / ROWS, _origin(keys, read))
    return report


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _parsed(read: Source, source: DatasetKeys, keys: CurateKeys) -> list[_ReadRow]:
    kind = keys.rows or rows_of(read.rows[0][1])
    name = detect_format(read.rows, kind, source.type).name
    nouns, skips = parse_rows(read.rows, name, source)
    of, why = {noun.origin: noun for noun in nouns}, {skip.origin: skip.reason for skip in skips}
    reads = FORMATS[name].reads
    return [
        _ReadRow(row, of.get(row[0]), {n: v for n, v in row[1].items() if n not in reads(row[1])}, why.get(row[0], ""))
        for row in read.rows
    ]


_RowFilter = Callable[[Sequence[int]], Leaving]


def _filters(keys: CurateKeys, rows: Sequence[_ReadRow]) -> Iterator[_RowFilter]:
    """In order; the costly ones last."""
    suites = suite_prompts(keys.decontaminate)

    def noun(place: int) -> Noun:
        found = rows[place].noun
        assert found is not None, "what its format skips left first"
        return found

    def name(place: int) -> str:
        return str(rows[place].source[0])

    yield lambda places: {n: f"skipped: {rows[p].why}" for n, p in enumerate(places) if rows[p].noun is None}
    yield lambda places: {n: why for n, p in enumerate(places) if (why := _odd_length(noun(p), keys))}
    yield lambda places: repeats([whole(noun(p)) for p in places], [name(p) for p in places], keys.dedup, keys.near)
    yield lambda places: eval_prompts([prompt_of(noun(p)) for p in places], [whole(noun(p)) for p in places], suites)
    for window in keys.ranges:
        yield lambda places, window=window: {
            n: why for n, p in enumerate(places) if (why := _out_of_range(rows[p].source, window))
        }
    for quality in keys.quality:
        yield lambda places, quality=quality: _bad(quality, [(noun(p), rows[p].others) for p in places])


def _odd_length(noun: Noun, keys: CurateKeys) -> str | None:
    for text in answers_of(noun) or (prompt_of(noun),):
        if not keys.min_chars <= len(text) <= (math.inf if keys.max_chars is None else keys.max_chars):
            return f"length: {len(text)} characters"
    return None


def _out_of_range(row: SourceRow, window: ColumnRangeKeys) -> str | None:
    """Raises: DataError where there is no such number."""
    origin, value = row[0], row[1]
    for step in window.column.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise DataError(
            f"{origin}: ranges: {window.column} is {value!r}; expected a number; its columns are {', '.join(row[1])}"
        )
    low, high = window.min, window.max
    return (
        f"range: {window.column} is {value:g}"
        if (low is not None and value < low) or (high is not None and value > high)
        else None
    )


# --- quality -------------------------------------------------------------------------------------------------------


def _bad(quality: QualityKeys, rows: Sequence[tuple[Noun, Mapping[str, Any]]]) -> Leaving:
    """Of what the scorer gives too little, or nothing."""
    asked = [_asked_and_said(noun) for noun, _ in rows]
    names = sorted({name for _, others in rows for name in others} - {"prompts", "completions", "self"})
    columns = {name: [others.get(name) for _, others in rows] for name in names}
    options = {quality.scorer: quality.scorer_kwargs} if quality.scorer_kwargs else None
    with RewardPool([quality.scorer], kwargs=options, timeout_s=quality.timeout_s, load=load_learned) as pool:
        found = pool.score([prompt for prompt, _ in asked], [said for _, said in asked], columns)
    left = {n: f"unscored: {one.error or 'no score'}" for n, one in enumerate(found) if one.total is None}
    scores = {n: one.total for n, one in enumerate(found) if one.total is not None}
    ranked = sorted(scores, key=lambda n: (-scores[n], n))
    if quality.keep_share is not None:
        ranked = ranked[math.ceil(Fraction(str(quality.keep_share)) * len(rows)) :]
    low = math.inf if quality.min is None else quality.min
    return left | {n: f"quality: {scores[n]:g}" for n in ranked if scores[n] < low}


def _asked_and_said(noun: Noun) -> tuple[Any, Any]:
    """Prompt and answer as a reward is given them. Raises: DataError for a row without an answer."""
    match noun:
        case Example(messages=messages) if messages:
            return as_reward_input(tuple(messages[:-1])), as_reward_input(tuple(messages[-1:]))
        case Example():
            return noun.prompt, noun.completion
        case PreferencePair():
            return as_reward_input(noun.prompt), as_reward_input(noun.chosen)
        case LabelledCompletion():
            return as_reward_input(noun.prompt), as_reward_input(noun.completion)
        case SteppedCompletion():
            return as_reward_input(noun.prompt), "\n".join(noun.steps)
        case Prompt():
            raise DataError(
                f"{noun.origin}: quality scores an answer, and this row is a prompt alone; remove quality, or sample answers with `posttrain data synth`"
            )


def _origin(keys: CurateKeys, read: Sequence[Source]) -> dict[str, Any]:
    rules = ("dedup", "near", "min_chars", "max_chars")
    names = told_apart(source.path for source in keys.datasets)
    scorers = [quality.scorer for quality in keys.quality]
    return {
        "made_by": "posttrain data curate",
        "posttrain": posttrain.__version__,
        "data": {names[source.path]: found.digest for source, found in zip(keys.datasets, read, strict=True)},
        "data_origins": data_origins([source.path for source in keys.datasets]),
        "kept": {
            **{name: getattr(keys, name) for name in rules},
            "ranges": [window.model_dump() for window in keys.ranges],
            "quality": [
                {"min": one.min, "keep_share": one.keep_share, "scorer_kwargs": one.scorer_kwargs}
                for one in keys.quality
            ],
        },
        "scorers": reward_digest(scorers) if scorers else None,
        "decontaminated": suite_digests(keys.decontaminate),
    }
