"""Which characters of a rendered conversation are the assistant's own: the source of every chat loss mask.

Three ways, tried in this order; each is exact or not taken:
1. `{% generation %}` markers of the template;
2. prefixes: the turn begins where the conversation before it, with a generation prompt, ends;
3. a stand-in: the turn's content is replaced by a unique word; what stands before and after it must be found unchanged
   in the real rendering. This is for templates that rewrite earlier turns (Qwen3 removes their thinking).
A span ends after the end-of-turn token; the newline behind it is never generated, so it is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.data.template import (
    Span,
    added_tokens,
    end_of_turn,
    has_generation_markers,
    render_marked,
    render_text,
    template_text,
)
from posttrain.errors import DataError
from posttrain.types import Message

_STAND_IN = "posttrainstandin7f3a"


@dataclass(frozen=True, slots=True)
class Spans:
    """A rendered conversation and the span of each trained turn, in order. `rewritten` counts turns found by way 3."""

    text: str
    spans: tuple[Span, ...]
    rewritten: int = 0


def assistant_spans(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], turns: Sequence[int]) -> Spans:
    """The spans of `messages[i]` for i in `turns`. Raises: DataError if they cannot be told exactly."""
    if has_generation_markers(template_text(tokenizer, tools)):
        text, marked = render_marked(tokenizer, messages, tools)
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if len(marked) == len(answers):
            wanted = [
                _with_end(tokenizer, text, span) for i, span in zip(answers, marked, strict=True) if i in set(turns)
            ]
            return Spans(text, tuple(wanted))
    text = render_text(tokenizer, messages, tools)
    spans: list[Span] = []
    rewritten = 0
    for turn in turns:
        span = _by_prefix(tokenizer, text, messages, tools, turn)
        if span is None:
            span = _by_stand_in(tokenizer, text, messages, tools, turn)
            rewritten += 1
        if span is None or (spans and span[0] < spans[-1][1]):
            raise DataError(
                f"the chat template rewrites turn {turn + 1} of {len(messages)}, so which tokens are the assistant's cannot be "
                "told exactly; set `train_on: last`, or a `chat_template` with {% generation %} markers"
            )
        spans.append(span)
    return Spans(text, tuple(spans), rewritten)


def _by_prefix(tokenizer: Any, text: str, messages: Sequence[Message], tools: Sequence[Any], turn: int) -> Span | None:
    before = _try_render(tokenizer, messages[:turn], tools, True)
    if before is None or not text.startswith(before):
        return None
    last = turn + 1 == len(messages)
    through = text if last else _try_render(tokenizer, messages[: turn + 1], tools, False)
    if through is None or not text.startswith(through) or len(through) < len(before):
        return None
    return len(before), _trim(tokenizer, text, len(before), len(through))


def _by_stand_in(
    tokenizer: Any, text: str, messages: Sequence[Message], tools: Sequence[Any], turn: int
) -> Span | None:
    stand_in = {"role": "assistant", "content": _STAND_IN}
    shown = _try_render(tokenizer, [*messages[:turn], stand_in, *messages[turn + 1 :]], tools, False)
    if shown is None or shown.count(_STAND_IN) != 1 or _STAND_IN in text:
        return None
    before, _, after = shown.partition(_STAND_IN)
    if not (text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)):
        return None
    prompt = _try_render(tokenizer, messages[:turn], tools, True)
    start = len(prompt) if prompt is not None and before.startswith(prompt) else len(before)
    end = len(text) - len(after)
    token = end_of_turn(tokenizer)
    return start, end + len(token) if token and after.startswith(token) else _trim(tokenizer, text, start, end)


def _with_end(tokenizer: Any, text: str, span: Span) -> Span:
    """A marked span through its end-of-turn token, which many templates write behind `{% endgeneration %}`."""
    start, end = span
    token = end_of_turn(tokenizer)
    trimmed = _trim(tokenizer, text, start, end)
    if token and not text[start:trimmed].endswith(token) and text.startswith(token, end):
        return start, end + len(token)
    return start, trimmed


def _trim(tokenizer: Any, text: str, start: int, end: int) -> int:
    """`end` without the white space behind the last token, if that token is one the tokenizer knows as a whole."""
    bare = start + len(text[start:end].rstrip())
    return bare if text[start:bare].endswith(added_tokens(tokenizer)) else end


def _try_render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], prompt: bool) -> str | None:
    """A part of a conversation, or `None` where the template refuses it (some want a user turn first)."""
    try:
        return render_text(tokenizer, messages, tools, prompt)
    except DataError:
        return None
