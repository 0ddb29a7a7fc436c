"""The nouns that travel between packages: frozen, plain Python and numpy, no torch.

Dimension letters: B rows, T positions, N packed tokens, V vocabulary, G group, P prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np

Message = Mapping[str, Any]
"""An OpenAI message: `role`, `content` and, where used, `tool_calls`, `tool_call_id`, `name`."""
Text = str | tuple[Message, ...]
"""A text prompt or completion, or a conversation."""
Decode = Callable[[Sequence[int]], str]
"""Token ids as text."""


# --- data ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row came from. `str()` gives `train.jsonl:41`."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Example:
    """A supervised row: a conversation (`messages`), or a text `prompt` with its `completion`."""

    origin: Origin
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class PreferencePair:
    origin: Origin
    prompt: Text
    chosen: Text
    rejected: Text
    tools: tuple[Mapping[str, Any], ...] = ()
    margin: float = 0.0
    """By how much the chosen answer's reward is to be the greater; read by reward models, and with `margin_coef`."""
    weight: float = 1.0
    """How much the pair counts where `row_weights` are asked for."""


@dataclass(frozen=True, slots=True)
class LabelledCompletion:
    """A KTO row: a completion that is desirable (`label=True`) or not."""

    origin: Origin
    prompt: Text
    completion: Text
    label: bool
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class SteppedCompletion:
    """An answer in steps, and how right each of them is: 1 is right, 0 wrong, a share in between a soft label."""

    origin: Origin
    prompt: Text
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """An RL row; `columns` are all its other columns, handed to the reward functions by name."""

    origin: Origin
    prompt: Text
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tools: tuple[Mapping[str, Any], ...] = ()


PromptRow = tuple[Prompt, tuple[int, ...]]
"""A prompt and its token ids."""


@dataclass(frozen=True, slots=True)
class TokenSeq:
    """A rendered sequence. `loss_mask[t]` says whether token t is trained, given the tokens before it."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    origin: Origin | None = None

    @property
    def num_loss_tokens(self) -> int:
        """Trained tokens; the first token of a sequence has no context and is never trained."""
        return sum(self.loss_mask[1:])


@dataclass(frozen=True, slots=True)
class Counts:
    """What a batch is normalised by."""

    tokens: int
    sequences: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tokens + other.tokens, self.sequences + other.sequences)


# --- metrics -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ratio:
    """A mean that adds: micro-batches and ranks combine exactly."""

    num: float
    den: float

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.num + other.num, self.den + other.den)

    @property
    def value(self) -> float:
        return self.num / self.den if self.den else math.nan


@dataclass(frozen=True, slots=True)
class StepReport:
    """The metrics of one optimizer step, under TRL's names."""

    step: int
    metrics: Mapping[str, float]


class Severity(StrEnum):
    INFO = "info"
    SOFT = "soft"
    HARD = "hard"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a health rule saw at a step, and what is to be done about it."""

    rule: str
    severity: Severity
    step: int
    evidence: Mapping[str, float]
    action: str
    message: str
    since: int = 0
    """First step of the evidence; what was saved before it is healthy."""


# --- rollouts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; names and meanings are those of vLLM. `temperature=0` is greedy, `top_k=0` off.

    A completion ends with the token that completes one of the strings `stop`, special tokens being text like any other.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample. `seed` alone decides its randomness, whatever it is batched with."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int | None = None
    """Most tokens of this one, where that is less than those of `SamplingParams`."""

    def most(self, params: SamplingParams) -> int:
        """Most tokens that it may take."""
        return params.max_tokens if self.max_tokens is None else min(self.max_tokens, params.max_tokens)


Finish = Literal["stop", "length", "aborted"]


@dataclass(frozen=True, slots=True)
class Episode:
    """What took place behind a prompt: turns of the policy, and what tools and environment wrote between them.

    `sampled` says of each id of the completion whether the policy sampled it. `messages` are what a reward is given.
    `error`: why the environment could not go on; such an episode is unscored. `turn_tokens`: how many ids each turn sampled;
    `turn_rewards`: what the environment paid for it, None where it said nothing; `env_metrics`: what it measured besides.
    """

    sampled: tuple[bool, ...]
    messages: tuple[Message, ...]
    turns: int
    calls: int = 0
    failed_calls: int = 0
    env_reward: float | None = None
    env_s: float = 0.0
    error: str | None = None
    turn_tokens: tuple[int, ...] = ()
    turn_rewards: tuple[float | None, ...] = ()
    env_metrics: Mapping[str, float] = field(default_factory=dict[str, float])

    @property
    def answer(self) -> str:
        """What the policy said last."""
        spoken = [str(message["content"]) for message in self.messages if message["role"] == "assistant"]
        return spoken[-1] if spoken else ""


@dataclass(frozen=True, slots=True)
class Completion:
    """Sampled ids (the end-of-sequence token included), with the sampler's log-prob of each.

    What `logp` is the log-prob of, `EngineInfo.logprobs` says. `policy_versions` is empty where every token is of
    `policy_version`; where weights came in the middle it has one version per token, and `policy_version` is the first.
    """

    ids: tuple[int, ...]
    logp: tuple[float, ...]
    finish: Finish
    policy_version: int
    request: int = 0
    """Place of its request among those that were asked together."""
    policy_versions: tuple[int, ...] = ()
    episode: Episode | None = None
    """Of several turns: then `ids` hold what the environment wrote too, with a log-prob of 0."""
    routed_experts: np.ndarray | None = field(default=None, compare=False)
    """Of each id the experts of the pass that it was drawn from, 0 where it was not sampled; None where nobody asked. Shape: [ids, layers, experts a token]."""
    inserted: tuple[int, ...] = ()
    """From where to where `ids` were put in, with a log-prob of 0, to end a thought that was too long; empty where none were."""

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy sampled."""
        return len(self.ids) if self.sampled is None else sum(self.sampled)

    @property
    def sampled(self) -> tuple[bool, ...] | None:
        """Of each id whether the policy sampled it; None where it sampled all."""
        if self.episode is not None:
            return self.episode.sampled
        if not self.inserted:
            return None
        start, end = self.inserted
        return tuple(not start <= place < end for place in range(len(self.ids)))


