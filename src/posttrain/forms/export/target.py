"""A conversation as an engine of a form turns it into ids, and the ids by which it begins and ends. Knows no weights."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.forms.export.gguf_file import STOPS, GgufHeader
from posttrain.forms.export.gguf_vocabulary import rebuilt

Talk = Sequence[Mapping[str, str]]
REFUSALS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)
"""How a template says no to a conversation."""


@dataclass(frozen=True, slots=True)
class SpecialIds:
    bos: int | None
    eos: int | None
    pad: int | None
    stops: tuple[int, ...]


class TextForm(Protocol):
    """What reads a prompt: ids of a conversation, None where its template refuses it; ids of plain text."""

    special: SpecialIds
    has_template: bool

    def chat_ids(self, messages: Talk) -> list[int] | None: ...

    def text_ids(self, text: str) -> list[int]: ...


class FolderText:
    """transformers, vLLM and all that read a folder of Hugging Face's form."""

    def __init__(self, tokenizer: Any, stops: Sequence[int]) -> None:
        self.tokenizer, self.has_template = tokenizer, bool(tokenizer.chat_template)
        self.special = SpecialIds(
            tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tuple(sorted(stops))
        )

    def chat_ids(self, messages: Talk) -> list[int] | None:
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except REFUSALS:
            return None
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])


class GgufText:
    """llama.cpp: the template in the file, then BOS where the file says so, once, whatever the template wrote."""

    def __init__(self, header: GgufHeader) -> None:
        ids = header.ids
        self.header, self.core, self.has_template = header, rebuilt(header.vocabulary), bool(header.chat_template)
        stops = tuple(sorted({ids[key] for key in STOPS if key in ids}))
        self.special = SpecialIds(ids.get("bos_token_id"), ids.get("eos_token_id"), ids.get("padding_token_id"), stops)

    def _token(self, key: str) -> str:
        number = self.header.ids.get(key)
        return "" if number is None else self.header.vocabulary.tokens[number]

    def chat_ids(self, messages: Talk) -> list[int] | None:
        bos = self._token("bos_token_id")
        try:
            found: Any = render_jinja_template(
                conversations=[[dict(message) for message in messages]], chat_template=self.header.chat_template,
                add_generation_prompt=True, bos_token=bos, eos_token=self._token("eos_token_id"),
            )  # fmt: skip
        except REFUSALS:
            return None
        text: str = found[0][0]
        return self.text_ids(text.removeprefix(bos) if bos and self.header.flags.get("add_bos_token") else text)

    def text_ids(self, text: str) -> list[int]:
        begin = [self.header.ids["bos_token_id"]] if self.header.flags.get("add_bos_token") else []
        end = [self.header.ids["eos_token_id"]] if self.header.flags.get("add_eos_token") else []
        return [*begin, *self.core.encode(text, add_special_tokens=False).ids, *end]


_WORDS = ("hello", "What", "is", "7", "3.14", "plus", "naïve", "größer", "東京", "привет", "🙂", "def f(x):", "\n", "\n\n", "  ", "\t",
          "don't", "I'LL", "http://a.b/c?d=1", "{'k': [1, 2]}", "<b>", "1234567", "…", "مرحبا", "e\u0301", "$x^2$", "```", "A1b2")  # fmt: skip


def composed(talks: Sequence[Talk]) -> list[Talk]:
    """The same with every character composed (NFC)."""
    return [[{**turn, "content": unicodedata.normalize("NFC", turn["content"])} for turn in talk] for talk in talks]


def conversations(count: int, specials: Sequence[str], seed: int = 0) -> list[Talk]:
    """Random ones, the same for the same seed: with and without a system message, one to four turns, scripts, whitespace, and
    now and then a special token's text in what a user writes.
    """
    draw = random.Random(seed)
    words = [*_WORDS, *specials[:2]]

    def text() -> str:
        return draw.choice(("", " ")).join(
            draw.choice(words) for _ in range(draw.randint(0 if draw.random() < 0.05 else 1, 12))
        )

    def one() -> Talk:
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(0, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        return [*messages, {"role": "user", "content": text()}]

    return [one() for _ in range(count)]
