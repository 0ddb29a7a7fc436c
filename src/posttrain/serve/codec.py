"""What a served model has of text: tokenizer, chat template, window, ends; prompts to ids and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from posttrain.data.messages import parse_messages, parse_tools
from posttrain.data.render import chat_ids
from posttrain.data.template import render_text
from posttrain.data.tool_calls import CallSyntax, syntax_of
from posttrain.errors import DataError
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.grammar import Grammars
from posttrain.types import Origin

_ORIGIN = Origin("request", 1)


@dataclass(frozen=True)
class ServedCodec:
    """`window`: most tokens of prompt and answer. `num_ids`: size of the vocabulary that the model scores."""

    tokenizer: Any
    stop_ids: frozenset[int]
    window: int
    num_ids: int
    _texts: dict[int, bytes] = field(default_factory=dict[int, bytes])

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Special tokens, which are no part of an answer's text."""
        return frozenset(i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.num_ids, self.stop_ids)

    @cached_property
    def call_syntax(self) -> CallSyntax | None:
        return syntax_of(self.tokenizer.chat_template)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def text(self, ids: Sequence[int], hidden: Collection[int]) -> str:
        return self.decode([i for i in ids if i not in hidden])

    def token_bytes(self, token: int) -> bytes:
        if token not in self._texts:
            self._texts[token] = self.grammars.token_bytes(token)
        return self._texts[token]

    def token_text(self, token: int) -> str:
        """As OpenAI writes a token: its text, or `bytes:\\x..` where it is part of a character only."""
        raw = self.token_bytes(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """Raises: ApiRefusal where there is no template, or it does not write this conversation."""
        if not self.tokenizer.chat_template:
            raise bad_request("this model has no chat template; use /v1/completions", "model", "no_chat_template")
        try:
            return chat_ids(self.tokenizer, parse_messages(messages, _ORIGIN, "messages"), parse_tools(tools, _ORIGIN))
        except DataError as error:
            # What follows is for those who train on it.
            said = str(error).removeprefix(f"{_ORIGIN}: ").partition(", so a model would be trained")[0]
            raise bad_request(said, "messages", "invalid_messages") from None

    def writes_tools(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template shows `tools` to the model."""
        parsed = parse_messages(messages, _ORIGIN, "messages")
        try:
            return render_text(self.tokenizer, parsed, tools, True) != render_text(self.tokenizer, parsed, (), True)
        except DataError:
            return True  # some form of the conversation was rendered with them

    def check_ids(self, ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Raises: ApiRefusal for no ids, or ids that the model does not have."""
        if not ids:
            raise bad_request("the prompt has no tokens; expected at least one", param)
        if (bad := next((i for i in ids if not 0 <= i < self.num_ids), None)) is not None:
            raise bad_request(f"token {bad} is not in the vocabulary of {self.num_ids}", param)
        return tuple(ids)

    def room(self, prompt: Sequence[int], wanted: int | None) -> int:
        """Tokens that the answer may have. Raises: ApiRefusal where they do not fit."""
        left = self.window - len(prompt)
        if left < (1 if wanted is None else wanted):
            asked = "" if wanted is None else f" and {wanted} of the answer"
            raise ApiRefusal(
                400, f"This model's maximum context length is {self.window} tokens; the prompt has {len(prompt)}{asked}",
                code="context_length_exceeded", param="messages" if wanted is None else "max_tokens",
            )  # fmt: skip
        return left if wanted is None else wanted
