"""Constrained decoding through llguidance: which tokens may come next so that the answer is what was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from posttrain.data.tool_calls import CallSyntax
from posttrain.serve.faults import bad_request

_MOST_SCHEMA_CHARS = 1 << 16
_MOST_REPEATED = 10_000
_REPEATED = re.compile(r"(?<=[{,])\d{1,18}(?=[,}])")
# On one line, with a space behind separators or without: a model must not be able to go on with spaces for ever.
_JSON: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


class GrammarShaper:
    """Sets to −inf what cannot come next. One per answer: it remembers what it has seen."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._seen = 0

    def __call__(self, ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        self._matcher.consume_tokens(list(ids[self._seen :]))
        self._seen = len(ids)
        if self._matcher.is_error():
            return torch.full_like(logits_V, -torch.inf)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits_V)].astype(bool)
        forbidden_V = torch.from_numpy(~allowed).to(logits_V.device)
        shaped_V = logits_V.clone()
        shaped_V[: len(forbidden_V)].masked_fill_(forbidden_V, -torch.inf)
        shaped_V[len(forbidden_V) :] = -torch.inf
        return shaped_V


class Grammars:
    """Grammars over one tokenizer, each written in llguidance's Lark: what other engines take too."""

    def __init__(self, tokenizer: Any, num_ids: int, stop_ids: Collection[int]) -> None:
        # A tokenizer may have tokens beyond the model's vocabulary, and a model ids beyond the tokenizer's.
        size = max(num_ids, len(tokenizer))
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=size, eos_token=sorted(stop_ids))
        self._added = {
            str(t): int(i) for t, i in sorted(tokenizer.get_added_vocab().items(), key=lambda item: -len(item[0]))
        }

    def token_bytes(self, token: int) -> bytes:
        return self._tokenizer.decode_bytes([token])

    def json_schema(self, schema: Any) -> str:
        """Raises: ApiRefusal for a schema that is no schema, or that says what cannot be enforced."""
        if len(json.dumps(schema)) > _MOST_SCHEMA_CHARS:
            raise bad_request(f"the schema has more than {_MOST_SCHEMA_CHARS:,} characters", "response_format")
        _check_counts(schema)
        named: Any = {True: {}, False: {"not": {}}}[schema] if isinstance(schema, bool) else schema
        return self._checked(f"start: {_json_rule(named)}", "response_format")

    def calls(self, syntax: CallSyntax, tools: Mapping[str, Any]) -> str:
        """An answer that is one call of one of `tools`: name → schema of its arguments. Raises: ApiRefusal as `json_schema`."""
        before, after = syntax.around
        rules = [
            f"start: {self._literal(before)} ({' | '.join(f'call_{n}' for n in range(len(tools)))}) {self._literal(after)}"
        ]
        for number, (name, schema) in enumerate(tools.items()):
            opening = self._literal(syntax.open.replace("NAME", name))
            rules += [f"call_{number}: {opening} args_{number} {self._literal(syntax.close)}"]
            _check_counts(schema)
            rules += [f"args_{number}: {_json_rule(schema)}"]
        return self._checked("\n".join(rules), "tools")

    def _literal(self, text: str) -> str:
        """In Lark; what is one token wherever it stands is written as that token."""
        if not text:
            return ""
        added = self._added
        parts = re.split("(" + "|".join(map(re.escape, added)) + ")", text) if added else [text]
        return " ".join(f"<[{added[part]}]>" if part in added else json.dumps(part) for part in parts if part)

    def shaper(self, grammar: str) -> GrammarShaper:
        return GrammarShaper(LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0))

    @lru_cache(maxsize=64)  # noqa: B019 - as long-lived as the model
    def _checked(self, grammar: str, param: str) -> str:
        is_error, found = LLMatcher.validate_grammar_with_warnings(
            LLMatcher.grammar_from_lark(grammar), self._tokenizer
        )
        if is_error:
            raise bad_request(f"the schema cannot be enforced: {'; '.join(found)}", param, "invalid_json_schema")
        return grammar


def _check_counts(schema: Any) -> None:
    """Each is written out, in the thread that decodes for everybody. Raises: ApiRefusal for what takes seconds and gigabytes."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            counts = [part.get(key) for key in ("minItems", "maxItems")]
            if isinstance(pattern := part.get("pattern"), str):
                counts += map(int, _REPEATED.findall(pattern))
            for count in counts:
                if isinstance(count, (int, float)) and count > _MOST_REPEATED:
                    raise bad_request(
                        f"the schema repeats something {count:g} times, which cannot be held to; expected at most {_MOST_REPEATED:,}",
                        "response_format", "invalid_json_schema",
                    )  # fmt: skip
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _json_rule(schema: Mapping[str, Any]) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': _JSON})}"
