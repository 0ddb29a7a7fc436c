"""The text of a chat template: from its file, with the values that `chat_template_kwargs` gives its variables.

The values stand in the template itself, as defaults. So they reach every rendering, here and wherever the exported model
is loaded, and whoever renders with a value of his own overrides them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError

Template = str | dict[str, str]
"""A template, or several by name, as tokenizers have them."""
_TAKEN = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token")


def chat_template(own: Template | None, path: str | None, kwargs: Mapping[str, Any]) -> Template | None:
    """The tokenizer's `own` template or the one at `path`, with `kwargs` as defaults. Raises: ConfigError."""
    if path is None:
        template = own
    else:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"chat_template: no such file {path}; expected a Jinja file, relative to the YAML")
        template = file.read_text(encoding="utf-8")
    if not kwargs:
        return template
    if not template:
        raise ConfigError("chat_template_kwargs: the tokenizer has no chat template; set `chat_template: file.jinja`")
    _check(template, kwargs)
    defaults = "".join(_default(name, value) for name, value in kwargs.items())
    if isinstance(template, dict):
        return {name: _behind(defaults, text) for name, text in template.items()}
    return _behind(defaults, template)


def _check(template: Template, kwargs: Mapping[str, Any]) -> None:
    text = template if isinstance(template, str) else "\n".join(template.values())
    for name in kwargs:
        if name in _TAKEN:
            raise ConfigError(
                f"chat_template_kwargs.{name}: every rendering sets it; expected a variable of the template"
            )
        if not name.isidentifier() or not re.search(rf"\b{name}\b", text):
            raise ConfigError(
                f"chat_template_kwargs.{name}: the chat template reads no variable of this name; expected one that it reads"
            )


def _behind(defaults: str, template: str) -> str:
    return template if template.startswith(defaults) else defaults + template


def _default(name: str, value: Any) -> str:
    return f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value, name)} %}}{{% endif %}}"


def _literal(value: Any, name: str) -> str:
    """`value` as Jinja writes it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str) and value.isprintable():
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(part, name) for part in value) + "]"
    raise ConfigError(
        f"chat_template_kwargs.{name}: got {value!r}; expected true, false, a number, one line of text, or a list of these"
    )
