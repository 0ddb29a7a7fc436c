"""Axolotl's prompt styles of SFT rows: a prompt that is written as text from the columns of a row, and an answer behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
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
_FIELDS = {"instruction": "instruction", "input": "input", "output": "output", "system": "system"}
_OWN = frozenset(
    {"system_prompt", "system_format", "format", "no_input_format", *(f"field_{name}" for name in _FIELDS)}
)
"""Keys of a style that a file gives itself."""


def read_own(draft: ImportDraft, style: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A prompt style of the user's: a format with {instruction} and {input}, another for rows without an input, and a system text before both."""
    fields = fields_of(draft, style, where, _FIELDS, _OWN)
    with_input, without = (str(style.get(key) or default) for key, default in (("format", "{instruction} {input} "), ("no_input_format", "{instruction} ")))  # fmt: skip
    if with_input != without and "input" not in named_in(with_input):
        draft.refuse(f"{where}.type.format", f"{with_input}: without {{input}}, and a row without one is written as {without!r} there", "write {input} into it, or set no_input_format to the same text")  # fmt: skip
    system, constant = str(style.get("system_format") or "{system}"), str(style.get("system_prompt") or "")
    own_system = in_columns(draft, f"{where}.type.system_format", system, {"system": fields["system"]})
    texts = [
        in_columns(draft, f"{where}.type.{key}", text, {name: fields[name] for name in names})
        for key, text, names in (("format", with_input, ("instruction", "input")), ("no_input_format", without, ("instruction",)))
        if key == "format" or text != with_input
    ]  # fmt: skip
    if constant:
        draft.change(
            f"{where}.type.system_prompt",
            f"it stands before a row whose {fields['system']} is empty; there only before rows without that column",
        )
        constant = in_columns(draft, f"{where}.type.system_format", system, {}, {"system": constant})
    formats = [before + text for before in dict.fromkeys((own_system, constant)) for text in texts]
    return {"type": "completion", "prompt_format": formats, "columns": {"completion": fields["output"]}}


def fields_of(
    draft: ImportDraft, style: Mapping[str, Any], where: str, fields: Mapping[str, str], known: frozenset[str]
) -> dict[str, str]:
    """The file's column for each field; a key that is none of `known` is refused."""
    for key, value in style.items():
        if key not in known and not is_off(value):
            draft.refuse(f"{where}.type.{key}", f"{value}: no key of a prompt style that is known here", f"take it out; known are {', '.join(sorted(known))}")  # fmt: skip
    return {name: str(style.get(f"field_{name}") or column) for name, column in fields.items()}


def in_columns(
    draft: ImportDraft, key: str, text: str, columns: Mapping[str, str], texts: Mapping[str, str] | None = None
) -> str:
    """A format of theirs, which Python's str.format writes, with the file's column for each name, or a text; another name is refused."""
    written = {name: "{" + column + "}" for name, column in columns.items()}
    written |= {name: _escaped(given) for name, given in (texts or {}).items()}
    todo = f"write {', '.join(f'{{{name}}}' for name in written)} where a column goes, and {{{{ and }}}} for braces"
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        draft.refuse(key, f"{text}: {error}", todo)
        return ""
    for _, name, spec, conversion in parts:
        if name is not None and (name not in written or spec or conversion):
            draft.refuse(key, f"{text}: {{{name}}} names nothing there", todo)
            return ""
    return "".join(_escaped(literal) + (written[name] if name is not None else "") for literal, name, _, _ in parts)


def named_in(text: str) -> set[str]:
    """The names in braces of a format; none of one that cannot be read."""
    try:
        return {name for _, name, _, _ in Formatter().parse(text) if name}
    except ValueError:
        return set()


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
