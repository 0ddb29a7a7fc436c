"""The embedded engine: samples from the policy's own weights, in process, many rows at a time.

A prompt is prefilled once however many completions it has; finished rows leave the batch and waiting requests take
their places. Speaks token ids; stop strings are all it knows of text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from posttrain.errors import EngineError
from posttrain.models.batch import pack
from posttrain.models.decode import decode_step
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.rollout.alone import generate_alone
from posttrain.rollout.kv import PromptKV, RowCache
from posttrain.rollout.sampling import StopTest, sample, stop_test, uniforms
from posttrain.types import Completion, Finish, Request, SamplingParams, TokenSeq

_SCORED_AT_ONCE = 8192
"""Tokens."""


@dataclass
class _Row:
    """A completion under way."""

    index: int
    request: Request
    uniform: np.ndarray
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)


class EmbeddedEngine:
    """Decodes at most `batch_size` completions at once from `policy`, whose weights it shares."""

    def __init__(
        self,
        policy: Policy,
        *,
        stop_token_ids: Sequence[int],
        batch_size: int = 64,
        refresh: Callable[[], None] | None = None,
    ) -> None:
        """`refresh` brings `policy` up to date at a sync where it is a copy of the one that is trained."""
        self._policy = policy
        self._refresh = refresh
        self._stop_token_ids = frozenset(stop_token_ids)
        self._batch_size = batch_size
        self._version = 0

    @property
    def policy(self) -> Policy:
        """What it samples from: the trained policy itself, or a whole copy of it where that one is sharded."""
        return self._policy

    @property
    def policy_version(self) -> int:
        return self._version

    @property
    def dtype(self) -> str:
        computed = self._policy.placement.autocast_dtype or self._policy.base.dtype
        return str(computed).removeprefix("torch.")

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """One completion per request, in order. No dropout; the same tokens whatever else is in the batch."""
        for number, request in enumerate(requests):
            if not request.prompt_ids:
                raise EngineError(
                    f"request {number} has an empty prompt; expected at least one token (a BOS, for example)"
                )
        should_stop = stop_test(params.stop, decoder(self._policy.tokenizer, special=True))
        was_training = self._policy.model.training
        self._policy.model.eval()
        try:
            with self._policy.placement.autocast():
                if not self._policy.ragged:
                    return generate_alone(
                        self._policy, requests, params, self._stops(params), should_stop, self._version
                    )
                return _Decoding(self._policy, requests, params, self._stops(params), should_stop, self._version).run(
                    self._batch_size
                )
        finally:
            self._policy.model.train(was_training)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of `ids[start:]` of each sequence."""
        return score_sequences(self._policy, sequences, temperature)

    def sync(self, version: int) -> None:
        """The weights are the policy's own, or a copy of them that is refreshed now."""
        if self._refresh is not None:
            self._refresh()
        self._version = version

    def _stops(self, params: SamplingParams) -> frozenset[int]:
        return self._stop_token_ids | set(params.stop_token_ids)


