"""Scores a model on a split of a suite: one record per item, all kept. Knows engines and scorers, not models."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, zip_longest
from typing import Any, Protocol

from posttrain.config.pipeline import SuiteKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import DataError, EvalError
from posttrain.evals.harness import TaskSuite
from posttrain.evals.suite import RANKINGS, Item, Suite, is_own
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import digest_json
from posttrain.grading.scorers import SCORERS
from posttrain.grading.source import specs_digest
from posttrain.protocols import Engine, Ranks
from posttrain.types import Completion, EngineInfo, Request, SamplingParams, Text, in_order

_ITEMS_PER_CALL = 256
PLAYED_WITH = "played_with"
"""In a report's decoding: the digest of env and tools, and the most turns."""


class Codec(Protocol):
    """Text in, ids out, and back."""

    def encode_prompt(self, prompt: Text, tools: Any = None) -> tuple[int, ...]:
        """Raises: DataError where the chat template does not write all of it."""
        ...

    def encode_choice(self, prompt: Text, choice: str, tools: Any = None) -> tuple[tuple[int, ...], int]:
        """The ids of prompt and choice, and where the choice begins."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


_EncodedItem = list[tuple[tuple[int, ...], int]]
"""What an engine is asked of an item: ids, and where in them the choice begins."""
_AnsweredItem = tuple[Item, tuple[Completion, ...], tuple[str, ...]]
"""The completions of an item, and as texts."""


OwnScorer = Callable[[Suite, Sequence[Item], Sequence[str]], Sequence[tuple[float | None, str | None]]]
"""A suite whose scorer is a user's function, items, one completion of each → score and, where it failed, why."""


TaskRunner = Callable[[TaskSuite, SuiteKeys], Iterable[ItemRecord]]
"""All documents of a task of lm-eval, answered and scored."""


Play = Callable[[Sequence[Item], Sequence[Request], SamplingParams], list[Completion]]
"""Items, the first turn of each → its episode, in order."""


def _no_task(suite: Suite) -> Iterable[ItemRecord]:
    raise EvalError(f"suite {suite.name} is a task of lm-eval; this evaluator cannot ask it")


def _no_workers(suite: Suite) -> Sequence[tuple[float | None, str | None]]:
    raise EvalError(
        f"suite {suite.name}: scorer {suite.scorer!r} is a file; this evaluator has no process to run it in"
    )


