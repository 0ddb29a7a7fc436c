"""What the templates of installed tools render, as digests: `python tests/config/template_witnesses.py` writes them anew.

It runs where axolotl and llamafactory are installed; `template_witnesses.json` says which versions it saw. No text of theirs is kept.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.config.importers.templates import BUILT_IN
from posttrain.files import digest_json

TARGET = Path(__file__).with_suffix(".json")
BOS, EOS = "<bos>", "<eos>"
KINDS = ("plain", "tools")
Conversation = dict[str, Any]
"""`messages`, `tools`, `add_generation_prompt`."""

_TEXTS = [
    "",
    " padded ",
    "two\nlines",
    "é ✓",
    "{{ braces }}",
    "<|eot_id|>",
    'it\'s "quoted"',
    "plain words",
    "<think>\nhm\n</think>\n\nso",
]
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers, \"a\" and 'b'.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first"},
                "b": {"type": "string", "enum": ["one", "two"]},
                "c": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["a", "b"],
        },
    },
}


def conversations(kind: str, system: bool = True, count: int = 200) -> Iterator[Conversation]:
    """The same ones at each call. In every other one the template is asked for the answer that comes next."""
    chance = random.Random(7)
    for number in range(count):
        turns = [{"role": "system", "content": chance.choice(_TEXTS)}] if system and chance.random() < 0.5 else []
        for turn in range(chance.randint(1, 7)):
            turns.append({"role": ("user", "assistant")[turn % 2], "content": chance.choice(_TEXTS)})
            if kind == "tools" and turn % 2 == 0 and chance.random() < 0.6:
                turns += _called(chance)
        tools = [_TOOL] * chance.choice([1, 2]) if kind == "tools" and chance.random() < 0.9 else None
        yield {"messages": turns, "tools": tools, "add_generation_prompt": number % 2 == 1}


def _called(chance: random.Random) -> list[dict[str, Any]]:
    """A turn that calls, with what the tools answer."""
    names = [f"call{chance.randint(10000, 99999)}" for _ in range(chance.randint(1, 2))]
    given = {"a": 3, "b": "two", "c": [1.5, None, True]}
    thought = {"reasoning_content": "hm"} if chance.random() < 0.3 else {}
    calls = [{"id": name, "type": "function", "function": {"name": "add", "arguments": given}} for name in names]
    answers = [
        {"role": "tool", "tool_call_id": name, "name": "add", "content": chance.choice(["4", '{"sum": 4}'])}
        for name in names
    ]
    return [{"role": "assistant", "content": chance.choice(["", "I look."]), "tool_calls": calls, **thought}, *answers]


def rendered(template: str, given: Conversation) -> str:
    """Raises: what the template raises."""
    texts, _ = render_jinja_template(
        [given["messages"]], tools=given["tools"], chat_template=template,
        add_generation_prompt=given["add_generation_prompt"], bos_token=BOS, eos_token=EOS,
    )  # fmt: skip
    return texts[0]


def digest(texts: list[str | None]) -> str:
    return digest_json(texts)


def _axolotl(name: str) -> Callable[[Conversation], str]:
    folder = distribution("axolotl").locate_file("axolotl/utils/chat_templates/templates")
    template = Path(str(folder), f"{name}.jinja").read_text(encoding="utf-8")
    return lambda given: rendered(template, given)


class _Characters:
    """A tokenizer whose ids are the text itself."""

    bos_token_id, eos_token_id = BOS, EOS

    def encode(self, text: str, add_special_tokens: bool) -> list[str]:
        return [text]

    def convert_tokens_to_ids(self, token: str) -> str:
        return token


def _llamafactory(name: str) -> Callable[[Conversation], str]:
    template = importlib.import_module("llamafactory.data.template").TEMPLATES[name]

    def render(given: Conversation) -> str:
        messages = given["messages"]
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = messages[1:] if messages[0]["role"] == "system" else messages
        return "".join(piece for ids in template._encode(_Characters(), turns, system, "") for piece in ids)

    return render


WITNESSES = {"Axolotl": (_axolotl, KINDS), "LLaMA-Factory": (_llamafactory, KINDS[:1])}
"""Tool → its templates, and the kinds of conversations that it is asked for."""


def main() -> None:
    seen: dict[str, Any] = {"versions": {name: version(name) for name in ("axolotl", "llamafactory")}}
    for tool, (witness, kinds) in WITNESSES.items():
        seen[tool] = {}
        for name in sorted(BUILT_IN[tool]):
            render = witness(name)
            seen[tool][name] = {kind: digest(_texts(render, kind)) for kind in kinds}
    templates = importlib.import_module("llamafactory.data.template").TEMPLATES
    seen["eos"] = {
        name: templates[name].stop_words[0] for name in BUILT_IN["LLaMA-Factory"] if templates[name].replace_eos
    }
    TARGET.write_text(json.dumps(seen, indent=1) + "\n", encoding="utf-8")


def _texts(render: Callable[[Conversation], str], kind: str) -> list[str | None]:
    """None where it is refused."""
    texts: list[str | None] = []
    for given in conversations(kind):
        try:
            texts.append(render(given))
        except Exception:  # noqa: BLE001 - a template fails as it likes
            texts.append(None)
    return texts


if __name__ == "__main__":
    main()
