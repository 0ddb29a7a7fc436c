"""The form in which a chat template writes tool calls, tried on a call of its own before anything is sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.data.forms import fit
from posttrain.data.template import control_tokens, end_of_turn
from posttrain.data.tool_calls import CallSyntax, syntax_of
from posttrain.data.turns import SampledCall, stand_in
from posttrain.errors import ConfigError, DataError
from posttrain.models.load import missing_chat_template
from posttrain.types import Message

CALL_ID = "call{:05d}"
"""Nine letters and digits, as Mistral's templates want it."""
_ANY_TOOL = {"type": "function", "function": {"name": "tool", "description": "", "parameters": {"type": "object", "properties": {}}}}  # fmt: skip


def refuse_unread_calls(tokenizer: Any) -> None:
    """Raises: ConfigError where the template writes calls, of whatever tool, in no form that is read."""
    readable_syntax(tokenizer, [_ANY_TOOL])


def readable_syntax(tokenizer: Any, tools: Sequence[Mapping[str, Any]]) -> CallSyntax:
    """The form in which the template writes calls, if a call that it writes is read as that call. Raises: ConfigError."""
    instead = (
        "set chat_template to one with a form of calls that is read, or leave tools out and let an env read the text"
    )
    if missing_chat_template(tokenizer):
        raise ConfigError(
            f"tools: the tokenizer has no chat template, and tools cannot be written without one; {instead}"
        )
    controls = control_tokens(tokenizer)
    for tool in tools:
        if found := next((token for token in controls if token in json.dumps(tool, ensure_ascii=False)), None):
            raise ConfigError(
                f"tools: {tool['function']['name']!r} is described with {found}, which would become a control token in the prompt; "
                "say it otherwise"
            )
    syntax = syntax_of(tokenizer.get_chat_template(None, list(tools)))
    if syntax is None:
        raise ConfigError(f"tools: the chat template says no form in which tools are called; {instead}")
    name = str(tools[0]["function"]["name"])
    call = SampledCall(name, CALL_ID.format(0))
    asked: list[Message] = [{"role": "user", "content": "question"}]
    try:
        whole = fit(tokenizer, [*asked, stand_in(1, [call])], tools).text
    except DataError as error:
        raise ConfigError(f"tools: {error}") from None
    at = whole.rfind(syntax.begin if not syntax.is_whole_answer else '{"name"')
    turn = whole[at:].partition(end_of_turn(tokenizer) or tokenizer.eos_token)[0]
    if at < 0 or [said for said, _ in syntax.split(turn.rstrip())[1]] != [name]:
        raise ConfigError(
            f"tools: the chat template writes calls in a form that is not read (tried: {syntax.name}); {instead}"
        )
    return syntax
