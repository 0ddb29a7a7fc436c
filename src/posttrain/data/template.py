"""The chat template: where it comes from, its digest, and messages → text → ids.

Text, not ids, is what the loss mask is derived from (`spans`), so rendering and tokenising are apart here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jinja2

from posttrain.config.chat_template import chat_template
from posttrain.errors import DataError
from posttrain.files import digest_json
from posttrain.types import Message

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MOST_CHARACTERS = 1 << 20
_PROBE = ({"role": "user", "content": "posttrain-question"}, {"role": "assistant", "content": "posttrain-answer"})


def use_template(tokenizer: Any, path: str | None, kwargs: Mapping[str, Any] | None = None) -> None:
    """Give `tokenizer` the Jinja file at `path` (None keeps its own) and `kwargs` as the template's defaults.

    It is saved with the model. Raises: ConfigError.
    """
    tokenizer.chat_template = chat_template(tokenizer.chat_template, path, kwargs or {})


def template_text(tokenizer: Any, tools: Sequence[Any] = ()) -> str:
    """The template that renders a conversation with or without tools. Raises: DataError if there is none."""
    if not tokenizer.chat_template:
        raise DataError(
            "the data holds conversations, but the tokenizer has no chat template; expected one; "
            "set `chat_template: file.jinja`, or use text data (`prompt` + `completion`)"
        )
    try:
        return tokenizer.get_chat_template(None, tools or None)
    except ValueError as error:
        raise DataError(f"the tokenizer's chat template: {error}; set `chat_template: file.jinja`") from None


def template_digest(tokenizer: Any) -> str:
    """Digest of the template, or of there being none."""
    return digest_json(tokenizer.chat_template)


def has_generation_markers(template: str) -> bool:
    return bool(_GENERATION.search(template))


def render_text(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = (), add_generation_prompt: bool = False
) -> str:
    """Raises: DataError with the template's own complaint (it may refuse roles or their order)."""
    return _render(tokenizer, messages, tools, add_generation_prompt, False)[0]


def render_shape(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], add_generation_prompt: bool) -> str:
    """`render_text` of a conversation whose texts are stand-ins: one of few shapes, so it is remembered. Raises: DataError."""
    given = json.dumps([list(messages), list(tools)], default=str)
    return _shape(template_text(tokenizer, tools), _special_items(tokenizer), given, add_generation_prompt)


@lru_cache(maxsize=1024)
def _shape(template: str, special: tuple[tuple[str, Any], ...], given: str, prompt: bool) -> str:
    messages, tools = json.loads(given)
    return _run(template, messages, tools or None, prompt, False, dict(special))[0]


def render_with(template: str, tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
    """The same under another template. Raises: DataError."""
    return _run(template, messages, list(tools) or None, False, False, dict(_special_items(tokenizer)))[0]


def render_marked(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any]) -> tuple[str, list[Span]]:
    """Text, and the character spans inside `{% generation %}` blocks."""
    return _render(tokenizer, messages, tools, False, True)


def end_of_turn(tokenizer: Any) -> str:
    """The token that ends an assistant turn, or "" where the template has none."""
    tail = last_tail(tokenizer).lstrip()
    return next((token for token in added_tokens(tokenizer) if tail.startswith(token)), "")


def last_tail(tokenizer: Any) -> str:
    """What the template writes behind the text of a conversation's last turn: `<|end|>`, a newline, EOS …"""
    if not tokenizer.chat_template:
        return ""
    return _probe_tail(template_text(tokenizer), _special_items(tokenizer))


def added_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts that are one token wherever they stand, longest first."""
    return _added(tokenizer, len(tokenizer))


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Texts of the added tokens that are special or that the chat template writes, longest first: what gives a conversation its shape."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    template = str(tokenizer.chat_template or "")
    return tuple(t for t in added_tokens(tokenizer) if t in special or (t.strip() and t in template))


@lru_cache(maxsize=16)
def _added(tokenizer: Any, _length: int) -> tuple[str, ...]:
    return tuple(sorted((str(t) for t in tokenizer.get_added_vocab()), key=lambda t: (-len(t), t)))


@lru_cache(maxsize=16)
def _probe_tail(template: str, special: tuple[tuple[str, Any], ...]) -> str:
    try:
        text = _run(template, _PROBE, None, False, False, dict(special))[0]
    except DataError:
        return ""
    _, found, tail = text.rpartition(_PROBE[1]["content"])
    return tail if found else ""


def _special_items(tokenizer: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((k, v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str))


def _render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any], prompt: bool, marked: bool
) -> tuple[str, list[Span]]:
    template = template_text(tokenizer, tools)
    return _run(template, messages, list(tools) or None, prompt, marked, dict(_special_items(tokenizer)))


def _run(
    template: str, messages: Sequence[Message], tools: Any, prompt: bool, marked: bool, special: Mapping[str, Any]
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    plain = [{key: value for key, value in m.items() if key != "weight"} for m in messages]
    try:
        texts, spans = render_jinja_template(
            [plain],
            tools=tools,
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **special,
        )
    except Exception as error:  # noqa: BLE001 - a template is its author's program, and fails as it likes
        raise DataError(
            f"the chat template refuses this conversation: {_complaint(error)}; change the row, or set `chat_template`"
        ) from None
    if len(texts[0]) > _MOST_CHARACTERS + 64 * len(str(plain)) + 64 * len(str(tools)):
        raise DataError(
            f"the chat template writes {len(texts[0]):,} characters for this conversation of {len(str(plain)):,}; "
            "expected about as many as it is given; set another `chat_template`"
        )
    return texts[0], [(int(a), int(b)) for a, b in spans[0]] if marked else []


def _complaint(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError | ValueError | TypeError | KeyError | AttributeError):
        return " ".join(str(error).split())
    return {RecursionError: "it calls itself without end", MemoryError: "it writes more than the memory holds"}.get(
        type(error), " ".join(f"{type(error).__name__}: {error}".split())
    )