@dataclass(frozen=True)
class Evaluator:
    """An engine with what is needed to ask it in text. `progress(done, total)` is called now and then.

    Of several `ranks` each has an engine and asks its share of the items; all call `run`. A call of an engine stands in `ending()`,
    which may end it.
    """

    engine: Engine
    codec: Codec
    model_digest: str
    seed_of: Callable[..., int]
    progress: Callable[[str, int, int], None] = field(default=lambda name, done, total: None)
    score_own: OwnScorer = field(default=lambda suite, items, texts: _no_workers(suite))
    ask_task: TaskRunner = field(default=lambda suite, keys: _no_task(suite))
    play: Play | None = None
    """How items are answered in several turns; None samples one."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Offered beside an item's own."""
    ranks: Ranks = field(default_factory=SingleProcess)
    ending: Callable[[], AbstractContextManager[None]] = nullcontext
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
        """Every item of the split answered and scored, except those whose record is `known`. The report is that of one process.

        Another `order` asks in another order, so that every item is batched with others; the report is in the suite's.
        """
        started, calls = time.monotonic(), _ITEMS_PER_CALL * self.ranks.world_size
        items = suite.on(split)
        records = {item.id: known[item.id] for item in items if known and item.id in known}
        waiting = [item for item in items if item.id not in records]
        if isinstance(suite, TaskSuite):  # its few-shot examples are drawn one document after the other
            found = self.ranks.main_only(partial(self._of_task, suite, keys))
            records, waiting = {record.id: record for record in found}, []
        if order:
            random.Random(order).shuffle(waiting)
        for start in range(0, len(waiting), calls):
            # All ranks read all items, so that one that cannot be asked is an error of each before any waits for an engine.
            part = [(item, self._encoded(item)) for item in waiting[start : start + calls]]
            shares = self.ranks.each(partial(self._answered, self.ranks.share(part), keys, suite))
            self.ranks.main_only(partial(self._add, records, shares, suite))
            self.progress(suite.name, len(items) - len(waiting) + start + len(part), len(items))
        return self.ranks.main_only(partial(self._report, suite, keys, split, items, records, started))

    def _report(
        self, suite: Suite, keys: SuiteKeys, split: str, items: Sequence[Item], records: Mapping[str, ItemRecord],
        started: float,
    ) -> EvalReport:  # fmt: skip
        decoding = decoding_of(keys)
        return EvalReport(
            suite=suite.name, split=split, suite_digest=suite.digest(split, decoding), model_digest=self.model_digest,
            scorer=suite.scorer, items=tuple(records[item.id] for item in items), decoding=decoding,
            wall_s=time.monotonic() - started, engine=named(self.engine.describe()),
        )  # fmt: skip

    def _of_task(self, suite: TaskSuite, keys: SuiteKeys) -> list[ItemRecord]:
        with self.ending():
            return list(self.ask_task(suite, keys))

    def _encoded(self, item: Item) -> _EncodedItem:
        """Prompt and tools as ids, once for each choice. Raises: EvalError with the item's name."""
        if self.tools and isinstance(item.prompt, str):
            raise EvalError(
                f"suite item {item.id}: its prompt is a text, and tools are offered in a chat; write it as messages"
            )
        try:
            return self._ids(item, offered(item, self.tools))
        except DataError as error:
            raise EvalError(f"suite item {item.id}: {error}") from None

    def _ids(self, item: Item, tools: Any) -> _EncodedItem:
        if item.scorer in RANKINGS:
            return [self.codec.encode_choice(item.prompt, choice, tools=tools) for choice in item.choices]
        return [(self.codec.encode_prompt(item.prompt, tools=tools), 0)]

    def _answered(
        self, part: Sequence[tuple[Item, _EncodedItem]], keys: SuiteKeys, suite: Suite
    ) -> list[ItemRecord] | list[_AnsweredItem]:
        """Scored, but for a scorer of the suite's own."""
        with self.ending():
            if suite.scorer in RANKINGS:
                return list(self._ranked(part))
            answers = self._sampled(part, keys)
            return answers if is_own(suite.scorer) else self._scored(answers, suite)

    def _add(self, records: dict[str, ItemRecord], shares: Sequence[Sequence[Any]], suite: Suite) -> None:
        """What all ranks have. Its own scorer is asked here, in the items' order: one function, one model, one judge for all."""
        made = [answered for turn in zip_longest(*shares) for answered in turn if answered is not None]
        if is_own(suite.scorer):
            with self.ending():
                made = self._scored(made, suite)
        records |= {record.id: record for record in made}

    def _sampled(self, part: Sequence[tuple[Item, _EncodedItem]], keys: SuiteKeys) -> list[_AnsweredItem]:
        params = SamplingParams(max_tokens=keys.max_tokens, temperature=keys.temperature)
        requests = [
            Request(tuple(ids), self.seed_of("eval", keys.seed, item.id, sample))
            for item, [(ids, _)] in part
            for sample in range(keys.num_samples)
        ]
        each = [item for item, _ in part for _ in range(keys.num_samples)]
        completions = iter(self.play(each, requests, params) if self.play else self._generate(requests, params))
        groups = [tuple(islice(completions, keys.num_samples)) for _ in part]
        return [
            (item, group, tuple(c.episode.answer if c.episode else self.codec.decode(c.ids) for c in group))
            for (item, _), group in zip(part, groups, strict=True)
        ]

    def _scored(self, answers: Sequence[_AnsweredItem], suite: Suite) -> list[ItemRecord]:
        items = [_played(item, completion) for item, group, _ in answers for completion in group]
        flat = [text for _, _, texts in answers for text in texts]
        if is_own(suite.scorer):
            scores = list(self.score_own(suite, items, flat))
        else:
            scores = [
                (SCORERS[item.scorer](text, item.target, item.columns), None)
                for item, text in zip(items, flat, strict=True)
            ]
        completions = [completion for _, group, _ in answers for completion in group]
        kept = iter(
            [
                (0.0, completion.episode.error) if completion.episode and completion.episode.error else score
                for completion, score in zip(completions, scores, strict=True)
            ]
        )
        return [_record(item, group, texts, list(islice(kept, len(texts)))) for item, group, texts in answers]

    def _generate(self, requests: Sequence[Request], params: SamplingParams) -> list[Completion]:
        """Greedy answers follow from the prompt alone: suites that ask the same thing share them."""
        if params.temperature > 0:
            return in_order(self.engine.generate(requests, params))
        new = {
            (r.prompt_ids, params.max_tokens): r
            for r in requests
            if (r.prompt_ids, params.max_tokens) not in self._greedy
        }
        self._greedy.update(zip(new, in_order(self.engine.generate(list(new.values()), params)), strict=True))
        return [self._greedy[r.prompt_ids, params.max_tokens] for r in requests]

    def _ranked(self, part: Sequence[tuple[Item, _EncodedItem]]) -> Iterator[ItemRecord]:
        """The choice that ranks highest wins; ties go to the first, as in lm-eval."""
        sequences = [sequence for _, choices in part for sequence in choices]
        logps = iter([sum(values) for values in self.engine.score(sequences)])
        for item, _ in part:
            ranks = [RANKINGS[item.scorer](next(logps), choice) for choice in item.choices]
            best = item.choices[max(range(len(ranks)), key=ranks.__getitem__)]
            yield ItemRecord(item.id, prompt_digest(item), (float(best == item.target),), item.cluster, (best,))


