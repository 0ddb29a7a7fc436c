"""Scores a model on a split of a suite: one record per item, all kept. Knows engines and scorers, not models."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from posttrain.config.pipeline import SuiteKeys
from posttrain.errors import EvalError
from posttrain.evals.suite import CHOICES, Item, Suite
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_json
from posttrain.grading.scorers import SCORERS
from posttrain.protocols import Engine
from posttrain.types import Completion, Request, SamplingParams, Text

_ITEMS_PER_CALL = 256


class Codec(Protocol):
    """Text in, ids out, and back."""

    def encode_prompt(self, prompt: Text) -> tuple[int, ...]: ...

    def encode_answer(self, text: str) -> tuple[int, ...]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Evaluator:
    """An engine with what is needed to ask it in text. `progress(done, total)` is called now and then."""

    engine: Engine
    codec: Codec
    model_digest: str
    seed_of: Callable[..., int]
    progress: Callable[[str, int, int], None] = field(default=lambda name, done, total: None)
    _greedy: dict[tuple[tuple[int, ...], int], Completion] = field(default_factory=dict, repr=False)

    def run(
        self,
        suite: Suite,
        keys: SuiteKeys,
        split: str,
        *,
        known: Mapping[str, ItemRecord] | None = None,
        order: int = 0,
    ) -> EvalReport:
        """Every item of the split answered and scored, except those whose record is `known`.

        Another `order` asks in another order, so that every item is batched with others; the report is in the suite's.
        """
        started = time.monotonic()
        items = suite.on(split)
        records = {item.id: known[item.id] for item in items if known and item.id in known}
        waiting = [item for item in items if item.id not in records]
        if order:
            random.Random(order).shuffle(waiting)
        for start in range(0, len(waiting), _ITEMS_PER_CALL):
            part = waiting[start : start + _ITEMS_PER_CALL]
            made = self._ranked(part) if suite.scorer == CHOICES else self._sampled(part, keys)
            records |= {record.id: record for record in made}
            self.progress(suite.name, len(records), len(items))
        decoding = decoding_of(keys)
        return EvalReport(
            suite=suite.name, split=split, suite_digest=suite.digest(split, decoding), model_digest=self.model_digest,
            scorer=suite.scorer, items=tuple(records[item.id] for item in items), decoding=decoding,
            wall_s=time.monotonic() - started,
        )  # fmt: skip

    def _sampled(self, items: Sequence[Item], keys: SuiteKeys) -> Iterator[ItemRecord]:
        params = SamplingParams(max_tokens=keys.max_tokens, temperature=keys.temperature)
        requests = [
            Request(self.codec.encode_prompt(item.prompt), self.seed_of("eval", keys.seed, item.id, sample))
            for item in items
            for sample in range(keys.num_samples)
        ]
        completions = self._generate(requests, params)
        for index, item in enumerate(items):
            yield self._record(item, completions[index * keys.num_samples : (index + 1) * keys.num_samples])

    def _generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Greedy answers follow from the prompt alone: suites that ask the same thing share them."""
        if params.temperature > 0:
            return self.engine.generate(requests, params)
        new = {
            (r.prompt_ids, params.max_tokens): r
            for r in requests
            if (r.prompt_ids, params.max_tokens) not in self._greedy
        }
        self._greedy.update(zip(new, self.engine.generate(list(new.values()), params), strict=True))
        return [self._greedy[r.prompt_ids, params.max_tokens] for r in requests]

    def _record(self, item: Item, completions: Sequence[Completion]) -> ItemRecord:
        texts = tuple(self.codec.decode(completion.ids) for completion in completions)
        scores = [SCORERS[item.scorer](text, item.target, item.columns) for text in texts]
        if any(score is None for score in scores):
            raise EvalError(
                f"suite item {item.id}: scorer {item.scorer!r} could not score it; is its target of the right kind? ({item.target!r})"
            )
        return ItemRecord(
            id=item.id, prompt_digest=prompt_digest(item), scores=tuple(float(score) for score in scores if score is not None),
            cluster=item.cluster, completions=texts, finishes=tuple(c.finish for c in completions),
            num_tokens=tuple(len(c.ids) for c in completions),
        )  # fmt: skip

    def _ranked(self, items: Sequence[Item]) -> Iterator[ItemRecord]:
        """The choice with the highest log-prob wins; ties go to the first, as in lm-eval."""
        prompts = [self.codec.encode_prompt(item.prompt) for item in items]
        sequences = [
            ((*prompt, *self.codec.encode_answer(choice)), len(prompt))
            for item, prompt in zip(items, prompts, strict=True)
            for choice in item.choices
        ]
        logps = iter([sum(values) for values in self.engine.score(sequences)])
        for item in items:
            totals = [next(logps) for _ in item.choices]
            best = item.choices[max(range(len(totals)), key=totals.__getitem__)]
            yield ItemRecord(item.id, prompt_digest(item), (float(best == item.target),), item.cluster, (best,))


def decoding_of(keys: SuiteKeys) -> dict[str, Any]:
    return {
        "num_samples": keys.num_samples,
        "temperature": keys.temperature,
        "max_tokens": keys.max_tokens,
        "seed": keys.seed,
    }


def prompt_digest(item: Item) -> str:
    """What pairs two models' answers: the question and what counts as right."""
    return digest_json([item.to_json()["prompt"], item.target, list(item.choices)])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right. Source: Chen et al. 2021, arXiv 2107.03374 eq. 1.

    Raises: EvalError for fewer than k samples: they say nothing about k.
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise EvalError(
            f"pass@{k} of {num_correct} right in {num_samples} samples: needs at least k samples; raise num_samples or lower k"
        )
    if num_samples - num_correct < k:
        return 1.0
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_at_ks(report: EvalReport) -> dict[int, float]:
    """pass@k for k = 1, 2, 4 … up to the number of samples, averaged over items."""
    largest = min((len(item.scores) for item in report.items), default=0)
    ks = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
    counts = [(len(item.scores), sum(score >= 1.0 for score in item.scores)) for item in report.items]
    return {k: sum(pass_at_k(n, c, k) for n, c in counts) / len(counts) for k in ks}
