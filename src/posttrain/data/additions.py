"""What a source adds to each of its rows: a system message where there is none, and the end of every answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from posttrain.config.datasets import DatasetKeys
from posttrain.errors import DataError
from posttrain.types import (
    Example,
    LabelledCompletion,
    Message,
    Origin,
    PreferencePair,
    Prompt,
    SteppedCompletion,
    Text,
)

Noun = Example | PreferencePair | LabelledCompletion | SteppedCompletion | Prompt


def with_additions(noun: Noun, source: DatasetKeys) -> Noun:
    """Raises: DataError for a row that has no place for what is to be added."""
    if source.default_system:
        noun = _with_system(noun, source.default_system)
    return _with_suffix(noun, source.completion_suffix) if source.completion_suffix else noun


def _with_system(noun: Noun, system: str) -> Noun:
    if isinstance(noun, Example):
        if not noun.messages:
            raise _misplaced(noun.origin, "default_system", "text", "a conversation")
        return replace(noun, messages=_led(noun.messages, system))
    if isinstance(noun.prompt, str):
        raise _misplaced(noun.origin, "default_system", "text", "a conversation")
    return replace(noun, prompt=_led(noun.prompt, system))


def _led(messages: Sequence[Message], system: str) -> tuple[Message, ...]:
    """An empty system message counts as none."""
    given = messages[:1] if messages and messages[0]["role"] in ("system", "developer") else ()
    if given and given[0]["content"]:
        return tuple(messages)
    return ({"role": "system", "content": system}, *messages[len(given) :])


def _with_suffix(noun: Noun, suffix: str) -> Noun:
    def ended(answer: Text) -> str:
        if not isinstance(answer, str):
            raise _misplaced(noun.origin, "completion_suffix", "a conversation", "text")
        return answer + suffix

    if isinstance(noun, PreferencePair):
        return replace(noun, chosen=ended(noun.chosen), rejected=ended(noun.rejected))
    if isinstance(noun, LabelledCompletion):
        return replace(noun, completion=ended(noun.completion))
    if isinstance(noun, Prompt | SteppedCompletion):
        got = "a prompt" if isinstance(noun, Prompt) else "an answer in steps"
        raise _misplaced(noun.origin, "completion_suffix", got, "an answer in text")
    return replace(noun, completion=ended(noun.messages or noun.completion))


def _misplaced(origin: Origin, key: str, got: str, expected: str) -> DataError:
    return DataError(
        f"{origin}: {key} is set for this source, and the row is {got}; expected {expected}; take {key} out"
    )
