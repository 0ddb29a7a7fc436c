"""From prompts to scored groups of completions. Knows no advantages and no loss."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

from posttrain.protocols import Engine
from posttrain.rollout.sampling import request_seed
from posttrain.types import (
    Completion,
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


def sample_groups(
    engine: Engine, rows: Sequence[PromptRow], num_generations: int, params: SamplingParams,
    seed_parts: Sequence[int], numbers: Sequence[int],
) -> list[list[Completion]]:  # fmt: skip
    """`num_generations` completions of each prompt; `numbers` are the prompts' places in the run, which seed them."""
    requests = _requests(rows, num_generations, seed_parts, numbers)
    completions = in_order(engine.generate(requests, params))
    return [completions[i : i + num_generations] for i in range(0, len(completions), num_generations)]


def groups_as_they_end(
    engine: Engine, rows: Sequence[PromptRow], num_generations: int, params: SamplingParams,
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
        (prompt, completion, decode(completion.ids))
        for (prompt, _), group in zip(rows, groups, strict=True)
        for completion in group
    ]
    prompts = [as_reward_input(prompt.prompt) for prompt, _, _ in flat]
    texts: list[Any] = [
        text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}] for prompt, _, text in flat
    ]
    names = sorted({name for prompt, _, _ in flat for name in prompt.columns})
    columns = {name: [prompt.columns.get(name) for prompt, _, _ in flat] for name in names}
    columns["completion_ids"] = [list(completion.ids) for _, completion, _ in flat]
    breakdowns = iter(score(prompts, texts, columns))
    scored = iter([Rollout(completion, text, next(breakdowns)) for _, completion, text in flat])
    return [
        RolloutGroup(prompt, ids, tuple(next(scored) for _ in group))
        for (prompt, ids), group in zip(rows, groups, strict=True)
    ]


def as_reward_input(prompt: Text) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
