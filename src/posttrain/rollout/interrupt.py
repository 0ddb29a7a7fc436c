"""Thoughts that are cut short: at a budget of tokens a phrase is put in that ends them, and the answer is sampled behind it.

Source: ScaleRL, arXiv 2510.13786 (forced length interruptions). What is put in was not sampled, and is trained on by nobody.
Asks any engine twice: up to the budget, and on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from posttrain.protocols import Engine, Weights
from posttrain.rollout.routed import experts_along
from posttrain.rollout.sampling import request_seed
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Interruption:
    """After `budget` tokens, or up to `spread` fewer as a request's seed says, `phrase` goes in where `has_ended` says no of the ids so far."""

    budget: int
    spread: int
    phrase: tuple[int, ...]
    has_ended: Callable[[Sequence[int]], bool]

    def at(self, request: Request) -> int:
        """After how many tokens this one is looked at."""
        return self.budget - request_seed("interrupt", request.seed) % (self.spread + 1)


@dataclass(frozen=True, slots=True)
class InterruptedEngine:
    """`engine`, whose completions are interrupted and say in `inserted` where the phrase stands in them."""

    engine: Engine
    interruption: Interruption

    @property
    def policy_version(self) -> int:
        return self.engine.policy_version

    def describe(self) -> EngineInfo:
        return self.engine.describe()

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        return self.engine.score(sequences, temperature)

    def update(self, weights: Weights, version: int) -> Moved:
        return self.engine.update(weights, version)

    def rest(self) -> None:
        self.engine.rest()

    def close(self) -> None:
        self.engine.close()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """As `Engine.generate`."""
        first = [replace(one, max_tokens=min(self.interruption.at(one), one.most(params))) for one in requests]
        cut: list[tuple[Completion, tuple[int, ...]]] = []
        for completion in self.engine.generate(first, params):
            left = requests[completion.request].most(params) - len(completion.ids)
            if completion.finish != "length" or left <= 0:
                yield completion
            else:
                phrase = () if self.interruption.has_ended(completion.ids) else self.interruption.phrase
                cut.append((completion, phrase[:left]))
        yield from self._gone_on(requests, params, cut)

    def _gone_on(
        self, requests: Sequence[Request], params: SamplingParams, cut: Sequence[tuple[Completion, tuple[int, ...]]]
    ) -> Iterator[Completion]:
        """Each completion with what comes behind its phrase; one that has no room for more ends there."""
        further: list[Request] = []
        beginnings: list[tuple[Completion, tuple[int, ...]]] = []
        for begun, phrase in cut:
            request = requests[begun.request]
            left = request.most(params) - len(begun.ids) - len(phrase)
            if left <= 0:
                yield _joined(begun, phrase, None)
                continue
            ids = (*request.prompt_ids, *begun.ids, *phrase)
            further.append(Request(ids, request_seed("behind", request.seed), left))
            beginnings.append((begun, phrase))
        # Also where nothing is left to ask: an engine that ranks share is called by all of them together.
        for end in self.engine.generate(further, params):
            yield _joined(*beginnings[end.request], end)


def _joined(begun: Completion, phrase: tuple[int, ...], end: Completion | None) -> Completion:
    parts = [begun] if end is None else [begun, end]
    versions = [v for part in parts for v in part.policy_versions or (part.policy_version,) * len(part.ids)]
    at = len(begun.ids)
    versions[at:at] = versions[at - 1 : at] * len(phrase)
    return replace(
        begun, ids=(*begun.ids, *phrase, *(() if end is None else end.ids)),
        logp=(*begun.logp, *(0.0,) * len(phrase), *(() if end is None else end.logp)),
        finish="length" if end is None else end.finish, policy_versions=tuple(versions) if len(set(versions)) > 1 else (), inserted=(at, at + len(phrase)) if phrase else (),
        routed_experts=experts_along([(begun, len(phrase)), *([] if end is None else [(end, 0)])]),
    )  # fmt: skip
