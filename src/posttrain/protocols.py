"""What the recipes ask of the parts they are given; each part is free to be anything that answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from posttrain.types import Completion, EngineInfo, Moved, Request, Sample, SamplingParams

T = TypeVar("T")


class Weights(Protocol):
    """A trained policy as an engine asks for it: named tensors, one at a time. All ranks iterate together."""

    @property
    def has_adapter(self) -> bool: ...

    def weights(self, only: Literal["adapter", "trained", "all"]) -> Iterator[tuple[str, Any]]:
        """Under the names of the given base's file; `adapter` under those of an adapter's file, as PEFT writes it."""
        ...

    def adapter_config(self) -> dict[str, Any]:
        """`adapter_config.json`, as PEFT writes it."""
        ...


@runtime_checkable
class Engine(Protocol):
    """Samples completions. Speaks token ids; the strings that end a completion are all it knows of text.

    Tokenizer, policy and reference are nothing an engine has: who needs them is given them.
    """

    @property
    def policy_version(self) -> int:
        """The version of the weights that the next token will be sampled from."""
        ...

    def describe(self) -> EngineInfo: ...

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """One completion per request, in the order in which they end. Raises: EngineError, for an empty prompt before any work."""
        ...

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        """Log-probs of `ids[start:]` for each `(ids, start)`, under the weights of `policy_version`."""
        ...

    def update(self, weights: Weights, version: int) -> Moved:
        """Take these weights as `version`. All ranks call it."""
        ...

    def rest(self) -> None:
        """Nothing is sampled until the next call: let go of memory that others can use meanwhile."""
        ...

    def close(self) -> None:
        """Let go of what it holds; no other call follows."""
        ...


class Scorer(Protocol):
    """Says how likely samples are under some model: the trainer, a reference, a teacher."""

    def logp(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        """Log-probs (nats, float32) of the trained tokens of each sample, in order; samples of a group share their beginning."""
        ...


class Reward(Protocol):
    """A reward function in TRL's signature; `None` means it could not score that completion."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]: ...


