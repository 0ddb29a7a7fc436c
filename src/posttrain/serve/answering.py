"""The answers to one request while they are decoded: rows in, pieces of text out, nothing left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass, field

from posttrain.rollout.decoding import DecodingRow, Ends, Likeliest, Shaper
from posttrain.rollout.sampling import request_seed, stop_test
from posttrain.serve.codec import ServedCodec
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.loop import News
from posttrain.serve.pool import Lease
from posttrain.serve.text import AnswerText, Detokenizer, TextPiece
from posttrain.serve.wire import Asked
from posttrain.types import Finish, Request, SamplingParams


@dataclass(eq=False)
class Choice:
    """One answer: its place among the request's, its row, and its text so far."""

    index: int
    row: DecodingRow
    text: AnswerText
    pieces: list[TextPiece] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def said(self) -> str:
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class Wanted:
    """What is to be sampled for each choice of a request."""

    prompts: Sequence[tuple[int, ...]]
    max_tokens: Sequence[int]
    num_choices: int
    num_top: int | None = None
    shown_ids: Collection[int] = ()
    """Special tokens that are part of the text after all."""


def asked_params(asked: Asked, max_tokens: int) -> SamplingParams:
    """OpenAI's defaults where nothing is said."""
    return SamplingParams(
        max_tokens, 1.0 if asked.temperature is None else asked.temperature, asked.top_p or 1.0, asked.top_k or 0, asked.min_p or 0.0,
        stop=tuple(asked.stop), stop_token_ids=tuple(asked.stop_token_ids),
    )  # fmt: skip


def make_choices(
    lease: Lease, asked: Asked, wanted: Wanted, seed: int, shapers: Sequence[Shaper | None]
) -> list[Choice]:
    """Answer `number` of a request is drawn with `request_seed("serve", seed, number)`."""
    codec, choices = lease.served.codec, list[Choice]()
    stop_ids = codec.stop_ids | set(asked.stop_token_ids)
    hidden = codec.hidden_ids - set(wanted.shown_ids)
    for number, shaper in enumerate(shapers):
        place = number // wanted.num_choices
        prompt, max_tokens = wanted.prompts[place], wanted.max_tokens[place]
        params = asked_params(asked, max_tokens)
        request = Request(prompt, request_seed("serve", seed, number))
        ends = Ends(max_tokens, stop_ids, stop_test(params.stop, _stop_text(codec, hidden)))
        row = DecodingRow(
            number, request, params, ends,
            adapter=lease.served.adapter, shaper=shaper, num_top=wanted.num_top,
        )  # fmt: skip
        choices.append(Choice(number, row, AnswerText(Detokenizer(codec.decode, hidden), params.stop, stop_ids)))
    return choices


def _stop_text(codec: ServedCodec, hidden: Collection[int]):
    """Stop strings are looked for in what the client gets to see."""
    return lambda ids: codec.text(ids, hidden)


class Answering:
    """The choices of one request, and the model that it holds."""

    def __init__(self, lease: Lease, choices: Sequence[Choice]) -> None:
        self.lease, self.choices = lease, choices
        self._news: asyncio.Queue[tuple[Choice, News]] = asyncio.Queue()
        self.begun_s = time.monotonic()
        self.first_s: float | None = None

    async def pieces(self) -> AsyncGenerator[tuple[Choice, TextPiece]]:
        """What is new of some choice, until all have ended. Closing it frees every row (`contextlib.aclosing`).

        Raises: ApiRefusal if the engine cannot go on, or the server's drain is over.
        """
        engine = self.lease.served.rows
        for choice in self.choices:
            engine.submit(choice.row, lambda news, choice=choice: self._news.put_nowait((choice, news)))
        open_choices = len(self.choices)
        try:
            while open_choices:
                choice, news = await self._news.get()
                if news.failure or news.refusal or news.finish == "aborted":
                    raise _interrupted(news)
                self.first_s = self.first_s or time.monotonic()
                choice.finish = news.finish
                piece = choice.text.push(news.ids, news.likeliest, news.finish)
                choice.pieces.append(piece)
                open_choices -= news.is_last
                yield choice, piece
        finally:
            for choice in self.choices:
                if choice.finish is None:
                    engine.cancel(choice.row)

    @property
    def num_sampled(self) -> int:
        return sum(choice.text.num_tokens for choice in self.choices)


def _interrupted(news: News) -> ApiRefusal:
    if news.refusal:
        return bad_request(news.refusal)
    if news.finish == "aborted":
        return ApiRefusal(
            500, "the grammar allows no token of this tokenizer at this place", code="grammar_without_tokens"
        )
    return ApiRefusal(
        503, f"the answer was interrupted: {news.failure}; ask again", code="interrupted", retry_after_s=1
    )


def likeliest_of(pieces: Sequence[TextPiece]) -> list[tuple[int, int, Likeliest]]:
    """Token, where its text begins, and what was likely there."""
    return [
        (token.id, token.start, token.likeliest)
        for piece in pieces
        for token in piece.tokens
        if token.likeliest is not None
    ]
