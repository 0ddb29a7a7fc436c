"""One engine for all ranks: the main rank holds it and asks it for everybody, each rank is given its own answers.

All ranks call each method together. While the main rank is at work the others wait for what it needs of them: their shares of
the weights, their part in a score by the trained policy. So an engine that is lost in the middle gets its weights again, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from posttrain.models.policy import Policy
from posttrain.protocols import Engine, Ranks, Weights
from posttrain.rollout.embedded import score_sequences
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams, in_order

T = TypeVar("T")
Scored = tuple[Sequence[int], int]


@dataclass(frozen=True, slots=True)
class _Ended(Generic[T]):
    """The main rank is done, with what it has for everybody."""

    value: T


@dataclass(frozen=True, slots=True)
class _WeightsOf:
    only: Literal["adapter", "trained", "all"]


@dataclass(frozen=True, slots=True)
class _ScoresOf:
    sequences: Sequence[Scored]


class CalledWeights:
    """A policy on the main rank, while the others wait in `MainRankEngine`: who reads its weights, or scores by it, calls them."""

    def __init__(self, policy: Policy, ranks: Ranks) -> None:
        self._policy, self._ranks = policy, ranks
        self._under_way: Iterator[tuple[str, Any]] = iter(())

    @property
    def has_adapter(self) -> bool:
        return self._policy.has_adapter

    def adapter_config(self) -> dict[str, Any]:
        return self._policy.adapter_config()

    def weights(self, only: Literal["adapter", "trained", "all"]) -> Iterator[tuple[str, Any]]:
        self.say(_WeightsOf(only))
        self._under_way = iter(self._policy.weights(only))
        return self._under_way

    def scores(self, sequences: Sequence[Scored]) -> list[list[float]]:
        """As `score_sequences`."""
        self.say(_ScoresOf(sequences))
        return score_sequences(self._policy, sequences)

    def say(self, what: object) -> None:
        """To the ranks that wait."""
        self._take_the_rest()
        self._ranks.main_only(lambda: what)

    def fail(self, error: BaseException) -> None:
        """Raises: `error`, on every rank."""
        self._take_the_rest()
        self._ranks.main_only(lambda: _raised(error))

    def _take_the_rest(self) -> None:
        """An engine that is lost in the middle of a push leaves the others in gathers of the tensors that it did not take."""
        for _ in self._under_way:
            pass


class MainRankEngine:
    """What `start` makes on the main rank, for all `ranks` that train `policy` together.

    What several ranks ask alike is asked once: the seed of a request decides its tokens.
    """

    def __init__(self, start: Callable[[], Engine], policy: Policy, ranks: Ranks) -> None:
        self._policy, self._ranks = policy, ranks
        self._called = CalledWeights(policy, ranks)
        self._engine: Engine | None = None
        self._version = 0
        self._info = ranks.main_only(lambda: self._started(start))

    def _started(self, start: Callable[[], Engine]) -> EngineInfo:
        self._engine = start()
        return self._engine.describe()

    @property
    def policy_version(self) -> int:
        return self._version

    def describe(self) -> EngineInfo:
        return self._info

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """All at once, when the last one has ended."""
        asked = list(dict.fromkeys(request for rank in self._ranks.gather(list(requests)) for request in rank))
        found = self._together(lambda engine: in_order(engine.generate(asked, params)) if asked else [])
        place = {request: number for number, request in enumerate(asked)}
        return iter([replace(found[place[request]], request=number) for number, request in enumerate(requests)])

    def score(self, sequences: Sequence[Scored], temperature: float = 1.0) -> list[list[float]]:
        mine = [(tuple(ids), start) for ids, start in sequences]
        asked = list(dict.fromkeys(one for rank in self._ranks.gather(mine) for one in rank))
        scored = self._together(lambda engine: engine.score(asked, temperature) if asked else [])
        found = dict(zip(asked, scored, strict=True))
        return [found[one] for one in mine]

    def update(self, weights: Weights, version: int) -> Moved:
        """Those of the policy that this was made for, whose shares all ranks hold."""
        assert weights is self._policy
        moved = self._together(lambda engine: engine.update(self._called, version))
        self._version = version
        return moved

    def rest(self) -> None:
        self._together(lambda engine: engine.rest())

    def close(self) -> None:
        """Each rank for itself: it may be the only one that ends."""
        if self._engine is not None:
            self._engine.close()

    def _together(self, work: Callable[[Engine], T]) -> T:
        """What `work` on the engine gives on the main rank, or raises there, on every rank."""
        if self._engine is None:
            return self._follow()
        try:
            value = work(self._engine)
        except BaseException as error:
            self._called.fail(error)
            raise
        self._called.say(_Ended(value))
        return value

    def _follow(self) -> Any:
        while True:
            wanted = self._ranks.main_only(_elsewhere)
            if isinstance(wanted, _Ended):
                return wanted.value  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
            if isinstance(wanted, _WeightsOf):
                for _ in self._policy.weights(wanted.only):
                    pass
            else:
                assert isinstance(wanted, _ScoresOf)
                score_sequences(self._policy, wanted.sequences)


def _elsewhere() -> object:
    raise AssertionError("the main rank says what it needs")


def _raised(error: BaseException) -> None:
    raise error
