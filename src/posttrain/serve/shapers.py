"""What leans on the next token of an answer: a bias, penalties for what was said already, a grammar.

As fields, which an engine elsewhere is told; and as the function of the logits that our own decoding calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from posttrain.serve.codec import ServedCodec
from posttrain.serve.faults import bad_request
from posttrain.serve.grammar import GrammarShaper


@dataclass(frozen=True)
class AnswerShaper:
    """μ[j] + bias[j] − c[j]·frequency − 1[c[j] > 0]·presence, c counting the answer's tokens; −inf where `grammar` (Lark) has
    no such token. Source: OpenAI's API reference.
    """

    presence: float
    frequency: float
    bias: Mapping[int, float]
    grammar: str | None
    codec: ServedCodec

    @property
    def acts(self) -> bool:
        return bool(self.presence or self.frequency or self.bias or self.grammar is not None)

    def __call__(self, ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        counts = Counter(ids) if self.presence or self.frequency else {}
        added = dict(self.bias)
        for token, count in counts.items():
            added[token] = added.get(token, 0.0) - count * self.frequency - self.presence
        if added:
            tokens = torch.tensor(list(added), device=logits_V.device)
            logits_V = logits_V.index_add(0, tokens, torch.tensor(list(added.values())).to(logits_V))
        return logits_V if self._by_grammar is None else self._by_grammar(ids, logits_V)

    @cached_property
    def _by_grammar(self) -> GrammarShaper | None:
        return None if self.grammar is None else self.codec.grammars.shaper(self.grammar)


def check_bias(bias: Mapping[int, float], num_ids: int) -> None:
    """Raises: ApiRefusal for a token that there is not."""
    if (bad := next((token for token in bias if not 0 <= token < num_ids), None)) is not None:
        raise bad_request(f"logit_bias: token {bad} is not in the vocabulary of {num_ids}", "logit_bias")
