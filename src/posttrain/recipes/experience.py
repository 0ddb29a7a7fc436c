"""A generation batch: completions with their log-probs and advantages, ready to be trained on, once or several times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from posttrain.config.stages import GRPOKeys
from posttrain.health.controls import Controls
from posttrain.models.batch import Batch, pack
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.objectives.advantages import AdvantageSpec, as_rewards, compute_advantages, soft_overlong_penalty
from posttrain.objectives.policy import advantage_estimator_of
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import spec_from
from posttrain.protocols import Engine, Topology
from posttrain.recipes.batches import fill_with_groups, split_groups
from posttrain.recipes.engine import sampling_params
from posttrain.recipes.prompts import PromptStream
from posttrain.recipes.reward_range import Bounds, judging_weights, shares, stated_bounds, widened
from posttrain.recipes.steering import steered
from posttrain.rollout.collect import ScoreRewards, sample_groups, score_groups
from posttrain.types import Rollout, RolloutGroup, TokenSeq


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A completion and all that its update needs. Log-probs have one entry per completion token."""

    ids: tuple[int, ...]
    start: int
    behavior_logp: tuple[float, ...]
    old_logp: tuple[float, ...]
    ref_logp: tuple[float, ...] | None
    advantage: float
    masked: bool

    def as_seq(self) -> TokenSeq:
        trained = not self.masked
        return TokenSeq(self.ids, (False,) * self.start + (trained,) * (len(self.ids) - self.start))

    @property
    def num_tokens(self) -> int:
        return 0 if self.masked else len(self.ids) - self.start


Group = tuple[Trajectory, ...]


def teaches(group: Group, spec: PolicySpec, keys: GRPOKeys) -> bool:
    """Whether a group moves the weights: by an advantage, or by a term that needs none."""
    pulled = spec.entropy_coef > 0 or (spec.beta > 0 and not keys.kl_in_reward)
    return any(t.num_tokens and (pulled or t.advantage) for t in group)


@dataclass(frozen=True, slots=True)
class Experience:
    """The groups of one generation batch, of all ranks in the order of their prompts; where the prompts went on from.

    `reward_bounds` are those of the run so far.
    """

    generation: int
    next_prompt: int
    groups: tuple[Group, ...]
    metrics: dict[str, float]
    reward_bounds: Bounds

    def part(self, index: int, num_parts: int) -> list[Group]:
        """The groups of one of `steps_per_generation` optimizer steps; parts differ by one group at most."""
        size, longer = divmod(len(self.groups), num_parts)
        start = index * size + min(index, longer)
        return list(self.groups[start : start + size + (index < longer)])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Experience:
        groups = tuple(tuple(_trajectory(t) for t in group) for group in record["groups"])
        bounds = tuple(None if pair is None else (pair[0], pair[1]) for pair in record["reward_bounds"])
        return cls(record["generation"], record["next_prompt"], groups, record["metrics"], bounds)


@dataclass(slots=True)
class _Sampled:
    """The rounds of one generation batch: this rank's groups by the numbers of their prompts, and what holds for all ranks."""

    reward_bounds: Bounds
    kept: list[tuple[int, RolloutGroup]] = field(default_factory=list[tuple[int, RolloutGroup]])
    let_go: list[tuple[int, RolloutGroup]] = field(default_factory=list[tuple[int, RolloutGroup]])
    shares: dict[str, float] = field(default_factory=dict[str, float])
    issued: list[int] = field(default_factory=list[int])
    passed_over: list[int] = field(default_factory=list[int])
    rounds: int = 0
    next_prompt: int = 0

    @property
    def of_this_rank(self) -> list[tuple[int, RolloutGroup]]:
        return self.kept + self.let_go


