"""Log-probs of a prompt's own tokens, for `echo`."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.models.batch import pack
from posttrain.models.lengths import forget_lengths
from posttrain.models.policy import Policy
from posttrain.rollout.decoding import Likeliest, TokenAdapters
from posttrain.types import TokenSeq

_MOST_LOGITS = 1 << 26
"""Held at once; a longer prompt is run again for each part of its positions."""


@torch.no_grad()
def prompt_scores(
    policy: Policy, ids: tuple[int, ...], num_top: int, adapters: TokenAdapters | None, adapter: str | None
) -> list[Likeliest]:
    """Of `ids[1:]`: the first token has no log-prob."""
    if adapters is not None:
        adapters.assign([adapter] * len(ids))
    vocabulary = policy.base.config.get_text_config().vocab_size
    found: list[Likeliest] = []
    for positions in torch.arange(len(ids) - 1).split(max(1, _MOST_LOGITS // vocabulary)):
        logp_TV = torch.log_softmax(_logits(policy, ids, positions).float(), -1)
        next_T = torch.tensor(ids)[positions + 1].to(logp_TV.device)
        own_T = logp_TV.gather(-1, next_T.unsqueeze(-1)).squeeze(-1)
        top_logp, top_ids = logp_TV.topk(num_top, -1)
        for own, logps, tokens in zip(own_T.tolist(), top_logp.tolist(), top_ids.tolist(), strict=True):
            found.append(Likeliest(own, tuple(zip(tokens, logps, strict=True))))
    return found


def _logits(policy: Policy, ids: tuple[int, ...], positions: torch.Tensor) -> torch.Tensor:
    model: Any = policy.model
    device = policy.placement.device
    if not policy.ragged:
        ids_1T = torch.tensor([ids], device=device)
        return model(input_ids=ids_1T, use_cache=False, logits_to_keep=positions.to(device)).logits[0]
    forget_lengths(policy.base)
    # `pack` leaves out a sequence's last token; here every token is an input.
    batch = pack([[TokenSeq((*ids, 0), (False,) * (len(ids) + 1))]]).to(device)
    return model(
        input_ids=batch.input_ids_N[None], position_ids=batch.position_ids_N[None], use_cache=False,
        logits_to_keep=positions.to(device), layout=batch.layout,
    ).logits[0]  # fmt: skip
