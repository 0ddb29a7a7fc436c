"""The embedded engine: samples from the policy's own weights, in process, many rows at a time.

A prompt is prefilled once however many completions it has; finished rows leave the batch and waiting requests take
their places. Speaks token ids; stop strings are all it knows of text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

import posttrain
from posttrain.errors import EngineError
from posttrain.models.batch import pack
from posttrain.models.decode import decode_step
from posttrain.models.lengths import LengthRule, forget_lengths, length_rule
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.protocols import Weights
from posttrain.rollout.alone import DecodingRow, Ends, finish_alone
from posttrain.rollout.exact import ExactRows
from posttrain.rollout.kv import PromptKV, RowCache
from posttrain.rollout.replica import receive
from posttrain.rollout.sampling import sample, sample_scored, stop_test, uniforms
from posttrain.types import Completion, EngineInfo, Request, SamplingParams, TokenSeq

_SCORED_AT_ONCE = 8192
"""Tokens."""


class EmbeddedEngine:
    """Decodes at most `batch_size` completions at once from `policy`, in this process.

    `shares_weights` where `policy` is the one that is trained; else it is a copy, which an update fills.
    """

    def __init__(
        self, policy: Policy, *, stop_token_ids: Sequence[int], batch_size: int = 64, shares_weights: bool = True
    ) -> None:
        self._policy = policy
        self._stop_token_ids = frozenset(stop_token_ids)
        self._batch_size = batch_size
        self._shares_weights = shares_weights
        self._version = 0

    @property
    def policy_version(self) -> int:
        return self._version

    def describe(self) -> EngineInfo:
        computed = self._policy.placement.autocast_dtype or self._policy.base.dtype
        dtype: Any = str(computed).removeprefix("torch.")
        return EngineInfo(
            "embedded", posttrain.__version__, dtype, "uncut", seed_bits=64, exact_resume=True, exact_logprobs=self._policy.exact,
        )  # fmt: skip

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """No dropout; the same tokens whatever else is in the batch."""
        for number, request in enumerate(requests):
            if not request.prompt_ids:
                raise EngineError(
                    f"request {number} has an empty prompt; expected at least one token (a BOS, for example)"
                )
        rows = [DecodingRow(place, r, uniforms(r.seed, params.max_tokens)) for place, r in enumerate(requests)]
        should_stop = stop_test(params.stop, decoder(self._policy.tokenizer, special=True))
        ends = Ends(params.max_tokens, self._stop_token_ids | set(params.stop_token_ids), should_stop)
        return self._completions(rows, params, ends)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        return score_sequences(self._policy, sequences, temperature)

    def update(self, weights: Weights, version: int) -> int:
        moved = 0 if self._shares_weights else receive(self._policy, weights)
        self._version = version
        return moved

    def close(self) -> None:
        pass

    def _completions(self, rows: Sequence[DecodingRow], params: SamplingParams, ends: Ends) -> Iterator[Completion]:
        was_training = self._policy.model.training
        self._policy.model.eval()
        try:
            for row in self._finished(rows, params, ends):
                assert row.finish is not None, "only what has ended is handed out"
                yield Completion(tuple(row.ids), tuple(row.logp), row.finish, self._version, row.place)
        finally:
            self._policy.model.train(was_training)

    def _finished(self, rows: Sequence[DecodingRow], params: SamplingParams, ends: Ends) -> Iterator[DecodingRow]:
        """Each row when it has ended; rows are sampled together with those that are encoded alike."""
        rule = length_rule(self._policy.base.config)
        if not self._policy.ragged:
            yield from self._alone(rows, params, ends)
        elif rule is None:
            yield from self._together(rows, params, ends)
        else:
            short = [row for row in rows if len(row.sequence) <= rule.boundary]
            for _ in self._together(short, params, ends, longest=rule.boundary):
                pass
            # Those that outgrew the boundary are encoded anew.
            long = [row for row in rows if row.finish is None]
            for _ in self._alone(long, params, ends) if rule.each else self._together(long, params, ends):
                pass
            self._score_anew([row for row in rows if _changed_encoding(row, rule)], params)
            yield from rows

    def _together(
        self, rows: Sequence[DecodingRow], params: SamplingParams, ends: Ends, longest: int | None = None
    ) -> Iterator[DecodingRow]:
        with self._computing():
            decoding = _Decoding(self._policy, rows, params, ends, longest)
        while decoding.is_busy:
            # Not around the yield: whoever takes the rows must not compute in our context.
            with self._computing():
                ended = decoding.advance(self._batch_size)
            yield from ended

    def _alone(self, rows: Sequence[DecodingRow], params: SamplingParams, ends: Ends) -> Iterator[DecodingRow]:
        for row in rows:
            with self._computing():
                finish_alone(self._policy, row, params, ends)
            yield row

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), self._policy.placement.autocast():
            yield

    def _score_anew(self, rows: Sequence[DecodingRow], params: SamplingParams) -> None:
        """Log-probs of whole sequences as the trainer encodes them, for rows whose first tokens were encoded otherwise."""
        sequences = [(row.sequence, len(row.request.prompt_ids)) for row in rows]
        for row, logp in zip(rows, self.score(sequences, params.temperature or 1.0), strict=True):
            row.logp = logp


class CachedRows:
    """Rows on the K/V cache, with their logits."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._device = policy, policy.placement.device
        self._cache = RowCache(self._device)
        self._decode = decode_step(policy)
        self.add_row, self.drop_row = self._cache.add_row, self._cache.drop_row

    def prefill(self, prompts: Sequence[tuple[int, ...]]) -> list[tuple[PromptKV, torch.Tensor]]:
        """Each prompt with the logits of what follows it, [V]."""
        # `pack` leaves out a sequence's last token, which predicts nothing in training; here it predicts the answer.
        batch = pack([[TokenSeq((*prompt, 0), (False,) * (len(prompt) + 1))] for prompt in prompts]).to(self._device)
        kept = [PromptKV(len(prompt)) for prompt in prompts]
        self._cache.expect([(kv, tree.start, tree.split) for kv, tree in zip(kept, batch.layout.trees, strict=True)])
        last = torch.tensor([tree.split - 1 for tree in batch.layout.trees], device=self._device)
        output = self._policy.model(
            input_ids=batch.input_ids_N[None], position_ids=batch.position_ids_N[None],
            logits_to_keep=last, use_cache=False, layout=batch.layout, kv_store=self._cache,
        )  # fmt: skip
        return list(zip(kept, output.logits[0], strict=True))

    def step(self, ids: Sequence[int]) -> torch.Tensor:
        """One more token in each row → logits of what follows it, [R, V]."""
        self._cache.begin_step()
        ids_R = torch.tensor(ids, device=self._device)
        positions_R = torch.tensor(self._cache.positions(), device=self._device)
        return self._decode(ids_R, positions_R, self._cache)