class MetricSink(Protocol):
    """Where a run's numbers go. Never raises into the training loop, never blocks it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Ranks(Protocol):
    """The processes of a run, one or many: who this one is, and Python values between them. Loops do no arithmetic with it."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's share of `items`: every world_size-th one, so that shares differ by at most one item."""
        ...

    def among(self, items: Sequence[T], work: Callable[[Sequence[T]], list[Any]]) -> list[Any]:
        """What `work` makes of each item of this rank's share, done between the processes that have the same share; the same to the bit on each."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        ...

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, in rank order."""
        ...

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`."""
        ...

    def barrier(self) -> None: ...

    def main_only(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it; what it raises there is raised on every rank.

        The others wait without a collective, so that it may take longer than one waits.
        """
        ...

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in rank order, on rank 0; an empty list elsewhere. What it raises on one is raised on all.

        All wait for the last one, without a collective: their parts may take longer than one waits.
        """
        ...


class Share(NamedTuple):
    """Rows of a tensor that one rank holds, the number of the first, and the shape of the whole; of some columns, from `column` on."""

    rows: Any
    start: int
    shape: tuple[int, ...]
    column: int = 0


class RowSplit(Protocol):
    """A micro-batch among the ranks that go through it together: each scores a part of its rows."""

    def part(self, batch: Any) -> tuple[Any, Any]:
        """What this rank runs of the batch, and the places of the scored tokens that it predicts."""
        ...

    def whole(self, part: Any, places: Any, length: int) -> Any:
        """Rows that the ranks have at these places, of all ranks. Shape: [n, ...] → [length, ...]."""
        ...


class TokenSplit(RowSplit, Protocol):
    """A micro-batch's tokens dealt to ranks that hold a part each, and in attention a part of the heads."""

    @property
    def span(self) -> tuple[int, int]:
        """The packed positions that this rank holds."""
        ...

    @property
    def num_tokens(self) -> int:
        """Of the whole micro-batch."""
        ...

    @property
    def num_held(self) -> int:
        """More than those where there are fewer than ranks, none of which may be without one."""
        ...

    def to_heads(self, *heads: Any) -> tuple[Any, ...]:
        """Of this rank's tokens all heads → of all tokens this rank's heads. Shapes: each [1, H, n, D] → [1, h, N, D]."""
        ...

    def to_tokens(self, out: Any) -> Any:
        """The way back. Shapes: [1, N, h, D] → [1, n, H, D]."""
        ...


class SequenceRanks(Protocol):
    """Ranks that go through the same micro-batches together."""

    @property
    def size(self) -> int: ...

    def split(self, num_tokens: int) -> TokenSplit: ...


class TensorRanks(Protocol):
    """Ranks that go through the same tokens together, and hold each layer between them."""

    @property
    def size(self) -> int: ...

    def split(self, num_scored: int) -> RowSplit: ...


class Sharding(Protocol):
    """Where the parameters of a model lie: whole in one process, or in shares over the ranks. All ranks call it together."""

    @property
    def num_shards(self) -> int: ...

    @property
    def is_sharded(self) -> bool: ...

    @property
    def has_first_copy(self) -> bool:
        """Whether this rank's shares are of the first copy of the model: what is counted or written of all copies once."""
        ...

    @property
    def sequence(self) -> SequenceRanks | None:
        """Those with whom this rank shares the tokens of its micro-batches; None where it has all of them."""
        ...

    @property
    def tensor(self) -> TensorRanks | None:
        """Those with whom this rank shares the matrices of its layers; None where it computes with whole ones."""
        ...

    def square_sum(self, tensor: Any) -> float:
        """This rank's part of the sum of squares: over all ranks each element counts once."""
        ...

    def together(self, parameters: Sequence[Any]) -> list[list[Any]]:
        """Parameters apart, where one kernel cannot update all of them."""
        ...

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers: of calls of the model, say, which they must make equally often."""
        ...

    def cut(self, model: Any) -> Any:
        """A model without data, with a share of each parameter in its place, for whoever reads the file to fill."""
        ...

    def shard(self, model: Any) -> Any:
        """The model with its parameters dealt to the ranks, those that are no shares yet; gradients of the ranks then add up."""
        ...

    def release(self, model: Any) -> None:
        """Let go of what a pass through the model gathered and kept, also one that failed."""
        ...

    def accumulate(self, model: Any, *, is_last: bool) -> None:
        """Say before a backward whether it is the step's last; then, at the latest, gradients are added up over the ranks."""
        ...

    def clip_grad_norm(self, parameters: Sequence[Any], max_norm: float) -> float:
        """Clip in place by the global norm and return that norm."""
        ...

    def local(self, tensor: Any) -> Any:
        """This rank's part of a sharded tensor."""
        ...

    def whole(self, tensor: Any) -> Any:
        """A sharded tensor, gathered; on CPU, detached."""
        ...

    def gathered(self, module: Any) -> AbstractContextManager[None]:
        """Inside, the parameters of a module that was cut are whole; after it each rank keeps its rows of what they have become."""
        ...

    def fill(self, parameter: Any, whole: Any) -> None:
        """Give a parameter the values of a whole tensor, of which this rank keeps its rows."""
        ...

    def share_of(self, tensor: Any) -> Share:
        """What this rank holds of a tensor."""
        ...

    def optimizer_state(self, model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
        """The optimizer's state as it stands, keyed by parameter name."""
        ...

    def load_optimizer_state(self, model: Any, optimizer: Any, state: dict[str, dict[str, Any]]) -> None:
        """Set it from this rank's shares."""
        ...

    def load_state(self, model: Any, state: dict[str, Any], optional: Collection[str] = ()) -> None:
        """Fill `model` from this rank's shares; of its names only the `optional` ones may be missing there.

        Raises: ModelError naming what is missing, and what the model does not have.
        """
        ...
