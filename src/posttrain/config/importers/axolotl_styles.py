"""Axolotl's prompt styles of SFT rows: a prompt that is written as text from the columns of a row, and an answer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.config.importers.fates import ImportDraft, is_off

_INTRO = "Below is an instruction that describes a task"
_TASK = "Write a response that appropriately completes the request."
ALPACA_FORMATS = [
    f"{_INTRO}, paired with an input that provides further context. {_TASK}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    f"{_INTRO}. {_TASK}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
]
"""The text that Axolotl writes an alpaca row in: with an input, and without."""
_TURNS = ["### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n", "### Instruction:\n{instruction}\n\n### Response:\n"]  # fmt: skip
_CHATS = ["USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:"]
_CHATS_WITH_TASK = [
    f"SYSTEM: {_INTRO}, paired with an input that provides further context. {_TASK}\n{_CHATS[0]}",
    f"SYSTEM: {_INTRO}. {_TASK}\n{_CHATS[1]}",
]
_ARTICLE = "SYSTEM: Use the following contextual information to concisely answer the question.\n\nUSER: {article}\n===\n{question}\nASSISTANT:"  # fmt: skip


@dataclass(frozen=True, slots=True)
class Style:
    """Formats of the prompt, the first that a row has the columns of; before them `system` where the row has one; the column of the answer."""

    formats: list[str]
    answer: str = "output"
    system: str = ""

    def rows(self) -> dict[str, Any]:
        formats = [first + text for first in dict.fromkeys((self.system, "")) for text in self.formats]
        return {"type": "completion", "prompt_format": formats, "columns": {"completion": self.answer}}


STYLES: dict[str, Style] = {
    "alpaca": Style(ALPACA_FORMATS),
    "alpaca_instruct": Style(ALPACA_FORMATS),
    "alpaca_chat": Style(_CHATS_WITH_TASK),
    "alpaca_chat.load_qa": Style([_CHATS_WITH_TASK[1].replace("{instruction}", "{question}")], "answer"),
    "alpaca_w_system": Style(_CHATS, system="SYSTEM: {system}\n"),
    "alpaca_w_system.load_chat": Style(_CHATS, system="SYSTEM: {system}\n"),
    "alpaca_w_system.load_instruct": Style(_TURNS, system="{system}\n\n"),
    "alpaca_w_system.load_open_orca": Style(
        ["### Human:\n{question}\n### Assistant:\n"], "response", "### System:\n{system_prompt}\n"
    ),
    "alpaca_w_system.load_open_orca_chatml": Style(
        ["<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"],
        "response",
        "<|im_start|>system\n{system_prompt}<|im_end|>\n",
    ),
    "context_qa": Style([_ARTICLE], "answer"),
    "gpteacher": Style(ALPACA_FORMATS, "response"),
    "oasst": Style([ALPACA_FORMATS[1].replace("{instruction}", "{INSTRUCTION}")], "RESPONSE"),
}
"""Axolotl's `type` → how it writes a row."""
_AS_TEXT = "write its rows as {prompt, completion}, and set type: completion in a YAML of ours"
_ANSWER = "it writes words of its own into the answer, which are trained"
_SHAREGPT = "Axolotl took it out, and asks for chat_template"
_CHAT = "set type: chat_template with field_messages: conversations"
REFUSED: dict[str, tuple[str, str]] = {
    "input_output": ("each piece of a text has its own flag there, and a text is a prompt with one answer here", "write its rows as messages, with a chat_template that writes nothing around them and train: false where a piece is not trained"),
    "context_qa.load_v2": (_ANSWER, _AS_TEXT),
    "context_qa.load_404": ("its answer is a sentence of the style, and stands in no column", _AS_TEXT),
    "jeopardy": (_ANSWER, _AS_TEXT),
    **dict.fromkeys(("explainchoice", "concisechoice"), ("it writes a list of choices into the prompt", _AS_TEXT)),
    "reflection": ("its answer is made of three columns", _AS_TEXT),
    **dict.fromkeys(("sharegpt", "sharegpt.load_role", "sharegpt.load_guanaco", "sharegpt.load_ultrachat", "sharegpt_simple", "sharegpt_simple.load_role"), (_SHAREGPT, _CHAT)),
    **dict.fromkeys(("pygmalion", "metharme"), ("it writes turns of characters with tokens of its own", "write its rows as messages, and set type: chat_template with chat_template: metharme")),
}  # fmt: skip
"""Axolotl's `type` → why its rows are not read, and what to do."""
_OWN = frozenset({"system_prompt", "system_format", "field_system", "field_instruction", "field_input", "field_output", "format", "no_input_format"})  # fmt: skip
"""Keys of a style that a file gives itself."""


def read_own(draft: ImportDraft, style: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A prompt style of the user's: a format with {instruction} and {input}."""
    odd = [key for key, value in style.items() if key not in _OWN and not is_off(value)]
    for key in odd:
        known = ", ".join(sorted(_OWN))
        draft.refuse(f"{where}.type.{key}", f"{style[key]}: no key of a prompt style that is known here", f"take it out; known are {known}")  # fmt: skip
    with_input = style.get("format")
    without = style.get("no_input_format") or with_input
    if odd:
        return {}
    if not with_input:
        draft.refuse(f"{where}.type", "a prompt style without a format", "write format: '{instruction}'")
        return {}
    fields = {name: str(style.get(f"field_{name}") or name) for name in ("instruction", "input", "output")}
    # Without field_input no row has an input there, whatever its columns are.
    texts = (with_input, without) if style.get("field_input") else (without,)
    formats = [_with_columns(str(text), fields) for text in dict.fromkeys(texts)]
    constant, varied = _system(style)
    return Style([constant + text for text in formats], fields["output"], varied).rows()


def _system(style: Mapping[str, Any]) -> tuple[str, str]:
    """What stands before every prompt, and before that of a row with a system text; with field_system the file's own is not read there."""
    text, column = str(style.get("system_prompt") or ""), style.get("field_system")
    written = str(style.get("system_format") or "{system}")
    if column:
        return "", _with_columns(written, {"system": str(column)})
    return (_escaped(written.replace("{system}", text)) if text else ""), ""


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _with_columns(text: str, fields: Mapping[str, str]) -> str:
    """The file's column for each name in braces; other braces are text."""
    escaped = _escaped(text)
    for name, column in fields.items():
        escaped = escaped.replace("{{" + name + "}}", "{" + column + "}")
    return escaped