class _Decoding:
    """Samples rows until they end, or would be longer than `longest` inputs."""

    def __init__(
        self,
        policy: Policy,
        rows: Sequence[DecodingRow],
        params: SamplingParams,
        ends: Ends,
        longest: int | None = None,
    ) -> None:
        forget_lengths(policy.base)
        self._policy, self._params, self._ends, self._longest = policy, params, ends, longest
        self._device = policy.placement.device
        self._waiting = deque(rows)
        self._rows: list[DecodingRow] = []
        self._running: Any = ExactRows(policy, params) if policy.exact else CachedRows(policy)
        self._sample = sample_scored if policy.exact else sample
        self._prompts: dict[tuple[int, ...], tuple[Any, torch.Tensor]] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def advance(self, batch_size: int) -> list[DecodingRow]:
        """One token for every row there is room for; the rows that ended with it."""
        self._ended: list[DecodingRow] = []
        while self._waiting and len(self._rows) < batch_size:
            self._admit(batch_size - len(self._rows))
        if self._rows:
            self._step()
        return self._ended

    def _admit(self, free: int) -> None:
        """Start waiting rows: prefill what they begin with where that is new, sample each row's next token."""
        rows = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        prompts = [row.sequence for row in rows]
        self._prefill(prompts)
        scores_RV = torch.stack([self._prompts[prompt][1] for prompt in prompts])
        for prompt in prompts:
            self._running.add_row(self._prompts[prompt][0])
        self._rows += rows
        self._extend(rows, scores_RV)
        self._forget_prompts()

    def _prefill(self, prompts: Sequence[tuple[int, ...]]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if new:
            self._prompts.update(zip(new, self._running.prefill(new), strict=True))

    def _step(self) -> None:
        self._extend(self._rows, self._running.step([row.ids[-1] for row in self._rows]))

    def _extend(self, rows: Sequence[DecodingRow], scores_RV: torch.Tensor) -> None:
        """Sample the next token of each row and retire those that are finished."""
        uniform_R = torch.tensor([row.uniform[len(row.ids)] for row in rows], device=self._device)
        ids_R, logp_R = self._sample(scores_RV, uniform_R, self._params)
        for row, token, logp in zip(list(rows), ids_R.tolist(), logp_R.tolist(), strict=True):
            row.take(token, logp, self._ends)
        for place in reversed(range(len(self._rows))):
            if self._is_over(self._rows[place]):
                self._ended += [self._rows[place]] if self._rows[place].finish is not None else []
                self._running.drop_row(place)
                self._rows[place] = self._rows[-1]
                self._rows.pop()

    def _is_over(self, row: DecodingRow) -> bool:
        return row.finish is not None or (self._longest is not None and len(row.sequence) > self._longest)

    def _forget_prompts(self) -> None:
        """Prompts that no waiting row needs any more live on only in the rows that use them."""
        needed = {row.sequence for row in self._waiting}
        self._prompts = {prompt: kept for prompt, kept in self._prompts.items() if prompt in needed}


def _changed_encoding(row: DecodingRow, rule: LengthRule) -> bool:
    """Whether the first token was sampled from another encoding than the last, which is the trainer's."""
    return rule.encoding(len(row.request.prompt_ids)) != rule.encoding(len(row.sequence) - 1)


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
