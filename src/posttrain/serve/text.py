"""Tokens to the text of an answer while it is being sampled: whole characters only, nothing of a stop string.

Streams and whole answers are made by the same steps, so that they are the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from posttrain.rollout.decoding import Likeliest
from posttrain.types import Finish

_BROKEN = "\ufffd"


class Detokenizer:
    """Text of ids that come one by one. Tokens in `hidden` have none.

    A token's text depends on its neighbours (bytes of one character, SentencePiece's spaces), so each piece is the difference
    of two texts: that of the last few tokens with the new ones and without.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden: Collection[int] = ()) -> None:
        self._decode, self._hidden = decode, frozenset(hidden)
        self._ids: list[int] = []
        self._from, self._read = 0, 0

    def push(self, token: int) -> str:
        """What is certain now."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        before, after = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        if len(after) <= len(before) or after.endswith(_BROKEN):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return after[len(before) :]

    def flush(self) -> str:
        """The rest, in which bytes that are no character are replaced."""
        before, after = self._decode(self._ids[self._from : self._read]), self._decode(self._ids[self._from :])
        self._from = self._read = len(self._ids)
        return after[len(before) :]


@dataclass(frozen=True, slots=True)
class SpokenToken:
    """A sampled token and where its text begins in the answer."""

    id: int
    start: int
    likeliest: Likeliest | None


@dataclass(frozen=True, slots=True)
class TextPiece:
    """The next text of an answer, with the tokens that it is made of."""

    text: str = ""
    tokens: tuple[SpokenToken, ...] = ()


class AnswerText:
    """An answer as text; what may be the beginning of one of `stops` is held back until it is known to be or not.

    `stop_ids` end an answer and are no part of its text.
    """

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str], stop_ids: Collection[int]) -> None:
        self._detokenizer, self._stops, self._stop_ids = detokenizer, tuple(stops), frozenset(stop_ids)
        self._held = ""
        self._out = 0  # characters handed out
        self._tokens: list[SpokenToken] = []
        self.num_tokens = 0

    def push(self, ids: Sequence[int], likeliest: Sequence[Likeliest], finish: Finish | None) -> TextPiece:
        """The tokens that were sampled since the last call, and how the answer ended with them, if it did."""
        self.num_tokens += len(ids)
        for number, token in enumerate(ids):
            is_end = finish == "stop" and number == len(ids) - 1 and token in self._stop_ids
            start = self._out + len(self._held)
            self._held += "" if is_end else self._detokenizer.push(token)
            if not is_end:
                self._tokens.append(SpokenToken(token, start, likeliest[number] if likeliest else None))
        if finish is None:
            return self._taken(len(self._held) - self._longest_beginning())
        self._held += self._detokenizer.flush()
        cut = min((at for at in (self._held.find(stop) for stop in self._stops) if at >= 0), default=len(self._held))
        if finish == "length" and cut == len(self._held):
            return self._taken(cut, everything=True)
        return self._taken(cut)

    def _longest_beginning(self) -> int:
        """Characters at the end of what is held that may become a stop string."""
        longest = max((len(stop) for stop in self._stops), default=0)
        return next(
            (n for n in range(min(longest, len(self._held)), 0, -1) if any(s.startswith(self._held[-n:]) for s in self._stops)), 0
        )  # fmt: skip

    def _taken(self, count: int, *, everything: bool = False) -> TextPiece:
        text, self._held = self._held[:count], self._held[count:]
        self._out += count
        mine = [token for token in self._tokens if everything or token.start < self._out]
        self._tokens = self._tokens[len(mine) :]
        return TextPiece(text, tuple(mine))
