"""Answers in OpenAI's form, whole or in chunks; one class per endpoint."""

from __future__ import annotations

import secrets
import string
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.tool_calls import CallSyntax, SaidCall
from posttrain.rollout.decoding import Likeliest
from posttrain.serve.answering import Choice, likeliest_of
from posttrain.serve.codec import ServedCodec
from posttrain.serve.pool import ServedModel
from posttrain.serve.text import TextPiece

_ALPHANUMERIC = string.ascii_letters + string.digits


class AnswerShape(ABC):
    """What surrounds the choices is the same everywhere. `model` is the immutable name of what answered."""

    kind: str
    prefix: str
    chunk_kind: str

    def __init__(self, served: ServedModel) -> None:
        self.codec = served.codec
        self._around = {
            "id": f"{self.prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": served.version.id,
            "system_fingerprint": served.version.digest,
        }  # fmt: skip

    def opening(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        return []

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._around, "object": self.kind, "choices": [self._choice(c) for c in choices], "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> dict[str, Any]:
        found = {**self._around, "object": self.chunk_kind, "choices": choices}
        return found if usage is None else {**found, "usage": usage}

    @abstractmethod
    def _choice(self, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def deltas(self, choice: Choice, piece: TextPiece) -> list[dict[str, Any]]:
        """The `choices` entries of the chunks that a piece makes."""
        ...


class CompletionShape(AnswerShape):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(
        self, served: ServedModel, num_top: int | None, echoed: Sequence[EchoedPrompt] = (), per_prompt: int = 1
    ) -> None:
        super().__init__(served)
        self._num_top, self._echoed, self._per_prompt = num_top, echoed, per_prompt

    def opening(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return [self.chunk([self._entry(c.index, e.text, [e.logprobs], None)]) for c, e in self._pairs(choices)]

    def _pairs(self, choices: Sequence[Choice]) -> list[tuple[Choice, EchoedPrompt]]:
        return [(c, self._echoed[c.index // self._per_prompt]) for c in choices] if self._echoed else []

    def _choice(self, choice: Choice) -> dict[str, Any]:
        echoed = self._echoed[choice.index // self._per_prompt] if self._echoed else None
        parts = [self._logprobs(choice.pieces, 0 if echoed is None else len(echoed.text))]
        text = choice.said
        if echoed is not None:
            parts, text = [echoed.logprobs, *parts], echoed.text + text
        return self._entry(choice.index, text, parts, choice.finish)

    def deltas(self, choice: Choice, piece: TextPiece) -> list[dict[str, Any]]:
        if not (piece.text or piece.tokens or choice.finish):
            return []
        offset = len(self._echoed[choice.index // self._per_prompt].text) if self._echoed else 0
        return [self._entry(choice.index, piece.text, [self._logprobs([piece], offset)], choice.finish)]

    def _entry(self, index: int, text: str, parts: Sequence[Any], finish: str | None) -> dict[str, Any]:
        known = [part for part in parts if part is not None]
        joined = {key: [value for part in known for value in part[key]] for key in known[0]} if known else None
        return {"index": index, "text": text, "logprobs": joined, "finish_reason": finish}

    def _logprobs(self, pieces: Sequence[TextPiece], offset: int) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        tokens = likeliest_of(pieces)
        return listed_logprobs(
            self.codec, [t for t, _, _ in tokens], [at + offset for _, at, _ in tokens], [one for _, _, one in tokens]
        )


@dataclass(frozen=True)
class EchoedPrompt:
    text: str
    logprobs: dict[str, Any] | None


def listed_logprobs(
    codec: ServedCodec, ids: Sequence[int], offsets: Sequence[int], likeliest: Sequence[Likeliest | None]
) -> dict[str, Any]:
    """As /v1/completions writes them; the first token of a prompt has none."""
    return {
        "tokens": [codec.token_text(token) for token in ids],
        "token_logprobs": [None if one is None else _finite(one.logp) for one in likeliest],
        "top_logprobs": [None if one is None else _top(codec, token, one) for token, one in zip(ids, likeliest, strict=True)],
        "text_offset": list(offsets),
    }  # fmt: skip


def _top(codec: ServedCodec, token: int, one: Likeliest) -> dict[str, float]:
    """The likeliest, and the token itself. Two tokens with one text keep the likelier."""
    found: dict[str, float] = {}
    for other, logp in [*one.top, (token, one.logp)]:
        found.setdefault(codec.token_text(other), _finite(logp))
    return found


class ChatShape(AnswerShape):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def __init__(self, served: ServedModel, num_top: int | None, syntax: CallSyntax | None) -> None:
        super().__init__(served)
        self._num_top, self._syntax = num_top, syntax
        self._sent: dict[int, int] = {}
        """Choice → characters of its text that went out."""

    def opening(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        return [self.chunk([self._delta(c.index, {"role": "assistant", "content": ""}, None, None)]) for c in choices]

    def _choice(self, choice: Choice) -> dict[str, Any]:
        content, calls = self._split(choice.said)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = self._calls(calls)
        finish = "tool_calls" if calls and choice.finish == "stop" else choice.finish
        return {
            "index": choice.index, "message": message, "logprobs": self._logprobs(choice.pieces), "finish_reason": finish,
        }  # fmt: skip

    def deltas(self, choice: Choice, piece: TextPiece) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        logprobs = self._logprobs([piece]) if piece.tokens else None
        said, sent = choice.said, self._sent.get(choice.index, 0)
        calls: list[SaidCall] = []
        if choice.finish is None:
            stop = self._certain(said)
        else:
            content, calls = self._split(said)
            stop = len(content)
        if stop > sent or logprobs is not None:
            found.append(self._delta(choice.index, {"content": said[sent : max(stop, sent)]}, logprobs, None))
            self._sent[choice.index] = max(stop, sent)
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(self._calls(calls))]
            found.append(self._delta(choice.index, {"tool_calls": numbered}, None, None))
        if choice.finish is not None:
            finish = "tool_calls" if calls and choice.finish == "stop" else choice.finish
            found.append(self._delta(choice.index, {}, None, finish))
        return found

    def _split(self, said: str) -> tuple[str, list[SaidCall]]:
        if self._syntax is None:
            return said, []
        words, calls = self._syntax.split(said)
        return ("" if calls and not words.strip() else words), calls

    def _certain(self, said: str) -> int:
        """Characters that are no part of a call, whatever comes."""
        if self._syntax is None:
            return len(said)
        return self._syntax.certain(said) if said.strip() else 0

    def _calls(self, calls: Sequence[SaidCall]) -> list[dict[str, Any]]:
        # Nine letters and digits: what Mistral's templates take back, and nobody minds.
        return [
            {
                "id": "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9)),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments in calls
        ]

    def _delta(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, pieces: Sequence[TextPiece]) -> dict[str, Any] | None:
        if self._num_top is None:
            return None
        found: list[dict[str, Any]] = []
        for token, _, one in likeliest_of(pieces):
            top = [self._token(other, logp) for other, logp in one.top]
            found.append({**self._token(token, one.logp), "top_logprobs": top})
        return {"content": found, "refusal": None}

    def _token(self, token: int, logp: float) -> dict[str, Any]:
        return {
            "token": self.codec.token_text(token),
            "logprob": _finite(logp),
            "bytes": list(self.codec.token_bytes(token)),
        }


def _finite(logp: float) -> float:
    """As OpenAI writes what cannot happen: JSON has no infinity."""
    return max(logp, -9999.0)
