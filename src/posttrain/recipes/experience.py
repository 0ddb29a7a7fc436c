"""A generation batch: completions with their log-probs and advantages, ready to be trained on, once or several times."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from posttrain.config.stages import GRPOKeys
from posttrain.health.controls import Controls
from posttrain.models.batch import Batch, pack
from posttrain.models.policy import Policy
from posttrain.models.text import decoder
from posttrain.objectives.advantages import AdvantageSpec, as_rewards, compute_advantages, soft_overlong_penalty
from posttrain.objectives.policy import advantage_estimator_of
from posttrain.objectives.terms import spec_from
from posttrain.protocols import Engine, Topology
from posttrain.recipes.batches import fill_with_groups, split_groups
from posttrain.recipes.engine import sampling_params
from posttrain.recipes.prompts import PromptStream
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


@dataclass(frozen=True, slots=True)
class Experience:
    """The groups of one generation batch, of all ranks in the order of their prompts; where the prompts went on from."""

    generation: int
    next_prompt: int
    groups: tuple[tuple[Trajectory, ...], ...]
    metrics: dict[str, float]

    def part(self, index: int, num_parts: int) -> list[tuple[Trajectory, ...]]:
        """The groups of one of `steps_per_generation` optimizer steps."""
        size = math.ceil(len(self.groups) / num_parts)
        return list(self.groups[index * size : (index + 1) * size])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Experience:
        groups = tuple(tuple(_trajectory(t) for t in group) for group in record["groups"])
        return cls(record["generation"], record["next_prompt"], groups, record["metrics"])


class Collector:
    """Makes experience: samples, scores, computes advantages over all ranks."""

    def __init__(
        self, keys: GRPOKeys, policy: Policy, engine: Engine, score: ScoreRewards, topology: Topology,
        prompts: PromptStream,
    ) -> None:  # fmt: skip
        self._keys, self._policy, self._engine, self._score = keys, policy, engine, score
        self._topology, self._prompts, self._controls = topology, prompts, Controls()
        self._decode = decoder(policy.tokenizer)
        self.latest: list[RolloutGroup] = []
        self.ledger: dict[str, list[int]] = {}
        self.wall_s = 0.0

    def collect(self, generation: int, first_prompt: int, controls: Controls) -> Experience:
        """Generation batch number `generation`, from prompt `first_prompt` of the run's endless shuffled prompts."""
        started = time.monotonic()
        self._controls = controls
        numbered, next_prompt, rounds = self._sampled(generation, first_prompt)
        groups = [group for _, group in numbered]
        self.latest = groups
        columns, kl = self._reward_columns(groups)
        everyone = self._topology.gather(columns)
        rank = self._topology.rank
        before = sum(len(rows) for rows in everyone[:rank])
        spec = spec_from(AdvantageSpec, self._keys)
        weights = list(self._keys.reward_weights or [1.0] * len(self._keys.reward_funcs))
        spec = _replace(
            spec, weights, as_width=len(next(row for rows in everyone for row in rows)), loss_type=self._keys.loss_type
        )
        rewards_BK = as_rewards([row for rows in everyone for row in rows])
        group_B = torch.arange(len(rewards_BK)) // self._num_generations
        advantages = compute_advantages(rewards_BK, group_B, spec)
        mine = advantages.advantage_B[before : before + len(columns)].tolist()
        made = zip([number for number, _ in numbered], self._trajectories(groups, iter(mine)), strict=True)
        # In the order of one process: how groups are split over the steps of a batch must not depend on the ranks.
        dealt = sorted((pair for rank in self._topology.gather(list(made)) for pair in rank), key=lambda pair: pair[0])
        trajectories = tuple(group for _, group in dealt)
        metrics = self._metrics(groups, rewards_BK, advantages.reward_B, advantages.zero_std_P, group_B)
        metrics |= kl
        if self._keys.dynamic_sampling:
            metrics["sampling/rounds"] = float(rounds)
        if controls.resample:
            metrics["sampling/passed_over"] = float(len(self.ledger["passed_over"]))
        self.wall_s = time.monotonic() - started
        return Experience(generation, next_prompt, trajectories, metrics)

    # --- sampling ----------------------------------------------------------------------------------------------

    def _sampled(self, generation: int, first_prompt: int) -> tuple[list[tuple[int, RolloutGroup]], int, int]:
        """This rank's groups with their prompts' numbers. With dynamic sampling, groups without a difference in reward are replaced by new prompts."""
        keys, wanted, kept = self._keys, self._keys.num_prompts_per_step, list[tuple[int, RolloutGroup]]()
        # After a rollback the prompts of the abandoned steps are passed over.
        shift = math.ceil(self._controls.skipped / (keys.steps_per_generation * keys.num_iterations)) * wanted
        cursor, rounds, total = first_prompt + shift, 0, 0
        spare: list[tuple[int, RolloutGroup]] = []
        issued: list[int] = []
        passed_over: list[int] = []
        notes: list[tuple[int, float, bool]] = []
        while True:
            numbers, following = self._prompts.next(cursor, wanted - total, resample=self._controls.resample)
            passed_over += [number for number in range(cursor, following) if number not in set(numbers)]
            cursor = following
            rounds += 1
            mine = self._topology.shard(numbers)
            issued += numbers
            for pair in zip(mine, self._rollout(generation, mine), strict=True):
                notes += [note] if (note := self._prompts.note(*pair)) is not None else []
                (kept if not keys.dynamic_sampling or _has_spread(pair[1]) else spare).append(pair)
            total = sum(self._topology.gather(len(kept)))
            if total >= wanted or rounds >= keys.dynamic_sampling_max_rounds or not keys.dynamic_sampling:
                break
        if total == 0:
            # Nothing to learn from: go on with what there is, which the zero-spread metrics then show.
            kept = spare[: max(1, wanted // self._topology.world_size)]
        # Every prompt group is issued once and either trained on or let go; counted along the surviving weights.
        trained = sorted(number for rank in self._topology.gather([number for number, _ in kept]) for number in rank)
        self.ledger = {"issued": issued, "trained": trained, "passed_over": passed_over}
        self._prompts.learn([note for rank in self._topology.gather(notes) for note in rank])
        return kept, cursor - shift, rounds

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
        if keys.soft_overlong_cache:
            lengths = [len(rollout.completion.ids) for group in groups for rollout in group.rollouts]
            for row, length in zip(rows, lengths, strict=True):
                row.append(soft_overlong_penalty(length, keys.max_completion_length, keys.soft_overlong_cache))
        if not (keys.kl_in_reward and keys.beta):
            return rows, {}
        # k1, summed over each completion.
        kls = [
            sum(rollout.completion.logp) - sum(reference)
            for group, scored in zip(groups, self._reference_logp(groups), strict=True)
            for rollout, reference in zip(group.rollouts, scored, strict=True)
        ]
        for row, kl in zip(rows, kls, strict=True):
            row.append(-keys.beta * self._controls.beta_scale * kl)
        tokens = sum(len(rollout.completion.ids) for group in groups for rollout in group.rollouts)
        kl, rollouts, tokens = self._topology.sum([sum(kls), float(len(kls)), float(tokens)])
        return rows, {"kl_in_reward": kl / max(1.0, rollouts), "kl": kl / max(1.0, tokens)}

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

    def _trajectories(self, groups: Sequence[RolloutGroup], advantages: Any) -> tuple[tuple[Trajectory, ...], ...]:
        keys = self._keys
        needs_reference = keys.beta > 0 and not keys.kl_in_reward
        # The embedded engine's log-probs are the trainer's own; another sampler's are corrected for.
        corrected = keys.importance_sampling_correction != "off"
        nothing = [[None] * len(group.rollouts) for group in groups]
        references = self._reference_logp(groups) if needs_reference else nothing
        olds = self._trainer_logp(groups) if corrected else [[r.completion.logp for r in g.rollouts] for g in groups]
        result: list[tuple[Trajectory, ...]] = []
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
        group_B: torch.Tensor,
    ) -> dict[str, float]:
        """Under TRL's names; over all ranks."""
        rollouts = [(len(r.completion.ids), r.completion.finish) for group in groups for r in group.rollouts]
        everyone = [pair for rank in self._topology.gather(rollouts) for pair in rank]
        lengths = [length for length, _ in everyone]
        ended = [length for length, finish in everyone if finish != "length"]
        scored_B = reward_B[~reward_B.isnan()]
        metrics = {
            "reward": float(scored_B.mean()),
            "reward_std": float(scored_B.std()) if scored_B.numel() > 1 else 0.0,
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
        metrics |= _split_zero_std(reward_B, zero_std_P, group_B)
        names = list(groups[0].rollouts[0].reward.parts) if groups else []
        for index, name in enumerate(names):
            column = rewards_BK[:, index]
            column = column[~column.isnan()]
            metrics[f"rewards/{name}/mean"] = float(column.mean())
            metrics[f"rewards/{name}/std"] = float(column.std()) if column.numel() > 1 else 0.0
        return metrics


def _split_zero_std(reward_B: torch.Tensor, zero_std_P: torch.Tensor, group_B: torch.Tensor) -> dict[str, float]:
    """Groups without spread, all at the batch's best reward apart from the others: mastered prompts are no fault."""
    best = float(reward_B.nan_to_num(nan=-math.inf).max())
    first_P = torch.tensor([int((group_B == group).nonzero()[0]) for group in range(len(zero_std_P))])
    at_best_P = reward_B[first_P] >= best
    solved = float((zero_std_P & at_best_P & (best > float(reward_B.nan_to_num(nan=math.inf).min()))).double().mean())
    return {"frac_reward_all_right": solved, "frac_reward_all_wrong": float(zero_std_P.double().mean()) - solved}


def _parts(rollout: Rollout) -> list[float | None]:
    """Reward per function; a completion that could not be scored counts in none of them."""
    parts = list(rollout.reward.parts.values())
    return [None] * len(parts) if rollout.status == "unscored" else parts


def _trajectory(record: dict[str, Any]) -> Trajectory:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items()}
    return Trajectory(**values)


def _has_spread(group: RolloutGroup) -> bool:
    totals = {round(rollout.reward.total, 9) for rollout in group.rollouts if rollout.reward.total is not None}
    return len(totals) > 1


def _sequence(group: RolloutGroup, completion: Sequence[int]) -> TokenSeq:
    start = len(group.prompt_ids)
    return TokenSeq((*group.prompt_ids, *completion), (False,) * start + (True,) * len(completion))


def _replace(spec: AdvantageSpec, weights: list[float], *, as_width: int, loss_type: str) -> AdvantageSpec:
    """Shaping columns come after the reward functions and weigh 1; some losses are defined with their own baseline."""
    estimator = advantage_estimator_of(loss_type, spec.advantage_estimator)
    return replace(spec, reward_weights=weights + [1.0] * (as_width - len(weights)), advantage_estimator=estimator)