class _Decoding:
    """One call of `generate`."""

    def __init__(
        self, policy: Policy, requests: Sequence[Request], params: SamplingParams,
        stop_ids: frozenset[int], should_stop: StopTest | None, version: int,
    ) -> None:  # fmt: skip
        self._policy, self._params, self._stop_ids = policy, params, stop_ids
        self._should_stop, self._version = should_stop, version
        self._device = policy.placement.device
        self._waiting = deque(_Row(i, r, uniforms(r.seed, params.max_tokens)) for i, r in enumerate(requests))
        self._rows: list[_Row] = []
        self._cache = RowCache(self._device)
        self._prompts: dict[tuple[int, ...], tuple[PromptKV, torch.Tensor]] = {}
        self._done: list[Completion | None] = [None] * len(requests)
        self._decode = decode_step(policy)

    def run(self, batch_size: int) -> list[Completion]:
        while self._waiting or self._rows:
            while self._waiting and len(self._rows) < batch_size:
                self._admit(batch_size - len(self._rows))
            if self._rows:
                self._step()
        return [completion for completion in self._done if completion is not None]

    def _admit(self, free: int) -> None:
        """Start waiting requests: prefill the prompts that are new, sample each row's first token."""
        rows = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        self._prefill([row.request.prompt_ids for row in rows])
        logits_RV = torch.stack([self._prompts[row.request.prompt_ids][1] for row in rows])
        for row in rows:
            self._cache.add_row(self._prompts[row.request.prompt_ids][0])
        self._rows += rows
        self._extend(rows, logits_RV)
        self._forget_prompts()

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if not new:
            return
        # `pack` leaves out a sequence's last token, which predicts nothing in training; here it predicts the answer.
        batch = pack([[TokenSeq((*prompt, 0), (False,) * (len(prompt) + 1))] for prompt in new]).to(self._device)
        kept = [PromptKV(len(prompt)) for prompt in new]
        self._cache.expect([(kv, tree.start, tree.split) for kv, tree in zip(kept, batch.layout.trees, strict=True)])
        last = torch.tensor([tree.split - 1 for tree in batch.layout.trees], device=self._device)
        output = self._policy.model(
            input_ids=batch.input_ids_N[None], position_ids=batch.position_ids_N[None],
            logits_to_keep=last, use_cache=False, layout=batch.layout, kv_store=self._cache,
        )  # fmt: skip
        for prompt, kv, logits_V in zip(new, kept, output.logits[0], strict=True):
            self._prompts[prompt] = (kv, logits_V)

    def _step(self) -> None:
        self._cache.begin_step()
        ids_R = torch.tensor([row.ids[-1] for row in self._rows], device=self._device)
        positions_R = torch.tensor(self._cache.positions(), device=self._device)
        self._extend(self._rows, self._decode(ids_R, positions_R, self._cache))

    def _extend(self, rows: Sequence[_Row], logits_RV: torch.Tensor) -> None:
        """Sample the next token of each row and retire those that are finished."""
        uniform_R = torch.tensor([row.uniform[len(row.ids)] for row in rows], device=self._device)
        ids_R, logp_R = sample(logits_RV, uniform_R, self._params)
        for row, token, logp in zip(list(rows), ids_R.tolist(), logp_R.tolist(), strict=True):
            row.ids.append(token)
            row.logp.append(logp)
            finish = self._finish(row)
            if finish is not None:
                self._done[row.index] = Completion(tuple(row.ids), tuple(row.logp), finish, self._version)
        for place in reversed(range(len(self._rows))):
            if self._done[self._rows[place].index] is not None:
                self._cache.drop_row(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()

    def _finish(self, row: _Row) -> Finish | None:
        if row.ids[-1] in self._stop_ids or (self._should_stop is not None and self._should_stop(row.ids)):
            return "stop"
        return "length" if len(row.ids) >= self._params.max_tokens else None

    def _forget_prompts(self) -> None:
        """Prompts that no waiting request needs any more live on only in the rows that use them."""
        needed = {row.request.prompt_ids for row in self._waiting}
        self._prompts = {prompt: kept for prompt, kept in self._prompts.items() if prompt in needed}


@torch.no_grad()
def score_sequences(
    policy: Policy, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0
) -> list[list[float]]:
    """Log-probs of `ids[start:]` of each `(ids, start)` under the policy's present weights, without dropout."""
    was_training = policy.model.training
    policy.model.eval()
    scores: list[list[float]] = []
    for chunk in _by_tokens(sequences, limit=_SCORED_AT_ONCE):
        batch = pack([[_scored(ids, start)] for ids, start in chunk])
        logp_M = policy.score(batch, temperature=temperature).logp_M
        scores += [part.tolist() for part in logp_M.split(batch.lengths_S().tolist())]
    policy.model.train(was_training)
    return scores


def _scored(ids: Sequence[int], start: int) -> TokenSeq:
    if not 1 <= start <= len(ids):
        raise EngineError(f"score: start={start} of a sequence of {len(ids)} tokens; the first token has no log-prob")
    return TokenSeq(tuple(ids), (False,) * start + (True,) * (len(ids) - start))


def _by_tokens(sequences: Sequence[tuple[Sequence[int], int]], limit: int) -> list[list[tuple[Sequence[int], int]]]:
    chunks: list[list[tuple[Sequence[int], int]]] = []
    size = limit
    for item in sequences:
        if size + len(item[0]) > limit:
            chunks.append([])
            size = 0
        chunks[-1].append(item)
        size += len(item[0])
    return chunks
