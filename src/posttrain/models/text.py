"""Token ids to text, with a tokenizer's many signatures hidden."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jinja2

_PROBE = [{"role": "user", "content": "posttrain-question"}, {"role": "assistant", "content": "posttrain-answer"}]


def decoder(tokenizer: Any, *, special: bool = False) -> Callable[[Sequence[int]], str]:
    """Text of token ids; special tokens are left out unless asked for."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=not special)

    return decode


def end_of_turn_id(tokenizer: Any) -> int | None:
    """The token that the chat template writes behind an assistant's answer; `None` where it writes none.

    It is what SFT teaches a model to end with, whatever the tokenizer calls its EOS.
    """
    if not tokenizer.chat_template:
        return None
    try:
        text: str = tokenizer.apply_chat_template(_PROBE, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError):
        # A template that takes no such conversation; the data's own rows say what it complains about.
        return None
    behind = text.rpartition(_PROBE[1]["content"])[2].lstrip()
    whole = sorted(tokenizer.get_added_vocab().items(), key=lambda item: (-len(item[0]), item[0]))
    return next((int(token) for text, token in whole if behind.startswith(text)), None)
