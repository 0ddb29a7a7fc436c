"""The embedded engine: samples from the policy's own weights, in process, many rows at a time.

A prompt is prefilled once however many completions it has; finished rows leave the batch and waiting requests take
their places. Speaks token ids; stop strings are all it knows of text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

import posttrain
from posttrain.errors import EngineError
from posttrain.models.batch import fill_by_tokens, pack
from posttrain.models.compiled import as_written
from posttrain.models.lengths import LengthRule, length_rule
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.protocols import Weights
from posttrain.rollout.cached import NO_SHORTCUTS, Shortcuts
from posttrain.rollout.decoding import Decoding, DecodingRow, Ends
from posttrain.rollout.drafts import Speculation
from posttrain.rollout.paged import paged_rows
from posttrain.rollout.prefixes import PrefixCache
from posttrain.rollout.replica import receive
from posttrain.rollout.sampling import stop_test
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams, TokenSeq

log = logging.getLogger(__name__)

_SCORED_AT_ONCE = 8192
"""Tokens."""


class EmbeddedEngine:
    """Decodes at most `batch_size` completions at once from `policy`, in this process.

    `shares_weights` where `policy` is the one that is trained; else it is a copy, which an update fills. With `enforce_eager` a GPU
    decodes by the loop of a CPU, without pages and graphs. `shortcuts`: what that loop does faster, with other last bits. `prefix_bytes`:
    room for how prompts begin, kept from one call to the next until an update; prompts that are longer than a block are then always
    encoded by blocks. `speculation`: what it may draft from, and learns from what it samples; an update does not end that.
    """

    def __init__(
        self, policy: Policy, *, stop_token_ids: Sequence[int], batch_size: int = 64, shares_weights: bool = True,
        enforce_eager: bool = False, shortcuts: Shortcuts = NO_SHORTCUTS, prefix_bytes: int = 0, speculation: Speculation | None = None,
    ) -> None:  # fmt: skip
        self._policy = policy
        self._stop_token_ids = frozenset(stop_token_ids)
        self._batch_size = batch_size
        self._shares_weights = shares_weights
        self._shortcuts = shortcuts
        self._version = 0
        self._paged = None if enforce_eager else paged_rows(policy)
        for key, why in self._shortcuts.without_effect(policy, paged=self._paged is not None).items():
            log.warning("rollout.%s: no effect, because %s", key, why)
        keeps = self._runs_side_by_side("prefix_cache_gib", "pages hold whole prompts") if prefix_bytes else False
        self._prefix_bytes = prefix_bytes if keeps else 0
        self._prefixes = self._no_prefixes()
        verifies = speculation and self._runs_side_by_side("rollout.speculation", "graphs are of one token a row")
        self._speculation = speculation if verifies else None

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
        should_stop = stop_test(params.stop, decoder(self._policy.tokenizer, special=True))
        stops = self._stop_token_ids | set(params.stop_token_ids)
        most = [request.most(params) for request in requests]
        rows = [
            DecodingRow(place, request, params, Ends(n, stops, should_stop))
            for place, (request, n) in enumerate(zip(requests, most, strict=True))
        ]
        return self._completions(rows)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        return score_sequences(self._policy, sequences, temperature)

    def update(self, weights: Weights, version: int) -> Moved:
        self._prefixes = self._no_prefixes()
        num_bytes = 0 if self._shares_weights else receive(self._policy, weights)
        self._version = version
        return Moved(num_bytes, num_bytes)

    def rest(self) -> None:
        """What it holds is the trainer's."""

    def close(self) -> None:
        pass

    def _runs_side_by_side(self, key: str, on_a_gpu: str) -> bool:
        """Whether rows lie in `CachedRows`, wherever they begin and however many tokens they write; else a warning that `key` does nothing."""
        why = f"a GPU's {on_a_gpu}" if self._paged else ""
        if not self._policy.ragged or length_rule(self._policy.base.config) is not None:
            why = f"{self._policy.source} encodes and decodes row by row, or by length"
        if why:
            log.warning("%s: no effect, because %s", key, why)
        return not why

    def _no_prefixes(self) -> PrefixCache | None:
        return PrefixCache(self._policy, self._prefix_bytes) if self._prefix_bytes else None

    def _completions(self, rows: Sequence[DecodingRow]) -> Iterator[Completion]:
        was_training = self._policy.model.training
        self._policy.model.eval()
        try:
            for row in self._finished(rows):
                assert row.finish is not None, "only what has ended is handed out"
                routed = np.stack(row.routed) if row.routed else None
                yield Completion(
                    tuple(row.ids), tuple(row.logp), row.finish, self._version, row.place, routed_experts=routed
                )
        finally:
            self._policy.model.train(was_training)

    def _finished(self, rows: Sequence[DecodingRow]) -> Iterator[DecodingRow]:
        """Each row when it has ended; rows are sampled together with those that are encoded alike."""
        rule = length_rule(self._policy.base.config)
        if rule is None or not self._policy.ragged:
            yield from self._decoded(rows, alone=not self._policy.ragged)
            return
        short = [row for row in rows if len(row.sequence) <= rule.boundary]
        for _ in self._decoded(short, longest=rule.boundary):
            pass
        # Those that outgrew the boundary are encoded anew.
        for _ in self._decoded([row for row in rows if row.finish is None], alone=rule.each):
            pass
        self._score_anew([row for row in rows if _changed_encoding(row, rule)])
        yield from rows

    def _decoded(
        self, rows: Sequence[DecodingRow], *, longest: int | None = None, alone: bool = False
    ) -> Iterator[DecodingRow]:
        with self._computing():
            decoding = Decoding(
                self._policy, rows, longest=longest, alone=alone, paged=self._paged, shortcuts=self._shortcuts,
                prefixes=self._prefixes, drafter=self._speculation and self._speculation.of_call(),
            )  # fmt: skip
        try:
            while decoding.is_busy:
                # Not around the yield: whoever takes the rows must not compute in our context.
                with self._computing():
                    ended = decoding.advance(self._batch_size)
                yield from ended
        finally:
            # Whoever takes no more completions leaves rows behind, in a cache that outlasts this call.
            for row in rows:
                decoding.leave(row)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.no_grad(), self._policy.placement.autocast(), as_written(self._policy):
            yield

    def _score_anew(self, rows: Sequence[DecodingRow]) -> None:
        """Log-probs of whole sequences as the trainer encodes them, for rows whose first tokens were encoded otherwise."""
        sequences = [(row.sequence, len(row.request.prompt_ids)) for row in rows]
        temperature = rows[0].params.temperature if rows else 1.0
        for row, logp in zip(rows, self.score(sequences, temperature or 1.0), strict=True):
            row.logp = logp


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
    for chunk in fill_by_tokens(sequences, lambda sequence: len(sequence[0]), _SCORED_AT_ONCE):
        batch = pack([[_scored(ids, start)] for ids, start in chunk])
        logp_M = policy.score(batch, temperature=temperature).logp_M
        scores += [part.tolist() for part in logp_M.split(batch.lengths_S().tolist())]
    policy.model.train(was_training)
    return scores


def _scored(ids: Sequence[int], start: int) -> TokenSeq:
    if not 1 <= start <= len(ids):
        raise EngineError(f"score: start={start} of a sequence of {len(ids)} tokens; the first token has no log-prob")
    return TokenSeq(tuple(ids), (False,) * start + (True,) * (len(ids) - start))