def _played(item: Item, completion: Completion) -> Item:
    """With what the environment of its episode paid and measured, under the names that rewards have it by."""
    if (episode := completion.episode) is None:
        return item
    paid = {"env_reward": episode.env_reward, "env_metrics": episode.env_metrics}
    return replace(item, columns={**item.columns, **paid})


def offered(item: Item, tools: Sequence[Any]) -> Any:
    """The tools of an item as its column holds them, or with others behind. Raises: EvalError."""
    own = item.columns.get("tools")
    if not tools or not own:
        return list(tools) or own
    if not isinstance(own, list):
        raise EvalError(
            f"suite item {item.id}: `tools` is {type(own).__name__}, expected a list beside evals' own tools"
        )
    return [*own, *tools]


def _record(
    item: Item,
    completions: Sequence[Completion],
    texts: Sequence[str],
    scores: Sequence[tuple[float | None, str | None]],
) -> ItemRecord:
    """An own scorer that fails on a completion scores it 0, and the item keeps the reason. Raises: EvalError."""
    if any(score is None and reason is None for score, reason in scores):
        raise EvalError(
            f"suite item {item.id}: scorer {item.scorer!r} could not score it; is its target of the right kind? ({item.target!r})"
        )
    return ItemRecord(
        id=item.id, prompt_digest=prompt_digest(item), scores=tuple(float(score or 0.0) for score, _ in scores),
        cluster=item.cluster, completions=tuple(texts), finishes=tuple(c.finish for c in completions),
        num_tokens=tuple(c.num_sampled for c in completions), error=next((reason for _, reason in scores if reason), None),
    )  # fmt: skip


def named(engine: EngineInfo) -> str:
    """As a report names it."""
    return "" if engine.name == "embedded" else f"{engine.name} {engine.version}"


def decoding_of(keys: SuiteKeys) -> dict[str, Any]:
    decoding: dict[str, Any] = {
        "num_samples": keys.num_samples,
        "temperature": keys.temperature,
        "max_tokens": keys.max_tokens,
        "seed": keys.seed,
    }
    if keys.plays:
        decoding[PLAYED_WITH] = [specs_digest(keys.played_with), keys.max_turns]
    return decoding


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
