"""From scored completions of prompts to rows to train on, and why each other completion is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.config.synth import KeepRule
from posttrain.types import Prompt, Text


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored completion: the how manieth of its prompt, what it says, how it ended."""

    sample: int
    text: str
    finish: Literal["stop", "length", "aborted"]
    num_tokens: int
    reward: float | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Attempts:
    """A prompt with its completions. `id` is a digest of the prompt and its columns."""

    id: str
    prompt: Prompt
    candidates: tuple[Candidate, ...]

    def num_right(self, correct_from: float) -> tuple[int, int]:
        """How many were scored, and how many of these are correct."""
        rewards = [one.reward for one in self.candidates if one.reward is not None]
        return len(rewards), sum(reward >= correct_from for reward in rewards)


@dataclass(frozen=True, slots=True)
class KeepSpec:
    """What is kept; under the names of the keys."""

    keep: KeepRule
    correct_from: float = 1.0
    min_reward: float | None = None
    min_margin: float = 0.0
    max_per_prompt: int | None = None
    keep_truncated: bool = False
    distinct: bool = True
    """Of completions of one prompt that say the same only the first is used."""


@dataclass(frozen=True, slots=True)
class Picked:
    """A row to be, of one prompt: the completions in it, the chosen one first; none where it is the prompt alone."""

    of: Attempts
    parts: tuple[Candidate, ...] = ()

    @property
    def row(self) -> dict[str, Any]:
        """In the form that `posttrain sft`, `dpo` and `grpo` read."""
        asked, tools = self.of.prompt.prompt, list(self.of.prompt.tools)
        shown: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        answers = [_said(asked, one.text) for one in self.parts]
        if not answers:
            return {"prompt": _plain(asked), **self.of.prompt.columns, **shown}
        if len(answers) == 2:
            return {"prompt": _plain(asked), "chosen": answers[0], "rejected": answers[1], **shown}
        if isinstance(asked, str):
            return {"prompt": asked, "completion": answers[0], **shown}
        return {"messages": [*_plain(asked), *answers[0]], **shown}


Left = tuple[Attempts, Candidate | None, str]
"""A completion that is in no row, or a prompt of which none is, and why."""


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [dict(message) for message in text]


def _said(prompt: Text, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def pick(attempts: Attempts, spec: KeepSpec) -> tuple[list[Picked], list[Left]]:
    """The rows of one prompt. Each of its completions is in a row or left."""
    if spec.keep == "prompts":
        return [Picked(attempts)], []
    usable, left = list[Candidate](), list[Left]()
    said = set[str]()
    for one in attempts.candidates:
        if reason := _unusable(one, spec) or ("duplicate: of an earlier sample" if one.text in said else None):
            left.append((attempts, one, reason))
        else:
            usable.append(one)
            said |= {one.text} if spec.distinct else set()
    # Of equal rewards the shorter one, then the earlier.
    usable.sort(key=lambda one: (-_reward(one), one.num_tokens, one.sample))
    chosen = list(KEEP_RULES[spec.keep](usable, spec))[: spec.max_per_prompt]
    used = {one.sample for parts in chosen for one in parts}
    left += [(attempts, one, _why_not(one, spec)) for one in usable if one.sample not in used]
    return [Picked(attempts, parts) for parts in chosen], left


def _unusable(one: Candidate, spec: KeepSpec) -> str | None:
    if one.reward is None:
        return f"unscored: {one.error or 'no reward said anything'}"
    if one.finish != "stop" and not spec.keep_truncated:
        return "cut at max_completion_length" if one.finish == "length" else "ended early by its engine"
    return None if one.text.strip() else "empty"


def _why_not(one: Candidate, spec: KeepSpec) -> str:
    if spec.keep == "all_correct" and _reward(one) < spec.correct_from:
        return f"not correct: reward {_reward(one):g}"
    if spec.keep == "top1":
        low = spec.min_reward is not None and _reward(one) < spec.min_reward
        return f"below min_reward: reward {_reward(one):g}" if low else "another one is the best"
    return "in no pair" if spec.keep == "pairs" else "more than max_per_prompt"


def _reward(one: Candidate) -> float:
    assert one.reward is not None, "what is unscored was left before"
    return one.reward


def _top1(best_first: Sequence[Candidate], spec: KeepSpec) -> Iterator[tuple[Candidate, ...]]:
    """Best-of-N."""
    for best in best_first[:1]:
        if spec.min_reward is None or _reward(best) >= spec.min_reward:
            yield (best,)


def _all_correct(best_first: Sequence[Candidate], spec: KeepSpec) -> Iterator[tuple[Candidate, ...]]:
    """Rejection sampling (RFT, arXiv 2308.01825)."""
    return ((one,) for one in best_first if _reward(one) >= spec.correct_from)


def _pairs(best_first: Sequence[Candidate], spec: KeepSpec) -> Iterator[tuple[Candidate, ...]]:
    """The best with the worst, the next with the next; never two of one reward."""
    for better, worse in zip(best_first, reversed(best_first), strict=True):
        gap = _reward(better) - _reward(worse)
        if gap <= spec.min_margin or (spec.min_reward is not None and _reward(better) < spec.min_reward):
            return
        yield better, worse


KEEP_RULES: Mapping[str, Callable[[Sequence[Candidate], KeepSpec], Iterator[tuple[Candidate, ...]]]] = {
    "top1": _top1,
    "all_correct": _all_correct,
    "pairs": _pairs,
}
"""`keep` → rows of one prompt, of its usable completions, the best first."""
