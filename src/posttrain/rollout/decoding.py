"""Continuous batching: rows join and leave between steps, and each is sampled as if it were alone.

The one way in which tokens are decoded here, for rollouts, evals, chat and the server. Knows nothing of text.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, islice
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from posttrain.models.batch import fill_by_tokens
from posttrain.models.device import uploaded
from posttrain.models.lengths import forget_lengths
from posttrain.models.policy import Policy
from posttrain.rollout.alone import AloneRows, OwnCacheRows
from posttrain.rollout.cached import NO_SHORTCUTS, CachedRows, Shortcuts
from posttrain.rollout.drafts import Drafter
from posttrain.rollout.exact import ExactRows
from posttrain.rollout.paged import PagedRows
from posttrain.rollout.prefixes import PrefixCache
from posttrain.rollout.sampling import RequestUniforms, StopTest, sample, sample_scored
from posttrain.types import Finish, Request, SamplingParams

T = TypeVar("T")

_ENCODED_AT_ONCE = 8192
"""Tokens of whole prompts in one forward, whose activations need several times the memory of the keys and values it leaves."""
Shaper = Callable[[Sequence[int], torch.Tensor], torch.Tensor]
"""The ids sampled so far and the logits of the next one, [V] → the logits to sample from: a grammar, a bias, a penalty."""


@dataclass(frozen=True)
class Ends:
    """What ends a completion."""

    max_tokens: int
    stop_ids: frozenset[int]
    should_stop: StopTest | None


@dataclass(frozen=True, slots=True)
class Likeliest:
    """Log-prob (nats) of a sampled token and of the most likely ones at its place, before temperature, shaping and cuts."""

    logp: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class DecodingRow:
    """A completion under way: the place of its request, what was sampled so far, and how it ended.

    `logp` is that of the distribution after `shaper` and temperature, before the cuts. With `num_top`, `likeliest` says for
    each token what else was likely; `routed` the experts that the token before it went to, where they are recorded. `adapter` names the adapter that the row goes through, where there are several.
    """

    place: int
    request: Request
    params: SamplingParams
    ends: Ends
    adapter: str | None = None
    shaper: Shaper | None = None
    num_top: int | None = None
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    likeliest: list[Likeliest] = field(default_factory=list)
    routed: list[np.ndarray] = field(default_factory=list[np.ndarray])
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.uniform = RequestUniforms(self.request.seed)

    @property
    def sequence(self) -> tuple[int, ...]:
        return self.request.prompt_ids + tuple(self.ids)

    @property
    def encoded_with(self) -> tuple[str | None, tuple[int, ...]]:
        """What decides its keys and values: rows share them where this is equal."""
        return self.adapter, self.sequence

    @property
    def drafted_for(self) -> tuple[str | None, tuple[int, ...]]:
        """Rows of which this is equal may go on alike."""
        return self.adapter, self.request.prompt_ids

    @property
    def num_left(self) -> int:
        """Tokens that it may still get."""
        return self.ends.max_tokens - len(self.ids)

    def take(self, token: int, logp: float) -> None:
        """The next token; afterwards `finish` says whether it was the last."""
        self.ids.append(token)
        self.logp.append(logp)
        if token in self.ends.stop_ids or (self.ends.should_stop is not None and self.ends.should_stop(self.ids)):
            self.finish = "stop"
        elif len(self.ids) >= self.ends.max_tokens:
            self.finish = "length"


class _Encoded(NamedTuple):
    """A prompt: its keys and values, the logits of what follows it, the experts of its last token where they are recorded."""

    kept: Any
    scores_V: torch.Tensor
    routed_LK: np.ndarray | None


class TokenAdapters(Protocol):
    """Several adapters over one base: which of them each token of the next forward goes through."""

    def assign(self, names: Sequence[str | None]) -> None: ...


class Decoding:
    """Samples rows until they end, or would be longer than `longest` inputs.

    `alone`: each row by itself, from the cache that the model itself keeps where that is exact, for models whose rows cannot be run together; no `adapters` then.
    `paged`: the cache to use where nobody else is using it; else `shortcuts` are `CachedRows`'.
    `prefixes`: what is known of how prompts begin, of rows on `CachedRows`. `drafter` guesses how rows on these, or on `ExactRows`, go on.
    """

    def __init__(
        self, policy: Policy, rows: Iterable[DecodingRow] = (), *,
        longest: int | None = None, alone: bool = False, adapters: TokenAdapters | None = None,
        paged: PagedRows | None = None, shortcuts: Shortcuts = NO_SHORTCUTS, prefixes: PrefixCache | None = None,
        drafter: Drafter | None = None,
    ) -> None:  # fmt: skip
        assert not (alone and adapters), "tokens of several forwards cannot be assigned at once"
        forget_lengths(policy.base)
        self._longest, self._adapters = longest, adapters
        self._device = policy.placement.device
        self._waiting = deque(rows)
        self._needed = Counter(row.encoded_with for row in self._waiting)
        self._rows: list[DecodingRow] = []
        temperature = next((row.params.temperature for row in self._waiting), 1.0)
        self._running: Any = (
            OwnCacheRows(policy) if alone and policy.cache_is_exact else AloneRows(policy) if alone else ExactRows(policy, temperature) if policy.exact
            else paged.begin() if paged is not None and not paged.is_busy else CachedRows(policy, shortcuts.of_call(len(self._waiting)))
        )  # fmt: skip
        self._prefixes = prefixes if isinstance(self._running, CachedRows) else None
        self._drafter = drafter if isinstance(self._running, CachedRows | ExactRows) else None
        self._sample = sample_scored if policy.exact and not alone else sample
        self._choices = policy.choices
        self._prompts: dict[tuple[str | None, tuple[int, ...]], _Encoded] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def join(self, row: DecodingRow) -> None:
        """Decode it too, from the next step on."""
        self._waiting.append(row)
        self._needed[row.encoded_with] += 1

    def leave(self, row: DecodingRow) -> None:
        """Forget a row, however far it is; what it sampled stays with it."""
        if row in self._waiting:
            self._waiting.remove(row)
            self._forget_prompts([row.encoded_with])
        elif row in self._rows:
            self._drop(self._rows.index(row))

    def advance(self, batch_size: int, prefill_tokens: int | None = None) -> list[DecodingRow]:
        """One token for every row there is room for; the rows that ended with it.

        At most `prefill_tokens` of new prompts are encoded, one prompt at least: others decode on meanwhile.
        """
        self._ended: list[DecodingRow] = []
        while self._waiting and len(self._rows) < batch_size:
            self._admit(batch_size - len(self._rows), prefill_tokens)
            if prefill_tokens is not None:
                break
        if self._rows:
            self._step()
        return self._ended

    def _admit(self, free: int, prefill_tokens: int | None) -> None:
        """Start waiting rows: prefill what they begin with where that is new, sample each row's next token."""
        rows = self._first_waiting(free, prefill_tokens)
        prompts = [row.encoded_with for row in rows]
        self._prefill(prompts)
        encoded = [self._prompts[prompt] for prompt in prompts]
        for one in encoded:
            self._running.add_row(one.kept)
        self._rows += rows
        self._extend(rows, torch.stack([one.scores_V for one in encoded]), [one.routed_LK for one in encoded])
        self._forget_prompts(prompts)

    def _first_waiting(self, free: int, prefill_tokens: int | None) -> list[DecodingRow]:
        rows, seen, tokens = list[DecodingRow](), set[Any](), 0
        while self._waiting and len(rows) < free:
            prompt = self._waiting[0].encoded_with
            tokens += 0 if prompt in seen or prompt in self._prompts else len(prompt[1])
            seen.add(prompt)
            if rows and prefill_tokens is not None and tokens > prefill_tokens:
                break
            rows.append(self._waiting.popleft())
        return rows

    def _prefill(self, prompts: Sequence[tuple[str | None, tuple[int, ...]]]) -> None:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._prompts]
        if self._prefixes is not None:
            for adapter, ids in [prompt for prompt in new if self._prefixes.takes(prompt[1])]:
                assign = partial(self._assign_all, adapter)
                encode = partial(self._running.prefill_from, self._prefixes, adapter, ids, assign)
                (kept, scores_V), routed = self._noted(encode)
                self._prompts[adapter, ids] = _Encoded(kept, scores_V, None if routed is None else routed[-1])
            new = [prompt for prompt in new if prompt not in self._prompts]
        for part in fill_by_tokens(new, lambda prompt: len(prompt[1]), _ENCODED_AT_ONCE):
            self._assign([adapter for adapter, ids in part for _ in ids])
            found, routed = self._noted(partial(self._running.prefill, [ids for _, ids in part]))
            ends = accumulate(len(ids) for _, ids in part)
            for prompt, (kept, scores_V), end in zip(part, found, ends, strict=True):
                self._prompts[prompt] = _Encoded(kept, scores_V, None if routed is None else routed[end - 1])

    def _step(self) -> None:
        drafts = self._drafter.drafts(self._rows) if self._drafter is not None else []
        if any(drafts):
            self._verify(drafts)
            return
        self._assign([row.adapter for row in self._rows])
        scores_RV, routed = self._noted(partial(self._running.step, [row.ids[-1] for row in self._rows]))
        self._extend(self._rows, scores_RV, [None] * len(self._rows) if routed is None else routed)

    def _verify(self, drafts: Sequence[Sequence[int]]) -> None:
        """Sample behind each token of a draft as if those before it had been sampled, and keep what was, up to the first that differs."""
        assert self._drafter is not None, "somebody drafted"
        written = [(row.ids[-1], *draft) for row, draft in zip(self._rows, drafts, strict=True)]
        rows_N = [row for row, own in zip(self._rows, written, strict=True) for _ in own]
        self._assign([row.adapter for row in rows_N])
        scores_NV, routed = self._noted(partial(self._running.run_drafts, written))
        numbers_N = [len(row.ids) + n for row, own in zip(self._rows, written, strict=True) for n in range(len(own))]
        sampled = list(_tokens(*self._sampled(rows_N, numbers_N, scores_NV)))
        kept: list[int] = []
        firsts = accumulate((len(own) for own in written), initial=0)
        for row, draft, first in zip(self._rows, drafts, islice(firsts, len(written)), strict=True):
            kept.append(_take_verified(row, draft, sampled[first : first + len(draft) + 1]))
            row.routed += [] if routed is None else list(routed[first : first + kept[-1]])
            self._drafter.note(row, len(draft), kept[-1] - 1)
        self._running.keep_drafts(kept)
        self._retire()

    def _noted(self, run: Callable[[], T]) -> tuple[T, np.ndarray | None]:
        """With the experts of all tokens that went through, in order, where they are recorded. Shape: [T, L, K]."""
        if self._choices is None:
            return run(), None
        with self._choices.recording() as found:
            result = run()
        return result, found[0]

    def _assign(self, names: Sequence[str | None]) -> None:
        if self._adapters is not None:
            self._adapters.assign(names)

    def _assign_all(self, adapter: str | None, num_tokens: int) -> None:
        self._assign([adapter] * num_tokens)

    def _extend(
        self, rows: Sequence[DecodingRow], scores_RV: torch.Tensor, routed: Iterable[np.ndarray | None]
    ) -> None:
        """Sample the next token of each row and retire those that are finished."""
        ids_R, logp_R = self._sampled(rows, [len(row.ids) for row in rows], _shaped(rows, scores_RV))
        _note(rows, scores_RV, ids_R)
        for row, (token, logp), routed_LK in zip(list(rows), _tokens(ids_R, logp_R), routed, strict=True):
            if row.finish is None:
                row.take(token, logp)
                row.routed += [] if routed_LK is None else [routed_LK]
        self._retire()

    def _retire(self) -> None:
        for place in reversed(range(len(self._rows))):
            if self._is_over(self._rows[place]):
                self._ended += [self._rows[place]] if self._rows[place].finish is not None else []
                self._drop(place)

    def _sampled(
        self, rows: Sequence[DecodingRow], numbers: Sequence[int], scores_RV: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row the token of this number; rows that are sampled alike at once."""
        uniform_R = uploaded([row.uniform[number] for row, number in zip(rows, numbers, strict=True)], self._device)
        alike: dict[tuple[float, ...], list[int]] = {}
        for place, row in enumerate(rows):
            params = row.params
            alike.setdefault((params.temperature, params.top_p, params.top_k, params.min_p), []).append(place)
        if len(alike) == 1:
            return self._sample(scores_RV, uniform_R, rows[0].params)
        ids_R = torch.empty(len(rows), dtype=torch.long, device=self._device)
        logp_R = torch.empty(len(rows), device=self._device)
        for places in alike.values():
            at = uploaded(places, self._device)
            ids_R[at], logp_R[at] = self._sample(scores_RV[at], uniform_R[at], rows[places[0]].params)
        return ids_R, logp_R

    def _drop(self, place: int) -> None:
        """Rows stay dense: the last one takes its place."""
        if self._drafter is not None:
            self._drafter.leave(self._rows[place], is_whole=self._rows[place].finish is not None)
        self._running.drop_row(place)
        self._rows[place] = self._rows[-1]
        self._rows.pop()

    def _is_over(self, row: DecodingRow) -> bool:
        return row.finish is not None or (self._longest is not None and len(row.sequence) > self._longest)

    def _forget_prompts(self, prompts: Sequence[tuple[str | None, tuple[int, ...]]]) -> None:
        """A waiting row less for each: what none needs any more lives on only in the rows that use it."""
        self._needed.subtract(prompts)
        for prompt in dict.fromkeys(prompts):
            if not self._needed[prompt]:
                del self._needed[prompt]
                self._prompts.pop(prompt, None)


def _tokens(ids_N: torch.Tensor, logp_N: torch.Tensor) -> Iterator[tuple[int, float]]:
    """Both at once: on a GPU this is where the host waits, once a step. Doubles hold either exactly."""
    ids, logps = torch.stack([ids_N.double(), logp_N.double()]).tolist()
    return zip(map(int, ids), logps, strict=True)


def _take_verified(row: DecodingRow, draft: Sequence[int], sampled: Sequence[tuple[int, float]]) -> int:
    """How many of what was sampled behind a row and its draft the row takes: those behind what it would have sampled itself."""
    for number, (token, logp) in enumerate(sampled):
        row.take(token, logp)
        if row.finish is not None or number == len(draft) or token != draft[number]:
            return number + 1
    raise AssertionError("one more is sampled than was drafted")


def _shaped(rows: Sequence[DecodingRow], scores_RV: torch.Tensor) -> torch.Tensor:
    """The logits after each row's shaper; a row that it leaves no token is aborted."""
    if all(row.shaper is None for row in rows):
        return scores_RV
    shaped_RV = scores_RV.float().clone()
    for place, row in enumerate(rows):
        if row.shaper is not None:
            shaped_V = row.shaper(row.ids, shaped_RV[place])
            if shaped_V.max() == -torch.inf:
                row.finish = "aborted"
            else:
                shaped_RV[place] = shaped_V
    return shaped_RV


def _note(rows: Sequence[DecodingRow], scores_RV: torch.Tensor, ids_R: torch.Tensor) -> None:
    """Write down the likeliest tokens where a row asks for them."""
    places = [place for place, row in enumerate(rows) if row.num_top is not None]
    if not places:
        return
    at = uploaded(places, scores_RV.device)
    logp_RV = torch.log_softmax(scores_RV[at].float(), -1)
    own_R = logp_RV.gather(-1, ids_R[at].unsqueeze(-1)).squeeze(-1)
    most = max(rows[place].num_top or 0 for place in places)
    top_logp, top_ids = logp_RV.topk(most, -1)
    for number, place in enumerate(places):
        pairs = zip(top_ids[number].tolist(), top_logp[number].tolist(), strict=True)
        rows[place].likeliest.append(Likeliest(float(own_R[number]), tuple(pairs)[: rows[place].num_top]))
