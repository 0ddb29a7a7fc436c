"""What a lint looks at, and the texts of a row. Knows no rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from posttrain.config.datasets import RowKind
from posttrain.data import overlap, render
from posttrain.data.formats import Noun
from posttrain.types import (
    Example,
    LabelledCompletion,
    Message,
    Origin,
    PreferencePair,
    Prompt,
    SteppedCompletion,
    Text,
    TokenSeq,
)

T = TypeVar("T")

SAMPLED_ROWS = 500
"""Rows of which the template is checked, spread evenly."""
DECODED_ROWS = 2_000
"""Rows of which the mask is decoded."""
GOLD_ROWS = 2_000
"""Rows of which the gold answer is scored, before a run; `posttrain data` scores all."""
CODE_GOLD_ROWS = 50
"""The same where gold answers are programs, which have to be run."""


@dataclass(frozen=True, slots=True)
class LintInput:
    """Rows as parsed (`nouns`) and as rendered (`rendered`, one tuple of sequences per row that was kept).

    `skipped` are the rows that loading left out, by reason; `suites` the prompts of each eval suite. `check_golds` says of
    each prompt why the reward cannot score its gold answer, or None. `own_template` is the tokenizer's template where
    another one is used.
    """

    row_kind: RowKind
    nouns: Sequence[Noun]
    rendered: Sequence[tuple[TokenSeq, ...]]
    tokenizer: Any
    sequence_len: int
    train_on: render.TrainOn = "assistant"
    eval_nouns: Sequence[Noun] = ()
    suites: Mapping[str, Sequence[str]] = field(default_factory=dict)
    skipped: Mapping[str, Sequence[Origin]] = field(default_factory=dict)
    check_golds: Callable[[Sequence[Prompt]], Sequence[str | None]] | None = None
    gold_rows: int | None = GOLD_ROWS
    own_template: str | None = None
    hashed: dict[str, list[overlap.Words]] = field(default_factory=dict, compare=False)

    @property
    def num_rows(self) -> int:
        return len({noun.origin for noun in self.nouns} | {at for rows in self.skipped.values() for at in rows})

    @property
    def rows(self) -> list[Noun]:
        """A pair that was unpaired for KTO gives two nouns of one row: they are no duplicates of each other."""
        seen: dict[tuple[Origin, bool], Noun] = {}
        for noun in self.nouns:
            label = noun.label if isinstance(noun, LabelledCompletion) else True
            seen.setdefault((noun.origin, label), noun)
        return list(seen.values())

    def words(self, name: str, text: Callable[[Noun], str]) -> list[overlap.Words]:
        """The word hashes of every row's `text`, made once per `name`."""
        if name not in self.hashed:
            self.hashed[name] = overlap.hash_words([text(noun) for noun in self.rows])
        return self.hashed[name]


def spread(items: Sequence[T], most: int | None) -> list[T]:
    """At most `most` of `items`, evenly spaced."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[i * len(items) // most] for i in range(most)]


def plain_text(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text)


def prompt_of(noun: Noun) -> str:
    if isinstance(noun, Example):
        return noun.prompt if not noun.messages else "\n".join(others_of(noun.messages))
    return plain_text(noun.prompt)


def answers_of(noun: Noun) -> tuple[str, ...]:
    if isinstance(noun, Example):
        spoken = [m["content"] for m in noun.messages if m["role"] == "assistant"]
        return tuple(spoken) if noun.messages else (noun.completion,)
    if isinstance(noun, PreferencePair):
        return (plain_text(noun.chosen), plain_text(noun.rejected))
    if isinstance(noun, SteppedCompletion):
        return ("\n".join(noun.steps),)
    return (plain_text(noun.completion),) if isinstance(noun, LabelledCompletion) else ()


def whole(noun: Noun) -> str:
    return "\n".join((prompt_of(noun), *answers_of(noun)))


def others_of(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages if m["role"] != "assistant"]


def messages_of(noun: Noun) -> tuple[Message, ...]:
    """The conversation a row renders; () for text."""
    if isinstance(noun, Example):
        return noun.messages
    if isinstance(noun.prompt, str):
        return ()
    if isinstance(noun, Prompt):
        return noun.prompt
    if isinstance(noun, SteppedCompletion):
        return ()  # what is behind the question is no message
    answer = noun.chosen if isinstance(noun, PreferencePair) else noun.completion
    return (*noun.prompt, *answer) if not isinstance(answer, str) else noun.prompt


def origin_of(seqs: tuple[TokenSeq, ...]) -> Origin:
    return seqs[0].origin or Origin("?", 0)