def in_order(completions: Iterable[Completion]) -> list[Completion]:
    """Completions in the order of their requests."""
    return sorted(completions, key=lambda completion: completion.request)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself.

    `logprobs`: `uncut` log-probs are those of the temperature-scaled distribution before top-p, top-k and min-p cut it,
    which is what a trainer computes; `processed` ones are those after the cut, which is what the token was drawn from.
    `exact_logprobs`: whether they are the trainer's to the last bit.
    `sleeps`: whether it lets go of memory while it rests, on the cards that train.
    `exact_resume`: whether a run that is stopped and started samples what it would have sampled.
    """

    name: str
    version: str
    dtype: Literal["float32", "bfloat16", "float16"]
    logprobs: Literal["uncut", "processed"]
    seed_bits: int
    exact_resume: bool
    exact_logprobs: bool = False
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class Moved:
    """What bringing weights to an engine took. `whole_bytes`: had they been sent whole, not only what changed."""

    num_bytes: int
    whole_bytes: int

    @property
    def share(self) -> float:
        return self.num_bytes / self.whole_bytes if self.whole_bytes else 0.0


STREAMS: Mapping[str, type[np.generic] | None] = {
    "behavior_logp": np.float32,
    "advantage": np.float32,
    "old_logp": np.float32,
    "ref_logp": np.float32,
    "teacher_logp": np.float32,
    "value": np.float32,
    "returns": np.float32,
    "penalty": np.float32,
    "policy_version": np.int32,
    "routed_experts": None,
}
"""What a `Sample` can say of each trained token, and how it is kept; None is as it came."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A sequence with what the losses read of each of its trained tokens: one completion, or several turns.

    ids: int32; loss_mask: bool, as long as ids. A stream has one value per trained token, in order; None where nobody
    asked for it. `behavior_logp` is what sampled the token, `old_logp` the trainer's at the same weights (None: the
    sampler's are the trainer's own), `policy_version` the weights it was sampled from. Log-probs in nats. `value` is what a critic
    said before the token was sampled, `returns` what it was to have said; `penalty` weighs |log π − log π_old|. `routed_experts` are the
    experts that the sampler sent the token before it to, [tokens, layers, experts a token]. `prompt_tokens` is no stream: the trained tokens of all completions of its prompt in the step, 0 where nobody counted.

    Example: a prompt (5, 6) answered by (7, 8, 9) at version 4, with a reward above the group's: ids 5 6 7 8 9,
    loss_mask F F T T T, behavior_logp −0.1 −2.0 −0.7, advantage 0.5 0.5 0.5, policy_version 4 4 4.
    """

    ids: np.ndarray
    loss_mask: np.ndarray
    behavior_logp: np.ndarray | None = None
    advantage: np.ndarray | None = None
    old_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None
    teacher_logp: np.ndarray | None = None
    value: np.ndarray | None = None
    returns: np.ndarray | None = None
    penalty: np.ndarray | None = None
    policy_version: np.ndarray | None = None
    routed_experts: np.ndarray | None = None
    prompt_tokens: int = 0

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.loss_mask), (len(self.ids), len(self.loss_mask))
        assert not self.loss_mask[0], "the first token of a sequence has no context and is never trained"
        for name in STREAMS:
            stream = getattr(self, name)
            assert stream is None or len(stream) == self.num_loss_tokens, (name, len(stream), self.num_loss_tokens)

    @property
    def num_loss_tokens(self) -> int:
        """Trained tokens."""
        return int(self.loss_mask.sum())

    def untrained(self) -> Sample:
        """The same ids with nothing to learn from; it still counts as a sequence."""
        empty = {name: None if getattr(self, name) is None else getattr(self, name)[:0] for name in STREAMS}
        return replace(self, loss_mask=np.zeros_like(self.loss_mask), **empty)

    def constant(self, value: float) -> np.ndarray:
        """A stream with one value at every trained token; takes the memory of one."""
        return np.broadcast_to(np.float32(value), (self.num_loss_tokens,))


StepScores = Sequence[tuple[int, float]]
"""Of each step of an answer where it ends, in characters, and how right it is."""


@dataclass(frozen=True, slots=True)
class RewardBreakdown:
    """Reward per function; `None` is unscored. `total` is the weighted sum of what was scored, `None` if nothing was. `steps` are
    those of the process reward models among the rewards."""

    total: float | None
    parts: Mapping[str, float | None]
    error: str | None = None
    counts: Mapping[str, float] = field(default_factory=dict[str, float])
    steps: Mapping[str, StepScores] = field(default_factory=dict[str, StepScores])


@dataclass(frozen=True, slots=True)
class Rollout:
    completion: Completion
    text: str
    reward: RewardBreakdown

    @property
    def status(self) -> Literal["scored", "unscored"]:
        return "unscored" if self.reward.total is None else "scored"


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The completions of one prompt."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]


# --- checkpoints ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CheckpointRef:
    step: int
    digest: str
    path: Path
