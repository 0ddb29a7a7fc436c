"""Which characters of a rendered conversation are the assistant's own: the source of every chat loss mask.

Three ways, tried in this order; each is exact or not taken:
1. `{% generation %}` markers of the template;
2. prefixes: the turn begins where the conversation before it, with a generation prompt, ends, counted from the start of
   the text or, for templates that move text about (Mistral: the tools), from the end of the message before;
3. a stand-in: the turn's content is replaced by a unique word; what stands before and after it must be found unchanged
   in the real rendering. This is for templates that rewrite earlier turns (Qwen3 removes their thinking).
A span ends after the end-of-turn token; the newline behind it is never generated, so it is not trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.forms import Fitted
from posttrain.data.template import (
    Span,
    added_tokens,
    end_of_turn,
    has_generation_markers,
    last_tail,
    render_marked,
    render_text,
    template_text,
)
from posttrain.errors import DataError
from posttrain.types import Message

_STAND_IN = "posttrainstandin7f3a"
_ANSWER = {"role": "assistant", "content": _STAND_IN}


@dataclass(frozen=True, slots=True)
class Spans:
    """A rendered conversation and the span of each trained turn, in order. `rewritten` counts turns found by way 3."""

    text: str
    spans: tuple[Span, ...]
    rewritten: int = 0


def assistant_spans(tokenizer: Any, fitted: Fitted, turns: Sequence[int]) -> Spans:
    """The spans of `fitted.messages[i]` for i in `turns`. Raises: DataError if they cannot be told exactly."""
    messages, tools, text = fitted.messages, fitted.tools, fitted.text
    if has_generation_markers(template_text(tokenizer, tools)):
        _, marked = render_marked(tokenizer, messages, tools)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(marked) == len(answers):
            wanted = [
                _with_end(tokenizer, text, span) for i, span in zip(answers, marked, strict=True) if i in set(turns)
            ]
            return Spans(text, tuple(wanted))
    conversation = _RenderedChat(tokenizer, messages, tools, text)
    spans: list[Span] = []
    rewritten = 0
    for turn in turns:
        span = conversation.by_prefix(turn)
        if span is None:
            span = conversation.by_stand_in(turn)
            rewritten += 1
        if span is None or (spans and span[0] < spans[-1][1]):
            raise DataError(
                f"the chat template rewrites turn {turn + 1} of {len(messages)}, so which tokens are the assistant's cannot be "
                "told exactly; set `train_on: last`, or a `chat_template` with {% generation %} markers"
            )
        spans.append(span)
    return Spans(text, tuple(spans), rewritten)


@dataclass(frozen=True, slots=True)
class _Anchor:
    """A place in the real rendering that is found again in others: its start, or the end of a message's text (`message`)."""

    at: int
    message: int | None = None


@dataclass(frozen=True, slots=True)
class _RenderedChat:
    tokenizer: Any
    messages: Sequence[Message]
    tools: Sequence[Any]
    text: str

    def by_prefix(self, turn: int) -> Span | None:
        for anchor, start in self._starts(turn):
            last = turn + 1 == len(self.messages)
            through = self.text[anchor.at :] if last else self._behind(anchor, self.messages[: turn + 1], False)
            if through is None or not self.text.startswith(through, anchor.at):
                continue
            end = anchor.at + len(through)
            if end >= start:
                return start, _trim(self.tokenizer, self.text, start, end)
        return None

    def by_stand_in(self, turn: int) -> Span | None:
        cut = self._cut([*self.messages[:turn], _ANSWER, *self.messages[turn + 1 :]])
        if cut is None:
            return None
        before, after = cut
        start = next((start for _, start in self._starts(turn) if start <= len(before)), len(before))
        end = len(self.text) - len(after)
        token = end_of_turn(self.tokenizer)
        if token and after.startswith(token):
            return start, end + len(token)
        return start, _trim(self.tokenizer, self.text, start, end)

    def _starts(self, turn: int) -> Iterator[tuple[_Anchor, int]]:
        """Where the text may begin that the model writes: where a generation prompt ends, else where an answer would begin."""
        for anchor in self._anchors(turn):
            prompt = self._behind(anchor, self.messages[:turn], True)
            if prompt is not None and self.text.startswith(prompt, anchor.at):
                yield anchor, anchor.at + len(prompt)
        answered = self._try_render([*self.messages[:turn], _ANSWER], False)
        if answered is not None and answered.count(_STAND_IN) == 1:
            before = answered.partition(_STAND_IN)[0]
            if self.text.startswith(before):
                yield _Anchor(0), len(before)

    def _anchors(self, turn: int) -> Iterator[_Anchor]:
        """The start of the text; then the end of the message before, for templates that write earlier ones otherwise."""
        yield _Anchor(0)
        if not turn or _STAND_IN in self.text:
            return
        marked = self._marked(turn - 1)
        cut = self._cut([*self.messages[: turn - 1], marked, *self.messages[turn:]])
        if cut is not None and len(cut[0]) + len(cut[1]) == len(self.text):
            yield _Anchor(len(cut[0]), turn - 1)

    def _behind(self, anchor: _Anchor, messages: Sequence[Message], prompt: bool) -> str | None:
        """What the rendering of `messages` holds behind the anchor."""
        if anchor.message is None:
            return self._try_render(messages, prompt)
        marked = [self._marked(i) if i == anchor.message else m for i, m in enumerate(messages)]
        shown = self._try_render(marked, prompt)
        return shown.partition(_STAND_IN)[2] if shown is not None and shown.count(_STAND_IN) == 1 else None

    def _marked(self, number: int) -> Message:
        return {**self.messages[number], "content": f"{self.messages[number]['content']}{_STAND_IN}"}

    def _cut(self, messages: Sequence[Message]) -> tuple[str, str] | None:
        """What a rendering with one stand-in holds before and behind it, if the real one begins and ends so."""
        shown = self._try_render(messages, False)
        if shown is None or shown.count(_STAND_IN) != 1 or _STAND_IN in self.text:
            return None
        before, _, after = shown.partition(_STAND_IN)
        fits = self.text.startswith(before) and self.text.endswith(after) and len(before) + len(after) <= len(self.text)
        return (before, after) if fits else None

    def _try_render(self, messages: Sequence[Message], prompt: bool) -> str | None:
        """A part of a conversation, or `None` where the template refuses it (some want a user turn first)."""
        try:
            return render_text(self.tokenizer, messages, self.tools, prompt)
        except DataError:
            return None


def _with_end(tokenizer: Any, text: str, span: Span) -> Span:
    """A marked span through its end-of-turn token, which many templates write behind `{% endgeneration %}`."""
    start, end = span
    token = end_of_turn(tokenizer)
    trimmed = _trim(tokenizer, text, start, end)
    if token and not text[start:trimmed].endswith(token) and text.startswith(token, end):
        return start, end + len(token)
    return start, trimmed


def _trim(tokenizer: Any, text: str, start: int, end: int) -> int:
    """`end` without what stands behind the end of turn: white space, and what a template writes behind the last turn."""
    tail, token = last_tail(tokenizer), end_of_turn(tokenizer)
    if token and end == len(text) and text.endswith(tail) and len(tail) <= end - start:
        return end - len(tail) + tail.index(token) + len(token)
    bare = start + len(text[start:end].rstrip())
    return bare if text[start:bare].endswith(added_tokens(tokenizer)) else end