class Collector:
    """Makes experience: samples, scores, computes advantages over all ranks."""

    def __init__(
        self, keys: GRPOKeys, policy: Policy, engine: Engine, score: ScoreRewards, topology: Topology,
        prompts: PromptStream,
    ) -> None:  # fmt: skip
        self._keys, self._policy, self._engine, self._score = keys, policy, engine, score
        self._topology, self._prompts, self._controls = topology, prompts, Controls()
        self._decode = decoder(policy.tokenizer)
        self._weights = list(keys.reward_weights or [1.0] * len(keys.reward_funcs))
        self.latest: list[RolloutGroup] = []
        self.ledger: dict[str, list[int]] = {}
        self.wall_s = 0.0

    def collect(self, generation: int, previous: Experience | None, controls: Controls) -> Experience:
        """Generation batch number `generation`, from where the run's endless shuffled prompts were left by the `previous` one."""
        started = time.monotonic()
        self._controls = controls
        sampled = self._sampled(generation, previous)
        groups = [group for _, group in sampled.kept]
        self.latest = groups
        columns, kl = self._reward_columns(groups)
        everyone = self._topology.gather(columns)
        rewards_BK = as_rewards([row for rows in everyone for row in rows])
        group_B = torch.arange(len(rewards_BK)) // self._num_generations
        advantages = compute_advantages(rewards_BK, group_B, self._advantage_spec(rewards_BK.shape[1]))
        before = sum(len(rows) for rows in everyone[: self._topology.rank])
        mine = advantages.advantage_B[before : before + len(columns)].tolist()
        made = zip([number for number, _ in sampled.kept], self._trajectories(groups, iter(mine)), strict=True)
        # In the order of one process: how groups are split over the steps of a batch must not depend on the ranks.
        dealt = sorted((pair for rank in self._topology.gather(list(made)) for pair in rank), key=lambda pair: pair[0])
        # Every prompt group is issued once and either trained on or let go; counted along the surviving weights.
        objective = steered(spec_from(PolicySpec, self._keys), controls)
        trained = [number for number, group in dealt if teaches(group, objective, self._keys)]
        self.ledger = {"issued": sampled.issued, "trained": trained, "passed_over": sampled.passed_over}
        metrics = self._metrics(groups, rewards_BK, advantages.reward_B, advantages.zero_std_P)
        metrics |= kl | sampled.shares
        if self._keys.dynamic_sampling:
            metrics["sampling/rounds"] = float(sampled.rounds)
        if controls.resample:
            metrics["sampling/passed_over"] = float(len(sampled.passed_over))
        self.wall_s = time.monotonic() - started
        return Experience(
            generation, sampled.next_prompt, tuple(group for _, group in dealt), metrics, sampled.reward_bounds
        )

    def _advantage_spec(self, num_columns: int) -> AdvantageSpec:
        """Shaping columns come after the reward functions and weigh 1; some losses are defined with their own baseline."""
        spec = spec_from(AdvantageSpec, self._keys)
        weights = self._weights + [1.0] * (num_columns - len(self._weights))
        estimator = advantage_estimator_of(self._keys.loss_type, spec.advantage_estimator)
        return replace(spec, reward_weights=weights, advantage_estimator=estimator)

    # --- sampling ----------------------------------------------------------------------------------------------

    def _sampled(self, generation: int, previous: Experience | None) -> _Sampled:
        """This rank's groups. With dynamic sampling, groups without a difference in reward are replaced by new prompts."""
        keys, wanted = self._keys, self._keys.num_prompts_per_step
        # After a rollback the prompts of the abandoned steps are passed over.
        shift = math.ceil(self._controls.skipped / (keys.steps_per_generation * keys.num_iterations)) * wanted
        cursor, total = (previous.next_prompt if previous else 0) + shift, 0
        bounds = previous.reward_bounds if previous else stated_bounds(keys.reward_funcs)
        # Prompts that are mastered are not asked for round after round: once a whole batch of them was, one round must do.
        mastered = previous is not None and previous.metrics["frac_reward_all_right"] == 1.0
        sampled = _Sampled(reward_bounds=bounds)
        while True:
            numbers, following = self._prompts.next(cursor, wanted - total, resample=self._controls.resample)
            sampled.issued += numbers
            sampled.passed_over += [number for number in range(cursor, following) if number not in set(numbers)]
            cursor = following
            mine = self._topology.shard(numbers)
            for pair in zip(mine, self._rollout(generation, mine), strict=True):
                keep = not keys.dynamic_sampling or _has_spread(pair[1])
                (sampled.kept if keep else sampled.let_go).append(pair)
            sampled.rounds += 1
            self._judge(sampled, bounds)
            total = sum(self._topology.gather(len(sampled.kept)))
            done = total >= wanted or sampled.rounds >= keys.dynamic_sampling_max_rounds or not keys.dynamic_sampling
            if done or (mastered and sampled.shares["frac_reward_all_right"] == 1.0):
                break
        seen = [note for pair in sampled.of_this_rank if (note := self._prompts.note(*pair)) is not None]
        self._prompts.learn([note for rank in self._topology.gather(seen) for note in rank])
        if total == 0:
            # Nothing to learn from: go on with what there is, which the zero-spread metrics then show.
            sampled.kept = sampled.let_go[: max(1, wanted // self._topology.world_size)]
        sampled.next_prompt = cursor - shift
        return sampled

    def _judge(self, sampled: _Sampled, bounds: Bounds) -> None:
        """What the rewards say of all that was sampled, on all ranks, whether it is kept or not."""
        mine = [_parts(rollout) for _, group in sampled.of_this_rank for rollout in group.rollouts]
        rewards_BK = as_rewards([row for rows in self._topology.gather(mine) for row in rows])
        sampled.reward_bounds = widened(bounds, rewards_BK)
        group_B = torch.arange(len(rewards_BK)) // self._num_generations
        weights = judging_weights(self._keys.reward_funcs, self._weights)
        sampled.shares = shares(rewards_BK, group_B, sampled.reward_bounds, weights)

    def _rollout(self, generation: int, numbers: Sequence[int]) -> list[RolloutGroup]:
        rows = [self._prompts(number) for number in numbers]
        if not rows:
            return []
        completions = sample_groups(
            self._engine, rows, self._num_generations, sampling_params(self._keys),
            (self._controls.seed(self._keys.seed), generation), numbers,
        )  # fmt: skip
        return score_groups(rows, completions, self._decode, self._score)

    @property
    def _num_generations(self) -> int:
        return self._keys.num_generations * self._controls.group_scale

    # --- rewards -----------------------------------------------------------------------------------------------

    def _reward_columns(self, groups: Sequence[RolloutGroup]) -> tuple[list[list[float | None]], dict[str, float]]:
        """One row per completion: the reward functions, then the shaping terms that are switched on; and the KL."""
        keys = self._keys
        rows = [_parts(rollout) for group in groups for rollout in group.rollouts]
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        if keys.soft_overlong_cache:
            longest, cache = keys.max_completion_length, keys.soft_overlong_cache
            _append(rows, [soft_overlong_penalty(len(rollout.completion.ids), longest, cache) for rollout in rollouts])
        if not (keys.kl_in_reward and keys.beta):
            return rows, {}
        # k1, summed over each completion.
        references = [reference for scored in self._reference_logp(groups) for reference in scored]
        kls = [sum(r.completion.logp) - sum(reference) for r, reference in zip(rollouts, references, strict=True)]
        _append(rows, [-keys.beta * self._controls.beta_scale * kl for kl in kls])
        tokens = sum(len(rollout.completion.ids) for rollout in rollouts)
        kl, count, tokens = self._topology.sum([sum(kls), float(len(kls)), float(tokens)])
        return rows, {"kl_in_reward": kl / max(1.0, count), "kl": kl / max(1.0, tokens)}

    @torch.no_grad()
    def _reference_logp(self, groups: Sequence[RolloutGroup]) -> list[list[list[float]]]:
        return self._scored(groups, lambda batch: self._policy.reference_logp(batch, self._keys.temperature))

    @torch.no_grad()
    def _trainer_logp(self, groups: Sequence[RolloutGroup]) -> list[list[list[float]]]:
        return self._scored(groups, lambda batch: self._policy.score(batch, temperature=self._keys.temperature).logp_M)

    def _scored(
        self, groups: Sequence[RolloutGroup], score: Callable[[Batch], torch.Tensor]
    ) -> list[list[list[float]]]:
        """Log-probs of each group's completions, as many completions at a time as training takes."""
        at_once = self._keys.per_device_train_batch_size
        families = [[_sequence(group, r.completion.ids) for r in group.rollouts] for group in groups]
        scores: list[list[float]] = []
        for micro in fill_with_groups(split_groups(families, at_once), at_once):
            batch = pack(micro)
            scores += [logp.tolist() for logp in score(batch).split(batch.lengths_S().tolist())]
        each = iter(scores)
        return [[next(each) for _ in group.rollouts] for group in groups]

    # --- trajectories and metrics ------------------------------------------------------------------------------

    def _trajectories(self, groups: Sequence[RolloutGroup], advantages: Any) -> tuple[Group, ...]:
        keys = self._keys
        needs_reference = keys.beta > 0 and not keys.kl_in_reward
        # The embedded engine's log-probs are the trainer's own; another sampler's are corrected for.
        corrected = keys.importance_sampling_correction != "off"
        nothing = [[None] * len(group.rollouts) for group in groups]
        references = self._reference_logp(groups) if needs_reference else nothing
        olds = self._trainer_logp(groups) if corrected else [[r.completion.logp for r in g.rollouts] for g in groups]
        result: list[Group] = []
        for group, reference, old in zip(groups, references, olds, strict=True):
            result.append(tuple(
                Trajectory(
                    ids=group.prompt_ids + rollout.completion.ids, start=len(group.prompt_ids),
                    behavior_logp=rollout.completion.logp, old_logp=tuple(old_logp),
                    ref_logp=None if ref is None else tuple(ref), advantage=next(advantages),
                    masked=keys.mask_truncated_completions and rollout.completion.finish == "length",
                )
                for rollout, ref, old_logp in zip(group.rollouts, reference, old, strict=True)
            ))  # fmt: skip
        return tuple(result)

    def _metrics(
        self,
        groups: Sequence[RolloutGroup],
        rewards_BK: torch.Tensor,
        reward_B: torch.Tensor,
        zero_std_P: torch.Tensor,
    ) -> dict[str, float]:
        """Under TRL's names; over all ranks."""
        rollouts = [(len(r.completion.ids), r.completion.finish) for group in groups for r in group.rollouts]
        everyone = [pair for rank in self._topology.gather(rollouts) for pair in rank]
        lengths = [length for length, _ in everyone]
        ended = [length for length, finish in everyone if finish != "length"]
        scored_B = reward_B[~reward_B.isnan()]
        metrics = {
            "reward": float(scored_B.mean()),
            "reward_std": _std(scored_B),
            "frac_reward_zero_std": float(zero_std_P.double().mean()),
            "frac_unscored": float(reward_B.isnan().double().mean()),
            "completions/mean_length": sum(lengths) / len(lengths),
            "completions/min_length": float(min(lengths)),
            "completions/max_length": float(max(lengths)),
            "completions/clipped_ratio": 1.0 - len(ended) / len(everyone),
        }
        if ended:
            metrics |= {
                "completions/mean_terminated_length": sum(ended) / len(ended),
                "completions/min_terminated_length": float(min(ended)),
                "completions/max_terminated_length": float(max(ended)),
            }
        names = list(groups[0].rollouts[0].reward.parts) if groups else []
        for index, name in enumerate(names):
            column = rewards_BK[:, index]
            column = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"] = float(column.mean())
            metrics[f"rewards/{name}/std"] = _std(column)
        return metrics


def _std(values: torch.Tensor) -> float:
    """Sample std: 0 of a single value; NaN, which is written as null, of none."""
    return math.nan if not values.numel() else float(values.std()) if values.numel() > 1 else 0.0


def _parts(rollout: Rollout) -> list[float | None]:
    """Reward per function; a completion that could not be scored counts in none of them."""
    parts = list(rollout.reward.parts.values())
    return [None] * len(parts) if rollout.status == "unscored" else parts


def _append(rows: list[list[float | None]], values: Sequence[float]) -> None:
    """A column of shaping. A completion that could not be scored has none: shaping alone would make it count as scored."""
    for row, value in zip(rows, values, strict=True):
        row.append(None if all(part is None for part in row) else value)


def _trajectory(record: dict[str, Any]) -> Trajectory:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Trajectory(**values)


def _has_spread(group: RolloutGroup) -> bool:
    totals = {round(rollout.reward.total, 9) for rollout in group.rollouts if rollout.reward.total is not None}
    return len(totals) > 1


def _sequence(group: RolloutGroup, completion: Sequence[int]) -> TokenSeq:
    start = len(group.prompt_ids)
    return TokenSeq((*group.prompt_ids, *completion), (False,) * start + (True,) * len(completion))
