"""The scorers of an eval suite by name, and the digest of everything they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from posttrain.files import digest_json
from posttrain.grading import answers
from posttrain.grading.equality import equal_values
from posttrain.grading.numbers import normalise
from posttrain.grading.schema import NotJsonError, conforms, read_json_text, same_json
from posttrain.names import ENVIRONMENT
from posttrain.numerics import revision

AnswerScorer = Callable[[str, str | None, Mapping[str, Any]], float | None]
"""(completion, target, the item's other columns) → score, or None when the item has nothing to score against."""


def _against_target(check: Callable[[str, str], bool]) -> AnswerScorer:
    def score(text: str, target: str | None, columns: Mapping[str, Any]) -> float | None:
        return None if target is None or not str(target).strip() else float(check(text, str(target)))

    return score


def _of_text(check: Callable[[str], bool]) -> AnswerScorer:
    return lambda text, target, columns: float(check(text))


def _contains(text: str, target: str) -> bool:
    return target in (answers.visible(text) or "")


def _regex(text: str, target: str | None, columns: Mapping[str, Any]) -> float | None:
    # The pattern is the suite author's: it is trusted to be linear.
    try:
        return float(re.search(target, answers.visible(text) or "") is not None) if target else None
    except (re.error, RecursionError, OverflowError):
        return None


def score_json(text: str, schema: Any, expected: Any = None, *, strict: bool = False) -> bool:
    """Whether the visible text is one JSON value that fits `schema` and, where given, equals `expected`."""
    try:
        value = read_json_text(answers.visible(text) or "")
    except NotJsonError:
        return False
    return conforms(value, schema, strict=strict) and (expected is None or same_json(value, expected))


def _json_schema(text: str, target: str | None, columns: Mapping[str, Any]) -> float | None:
    """The schema is the column `schema`, with `target` the expected value; or the target itself. The column `strict` closes objects."""
    try:
        schema = columns.get("schema", target)
        schema = read_json_text(schema) if isinstance(schema, str) else schema
        expected = read_json_text(target) if target and "schema" in columns else None
        return float(score_json(text, schema, expected, strict=columns.get("strict") is True))
    except ValueError:  # no schema, or no JSON
        return None


SCORERS: dict[str, AnswerScorer] = {
    "boxed": _against_target(partial(answers.is_boxed, same=equal_values)),
    "number": _against_target(partial(answers.is_number, same=answers.same_in_prose)),
    "last_number": _against_target(answers.is_last_number),
    "math": _against_target(partial(answers.is_boxed, same=equal_values)),
    "choice": _against_target(partial(answers.is_choice, same=answers.same_letter_anyhow)),
    "exact": _against_target(answers.is_exact),
    "contains": _against_target(_contains),
    "regex": _regex,
    "format": _of_text(answers.has_think_format),
    "clean": _of_text(answers.is_clean),
    "json_schema": _json_schema,
    ENVIRONMENT: lambda text, target, columns: columns.get("env_reward"),
}


def unusable(name: str, target: str | None, columns: Mapping[str, Any]) -> str:
    """Why no answer could be right by the scorer `name` ("" if one can): what it would only say of the first answer."""
    if SCORERS[name]("null", target, columns) is None:
        return _UNUSABLE.get(name, "it needs a `target`")
    if target is None or name not in _READABLE:
        return ""
    can_be_read, expected = _READABLE[name]
    return "" if can_be_read(target) else f"its `target` {target[:80]!r} is {expected}"


_UNUSABLE = {
    "regex": "its `target` must be a pattern of Python's `re`",
    "json_schema": "it needs a JSON schema in the column `schema` or in `target`, and beside the column a `target` that is JSON",
    ENVIRONMENT: "",  # the episode says it
}
_NO_ANSWER: tuple[Callable[[str], bool], str] = (
    lambda target: bool(normalise(answers.reference_answer(target))),
    "empty, or too long to be an answer",
)
_READABLE: dict[str, tuple[Callable[[str], bool], str]] = {
    "boxed": _NO_ANSWER,
    "math": _NO_ANSWER,
    "number": _NO_ANSWER,
    "last_number": (lambda target: answers.is_last_number(target, target), "no number"),
    "choice": (lambda target: answers.same_letter_anyhow(*[answers.reference_answer(target)] * 2), "no letter"),
}
"""Scorer → what its target must be, and what one is that is not."""


def grading_digest() -> str:
    """Digest of the numbers of this package."""
    return digest_json(["grading", revision("grading")])


def scorer_digest(name: str) -> str:
    """Digest of a scorer: its name and the numbers of the grading package. Raises: KeyError for an unknown name."""
    if name not in SCORERS:
        raise KeyError(f"scorer {name!r} is unknown; expected one of {', '.join(SCORERS)}")
    return digest_json([name, grading_digest()])
