"""The form of a conversation in which a chat template writes all of its text.

Templates differ in what they expect: null or "" beside a tool call, arguments as an object or as text, `developer` or
`system`, thinking in a field or in the content. A form that the template does not know loses text without a word, and a
model is then trained on the hole. So forms are tried in order until one is whole; where none is, the row is refused.

Two checks. Every text is replaced by a word of its own, and all words must be found: this sees what the template does
with the *shape* of the conversation, however short a text is. Then the texts themselves must be found, at least as often
as they are given: this sees what depends on their contents. Only thinking of turns before the last may be left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from posttrain.data.messages import REASONING
from posttrain.data.template import render_shape, render_text, template_text
from posttrain.errors import DataError
from posttrain.types import Message

Tools = Sequence[Mapping[str, Any]]
_THINKING = re.compile(r"(?:(?P<before>.*?)<think>)?(?P<thought>.*?)</think>(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Fitted:
    """Messages and tools as the template wants them, and rendered; `dropped` counts turns whose thinking it leaves out."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    text: str
    dropped: int


def fit(tokenizer: Any, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool = False) -> Fitted:
    """The first form that is rendered whole. Raises: DataError with the text that none renders, or the template's complaint."""
    texts = _Texts()
    _mapped(messages, tools, texts.note, add_generation_prompt)
    words = _Texts()
    shape = _mapped(messages, tools, words.replace, add_generation_prompt)
    lost: list[int] = []
    refused: DataError | None = None
    seen: list[Any] = []
    for form in _forms(template_text(tokenizer, tools)):
        asked, offered = _in_form(form, messages, tools)
        if (asked, offered) in seen:
            continue
        seen.append((asked, offered))
        try:
            rendered = render_text(tokenizer, asked, offered, add_generation_prompt)
            missing = _missing_words(words, render_shape(tokenizer, *_in_form(form, *shape), add_generation_prompt))
        except DataError as error:
            refused = refused or error
            continue
        missing |= _missing_texts(texts, missing, rendered)
        wanted = sorted(place for place in missing if not texts.optional[place])
        if not wanted:
            return Fitted(tuple(asked), tuple(offered), rendered, len(missing))
        lost = wanted if not lost or len(wanted) < len(lost) else lost
    if not lost:
        assert refused is not None, "a form is either rendered or refused"
        raise refused
    raise DataError(
        f"the chat template does not write {texts.names[lost[0]]}, so a model would be trained on the hole; change the row, or set `chat_template`"
    )


# --- forms ---------------------------------------------------------------------------------------------------------

Form = Sequence[Callable[[dict[str, Any]], dict[str, Any]]]


def _same(part: dict[str, Any]) -> dict[str, Any]:
    return part


def _null_content(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": None} if message.get("tool_calls") and not message["content"] else message


def _text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "role": "system"} if message["role"] == "developer" else message


