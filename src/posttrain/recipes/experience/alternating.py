"""Taking turns: each generation batch is sampled from the weights that it is trained on with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from posttrain.config.rl import RewardedKeys
from posttrain.health.controls import Controls
from posttrain.protocols import Ranks
from posttrain.recipes.experience.engines import sampling_params
from posttrain.recipes.experience.prompts import PromptStream
from posttrain.recipes.experience.reward_range import stated_bounds
from posttrain.recipes.experience.sampled import Sampled, has_spread
from posttrain.rollout.collect import SampleGroups, ScoreRewards, score_groups
from posttrain.rollout.experience import Experience
from posttrain.types import Decode, RolloutGroup


class Alternating:
    """Samples when it is asked. With dynamic sampling, groups without a difference in reward are replaced by new prompts."""

    def __init__(
        self,
        keys: RewardedKeys,
        sample: SampleGroups,
        decode: Decode,
        score: ScoreRewards,
        prompts: PromptStream,
        ranks: Ranks,
    ) -> None:
        self._keys, self._sample, self._decode, self._score = keys, sample, decode, score
        self._prompts, self._ranks = prompts, ranks

    def sampled(self, generation: int, previous: Experience | None, controls: Controls) -> Sampled:
        """This rank's groups of batch `generation`, from where the prompts were left by the `previous` one."""
        keys, wanted = self._keys, self._keys.num_prompts_per_step
        shift = batches_skipped(controls, keys) * wanted
        cursor, total = (previous.next_prompt if previous else 0) + shift, 0
        bounds = previous.reward_bounds if previous else stated_bounds(keys.reward_funcs)
        # Prompts that are mastered are not asked for round after round: once a whole batch of them was, one round must do.
        mastered = previous is not None and previous.metrics["frac_reward_all_right"] == 1.0
        sampled = Sampled(reward_bounds=bounds)
        while True:
            numbers, following = self._prompts.next(cursor, wanted - total, resample=controls.resample)
            sampled.issued += numbers
            sampled.passed_over += [number for number in range(cursor, following) if number not in set(numbers)]
            cursor = following
            mine = self._ranks.share(numbers)
            sampled_groups = self._ranks.among(mine, partial(self._rollout, generation, controls))
            for pair in zip(mine, sampled_groups, strict=True):
                keep = not keys.dynamic_sampling or has_spread(pair[1])
                (sampled.kept if keep else sampled.let_go).append(pair)
            sampled.rounds += 1
            sampled.judge(bounds, keys, self._ranks)
            total = sum(self._ranks.gather(len(sampled.kept)))
            done = total >= wanted or sampled.rounds >= keys.dynamic_sampling_max_rounds or not keys.dynamic_sampling
            if done or (mastered and sampled.shares["frac_reward_all_right"] == 1.0):
                break
        self._prompts.learn_from(sampled.of_this_rank, self._ranks)
        sampled.metrics |= self._prompts.metrics()
        if total == 0:
            # Nothing to learn from: go on with what there is, the first of all ranks, which the zero-spread metrics then show.
            mine = [number for number, _ in sampled.let_go]
            first = sorted(number for rank in self._ranks.gather(mine) for number in rank)[:wanted]
            sampled.kept = [pair for pair in sampled.let_go if pair[0] in first]
        sampled.next_prompt = cursor - shift
        return sampled

    def close(self) -> None:
        """Nothing goes on between two batches."""

    def _rollout(self, generation: int, controls: Controls, numbers: Sequence[int]) -> list[RolloutGroup]:
        """A rank without a prompt asks too: there may be one engine for all of them."""
        rows = [self._prompts(number) for number in numbers]
        completions = self._sample(
            rows, self._keys.num_generations * controls.group_scale, sampling_params(self._keys),
            (controls.seed(self._keys.seed), generation), numbers,
        )  # fmt: skip
        return score_groups(rows, completions, self._decode, self._score) if rows else []


def batches_skipped(controls: Controls, keys: RewardedKeys) -> int:
    """After rollbacks the prompts of the abandoned steps are passed over."""
    return math.ceil(controls.skipped / keys.steps_per_batch)
