"""From prompts to scored groups of completions. Knows no advantages and no loss."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol

from posttrain.rollout.sampling import request_seed
from posttrain.types import (
    Completion,
    Prompt,
    PromptRow,
    Request,
    RewardBreakdown,
    Rollout,
    RolloutGroup,
    SamplingParams,
    Text,
    in_order,
)


class ScoreRewards(Protocol):
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[RewardBreakdown]: ...


class Generates(Protocol):
    """An engine, as far as it samples."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]: ...


class SampleGroups(Protocol):
    """Makes `num_generations` completions of each prompt: one turn each, or whole episodes."""

    def __call__(
        self,
        rows: Sequence[PromptRow],
        num_generations: int,
        params: SamplingParams,
        seed_parts: Sequence[int],
        numbers: Sequence[int],
    ) -> list[list[Completion]]: ...


def sample_groups(
    engine: Generates, rows: Sequence[PromptRow], num_generations: int, params: SamplingParams,
    seed_parts: Sequence[int], numbers: Sequence[int],
) -> list[list[Completion]]:  # fmt: skip
    """`num_generations` completions of each prompt; `numbers` are the prompts' places in the run, which seed them."""
    requests = _requests(rows, num_generations, seed_parts, numbers)
    completions = in_order(engine.generate(requests, params))
    return [completions[i : i + num_generations] for i in range(0, len(completions), num_generations)]


def groups_as_they_end(
    engine: Generates, rows: Sequence[PromptRow], num_generations: int, params: SamplingParams,
    seed_parts: Sequence[int], numbers: Sequence[int],
) -> Generator[tuple[int, list[Completion]]]:  # fmt: skip
    """Each group of `sample_groups` with the place of its prompt, when its last completion is there."""
    requests = _requests(rows, num_generations, seed_parts, numbers)
    under_way: list[list[Completion]] = [[] for _ in rows]
    for completion in engine.generate(requests, params):
        place = completion.request // num_generations
        under_way[place].append(completion)
        if len(under_way[place]) == num_generations:
            yield place, in_order(under_way[place])


def _requests(
    rows: Sequence[PromptRow], num_generations: int, seed_parts: Sequence[int], numbers: Sequence[int]
) -> list[Request]:
    return [
        Request(ids, request_seed(*seed_parts, number, sample))
        for (_, ids), number in zip(rows, numbers, strict=True)
        for sample in range(num_generations)
    ]


def score_groups(
    rows: Sequence[PromptRow],
    groups: Sequence[Sequence[Completion]],
    decode: Callable[[Sequence[int]], str],
    score: ScoreRewards,
) -> list[RolloutGroup]:
    """Hand every completion to the rewards in one call, as TRL does: strings for text prompts, messages for chats."""
    flat = [
        (prompt, completion, _said(prompt.prompt, completion, decode))
        for (prompt, _), group in zip(rows, groups, strict=True)
        for completion in group
    ]
    breakdowns = _scored([one for one in flat if _lost(one[1]) is None], score)
    nothing = dict.fromkeys(breakdowns[0].parts if breakdowns else ())
    given = iter(breakdowns)
    scored = iter([
        Rollout(completion, text, next(given) if (lost := _lost(completion)) is None else RewardBreakdown(None, nothing, lost))
        for _, completion, (text, _) in flat
    ])  # fmt: skip
    return [
        RolloutGroup(prompt, ids, tuple(next(scored) for _ in group))
        for (prompt, ids), group in zip(rows, groups, strict=True)
    ]


def _lost(completion: Completion) -> str | None:
    """Why there is nothing to score, where an environment lost the episode."""
    return None if completion.episode is None else completion.episode.error


def _said(prompt: Text, completion: Completion, decode: Callable[[Sequence[int]], str]) -> tuple[str, Any]:
    """The text of what was said last, and what rewards are given: a string for a text prompt, messages for a chat."""
    if isinstance(prompt, str):
        text = decode(completion.ids)
        return text, text
    if completion.episode is None:
        text = decode(completion.ids)
        return text, [{"role": "assistant", "content": text}]
    return completion.episode.answer, [dict(message) for message in completion.episode.messages]


def _scored(flat: Sequence[tuple[Prompt, Completion, tuple[str, Any]]], score: ScoreRewards) -> list[RewardBreakdown]:
    if not flat:
        return []
    names = sorted({name for prompt, _, _ in flat for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt, _, _ in flat] for name in names}
    columns["completion_ids"] = [list(completion.ids) for _, completion, _ in flat]
    if any(completion.episode is not None for _, completion, _ in flat):
        columns["env_reward"] = [completion.episode and completion.episode.env_reward for _, completion, _ in flat]
        columns["env_metrics"] = [completion.episode and completion.episode.env_metrics for _, completion, _ in flat]
    prompts = [as_reward_input(prompt.prompt) for prompt, _, _ in flat]
    return score(prompts, [said for _, _, (_, said) in flat], columns)


def as_reward_input(prompt: Text) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
