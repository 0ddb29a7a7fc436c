"""OpenAI's ways to lean on the next token: a bias for some of them, penalties for those that were said already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from posttrain.rollout.decoding import Shaper
from posttrain.serve.faults import bad_request


def with_bias(bias: Mapping[int, float], num_ids: int) -> Shaper:
    """Adds to the logits of some tokens. Raises: ApiRefusal for a token that there is not."""
    if (bad := next((token for token in bias if not 0 <= token < num_ids), None)) is not None:
        raise bad_request(f"logit_bias: token {bad} is not in the vocabulary of {num_ids}", "logit_bias")
    tokens, values = torch.tensor(list(bias), dtype=torch.long), torch.tensor(list(bias.values()))

    def shape(ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        return logits_V.index_add(0, tokens.to(logits_V.device), values.to(logits_V))

    return shape


def with_penalties(presence: float, frequency: float) -> Shaper:
    """μ[j] − c[j]·frequency − 1[c[j] > 0]·presence, c counting the answer's tokens. Source: OpenAI's API reference."""

    def shape(ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        counts = Counter(ids)
        if not counts:
            return logits_V
        tokens = torch.tensor(list(counts), device=logits_V.device)
        taken = torch.tensor([count * frequency + presence for count in counts.values()])
        return logits_V.index_add(0, tokens, -taken.to(logits_V))

    return shape


def one_after_another(shapers: Sequence[Shaper]) -> Shaper | None:
    if len(shapers) <= 1:
        return shapers[0] if shapers else None

    def shape(ids: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        for shaper in shapers:
            logits_V = shaper(ids, logits_V)
        return logits_V

    return shape
