"""Sampling one request at a time through transformers' own cache, for models the ragged layout is not exact for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from posttrain.models.policy import Policy
from posttrain.rollout.sampling import StopTest, sample, uniforms
from posttrain.types import Completion, Finish, Request, SamplingParams


def generate_alone(
    policy: Policy, requests: Sequence[Request], params: SamplingParams, stop_ids: frozenset[int],
    should_stop: StopTest | None, version: int,
) -> list[Completion]:  # fmt: skip
    """Slow and plain: the whole sequence is run again for each token, which is right for every architecture."""
    completions: list[Completion] = []
    for request in requests:
        uniform = torch.from_numpy(uniforms(request.seed, params.max_tokens))
        ids: list[int] = []
        logp: list[float] = []
        finish: Finish = "length"
        while len(ids) < params.max_tokens:
            sequence = torch.tensor([(*request.prompt_ids, *ids)], device=policy.placement.device)
            logits_1V = policy.model(input_ids=sequence, use_cache=False, logits_to_keep=1).logits[0]
            token_1, logp_1 = sample(logits_1V, uniform[len(ids) : len(ids) + 1].to(logits_1V.device), params)
            ids.append(int(token_1))
            logp.append(float(logp_1))
            if ids[-1] in stop_ids or (should_stop is not None and should_stop(ids)):
                finish = "stop"
                break
        completions.append(Completion(tuple(ids), tuple(logp), finish, version))
    return completions