def _reasoning_as(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def rename(message: dict[str, Any]) -> dict[str, Any]:
        return {name if key == REASONING[0] else key: value for key, value in message.items()}

    return rename


def _reasoning_inline(message: dict[str, Any]) -> dict[str, Any]:
    if REASONING[0] not in message:
        return message
    rest = {key: value for key, value in message.items() if key != REASONING[0]}
    return {**rest, "content": _thought(message[REASONING[0]], message["content"])}


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    return tool if "function" in tool else {"type": "function", "function": tool}


_CONTENT = (_same, _null_content)
_ARGUMENTS = (_same, _text_arguments)
_DEVELOPER = (_same, _as_system)
_REASONING = (_same, *map(_reasoning_as, REASONING[1:]))
_TOOL = (_same, _wrapped)


def _forms(template: str) -> Iterator[tuple[Form, Callable[[dict[str, Any]], dict[str, Any]]]]:
    """Functions for the messages and one for the tools; thinking in the content only where the template knows it there."""
    reasoning = (*_REASONING, _reasoning_inline) if "</think>" in template else _REASONING
    for *form, tool in product(_DEVELOPER, reasoning, _CONTENT, _ARGUMENTS, _TOOL):
        yield form, tool


def _in_form(
    form: tuple[Form, Callable[[dict[str, Any]], dict[str, Any]]], messages: Sequence[Message], tools: Tools
) -> tuple[list[Message], list[Mapping[str, Any]]]:
    changes, tool = form
    changed = []
    for message in messages:
        part = dict(message)
        for change in changes:
            part = change(part)
        changed.append(part)
    return changed, [tool(dict(offered)) for offered in tools]


# --- texts ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Texts:
    """The texts of a conversation in order, what each is, and whether a template may leave it out."""

    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    optional: list[bool] = field(default_factory=list)

    def note(self, text: str, name: str, optional: bool = False) -> str:
        self.texts.append(text)
        self.names.append(name)
        self.optional.append(optional)
        return text

    def replace(self, text: str, name: str, optional: bool = False) -> str:
        """A word that stands nowhere else in place of `text`; "" stays empty."""
        return self.note(f"posttrainword{len(self.texts)}q" if text else "", name, optional)


Visit = Callable[[str, str, bool], str]


def _mapped(
    messages: Sequence[Message], tools: Tools, visit: Visit, add_generation_prompt: bool
) -> tuple[list[Message], list[Mapping[str, Any]]]:
    """Messages and tools with every text that must be rendered put through `visit`, in the same order each time."""
    last = len(messages) if add_generation_prompt or not messages else len(messages) - 1
    turns = [
        _mapped_message(m, f"message {i + 1} of {len(messages)} ({m['role']})", i != last, visit)
        for i, m in enumerate(messages)
    ]
    return turns, [_mapped_tool(tool, visit) for tool in tools]


def _mapped_message(message: Message, name: str, earlier: bool, visit: Visit) -> Message:
    changed = dict(message)
    content, thinking = message["content"], _THINKING.fullmatch(message["content"])
    if message["role"] == "assistant" and thinking:
        before = visit((thinking["before"] or "").strip(), f"the text before <think> of {name}", False)
        thought = visit(thinking["thought"].strip(), f"the thinking of {name}", earlier)
        changed["content"] = before + _thought(thought, visit(thinking["text"].strip(), f"the text of {name}", False))
    else:
        changed["content"] = visit(content, f"the text of {name}", False)
    if REASONING[0] in message:
        changed[REASONING[0]] = visit(message[REASONING[0]], f"the thinking of {name}", earlier)
    if "tool_calls" in message:
        changed["tool_calls"] = [_mapped_call(call, name, visit) for call in message["tool_calls"]]
    return changed


def _mapped_call(call: Mapping[str, Any], name: str, visit: Visit) -> Mapping[str, Any]:
    function = call["function"]
    called = visit(function["name"], f"the call of `{function['name']}` in {name}", False)
    arguments = _mapped_value(function["arguments"], f"the arguments of `{function['name']}` in {name}", visit)
    return {**call, "function": {**function, "name": called, "arguments": arguments}}


def _mapped_value(value: Any, name: str, visit: Visit) -> Any:
    """Keys, texts and numbers; true, false and null are written in too many ways."""
    if isinstance(value, Mapping):
        return {visit(str(key), name, False): _mapped_value(inner, name, visit) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mapped_value(inner, name, visit) for inner in value]
    if isinstance(value, str):
        return visit(value, name, False)
    return value if value is None or isinstance(value, bool) else visit(json.dumps(value), name, False)


def _mapped_tool(tool: Mapping[str, Any], visit: Visit) -> Mapping[str, Any]:
    """Name, description and parameters. Templates write the rest of a schema in ways of their own."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        return tool
    name = f"the tool `{function.get('name')}`"
    called = {"name": visit(function["name"], name, False)} if isinstance(function.get("name"), str) else {}
    changed = _described(function, name, visit) | called
    if isinstance(function.get("parameters"), Mapping):
        changed["parameters"] = _mapped_schema(function["parameters"], name, visit)
    return {**tool, "function": changed} if "function" in tool else changed


def _mapped_schema(schema: Mapping[str, Any], name: str, visit: Visit) -> dict[str, Any]:
    changed = _described(schema, name, visit)
    if isinstance(schema.get("properties"), Mapping):
        changed["properties"] = {
            visit(key, f"the parameter `{key}` of {name}", False): _mapped_schema(inner, name, visit)
            if isinstance(inner, Mapping)
            else inner
            for key, inner in schema["properties"].items()
        }
    return changed


def _described(schema: Mapping[str, Any], name: str, visit: Visit) -> dict[str, Any]:
    if not isinstance(schema.get("description"), str):
        return dict(schema)
    return {**schema, "description": visit(schema["description"], f"the description of {name}", False)}


def _thought(thinking: str, content: str) -> str:
    return f"<think>\n{thinking}\n</think>\n\n{content}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- checks --------------------------------------------------------------------------------------------------------

_UNICODE_ESCAPE = re.compile(r"\\+u([0-9a-fA-F]{4})")
_ESCAPE = re.compile(r"\\+[nrtbf]?|[\s\"']+")


def _folded(text: str) -> str:
    """`text` without white space, quotes and JSON escapes, however often it was escaped."""
    if "\\" in text:
        decoded = _UNICODE_ESCAPE.sub(lambda found: chr(int(found[1], 16)), text)
        text = decoded.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _ESCAPE.sub("", text)


def _missing_words(words: _Texts, rendered: str) -> set[int]:
    return {place for place, word in enumerate(words.texts) if word not in rendered}


def _missing_texts(texts: _Texts, without: set[int], rendered: str) -> set[int]:
    """Texts that stand less often in `rendered` than in the conversation; those of `without` are not counted."""
    counted = {i: _folded(text) for i, text in enumerate(texts.texts) if i not in without}
    found = _folded(rendered)
    given = "\0".join(counted.values())
    missing = {i for i, text in counted.items() if text and found.count(text) < given.count(text)}
    left_out = {i for i in missing if texts.optional[i]}
    return left_out | _missing_texts(texts, without | left_out, rendered) if left_out else missing
