"""Makes a generation batch: completions with their log-probs and advantages, ready to be trained on, once or several times."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from posttrain.config.rl import GRPOKeys
from posttrain.health.controls import Controls
from posttrain.objectives.advantages import AdvantageSpec, as_rewards, compute_advantages, soft_overlong_penalty
from posttrain.objectives.distill import TEACHER_ADVANTAGES, coefficient_at
from posttrain.objectives.policy import advantage_estimator_of
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import spec_from
from posttrain.protocols import Ranks, Scorer
from posttrain.recipes.sampled import Sampled, group_indices, reward_parts
from posttrain.recipes.steering import steered
from posttrain.recipes.teachers import Teachers
from posttrain.rewards.learned import ASKED, FAILED
from posttrain.rewards.measures import mutual_information, spread_shares
from posttrain.rewards.resolve import reward_names
from posttrain.rollout.experience import Experience, Group
from posttrain.types import Episode, Rollout, RolloutGroup, Sample


def teaches(group: Group, spec: PolicySpec, keys: GRPOKeys) -> bool:
    """Whether a group moves the weights: by an advantage, or by a term that needs none."""
    pulled = spec.entropy_coef > 0 or (spec.beta > 0 and not keys.kl_in_reward)
    return any(s.num_loss_tokens and (pulled or (s.advantage is not None and s.advantage.any())) for s in group)


@dataclass(frozen=True, slots=True)
class Collected:
    """A generation batch with what was seen of it: this rank's groups with their texts, the prompts' ledger, seconds."""

    experience: Experience
    groups: tuple[RolloutGroup, ...]
    ledger: Mapping[str, list[int]]
    wall_s: float


@dataclass(frozen=True, slots=True)
class _Made:
    """One prompt's group on its way to all ranks: samples without advantage, a row of rewards for each, how each ended."""

    number: int
    samples: Group
    rewards: list[list[float | None]]
    lengths: list[int]
    truncated: list[bool]
    kl: list[float]
    counts: list[Mapping[str, float]]
    """Of each completion: what asking models for its rewards came to."""
    log_ratios: list[np.ndarray] | None
    """log teacher − log policy of the samples' trained tokens; None without teachers."""
    episodes: list[Episode]
    """What they were like, without what was said."""


class Sampling(Protocol):
    """Gives the scored groups of one generation batch after the other."""

    def sampled(self, generation: int, previous: Experience | None, controls: Controls) -> Sampled: ...

    def close(self) -> None: ...


class Collector:
    """Makes experience of what `sampling` gives it: scores, computes advantages over all ranks. `reference` is asked only where beta is used."""

    def __init__(
        self, keys: GRPOKeys, sampling: Sampling, trainer: Scorer, reference: Scorer, teachers: Teachers, ranks: Ranks
    ) -> None:  # fmt: skip
        self._keys, self._sampling = keys, sampling
        self._trainer, self._reference, self._teachers, self._ranks = trainer, reference, teachers, ranks
        self._controls = Controls()
        self._weights = list(keys.reward_weights or [1.0] * len(keys.reward_funcs))
        self._names = reward_names(keys.reward_funcs)

    def collect(self, generation: int, previous: Experience | None, controls: Controls) -> Collected:
        """Generation batch number `generation`, from where the run's endless shuffled prompts were left by the `previous` one."""
        started = time.monotonic()
        self._controls = controls
        sampled = self._sampling.sampled(generation, previous, controls)
        # In the order of one process: how groups are split over the steps of a batch must not depend on the ranks.
        made = sorted(
            (one for rank in self._ranks.gather(self._made(sampled.kept)) for one in rank),
            key=lambda one: one.number,
        )
        rewards_BK = as_rewards([row for one in made for row in one.rewards])
        group_B = group_indices([len(one.rewards) for one in made])
        advantages = compute_advantages(rewards_BK, group_B, self._advantage_spec(rewards_BK.shape[1]))
        coef = self._teacher_coef(generation)
        groups = tuple(self._advised(one, each, coef) for one, each in _by_group(made, advantages.advantage_B))
        # Every prompt group is issued once and either trained on or let go; counted along the surviving weights.
        objective = steered(spec_from(PolicySpec, self._keys), controls)
        trained = [one.number for one, group in zip(made, groups, strict=True) if teaches(group, objective, self._keys)]
        ledger = {"issued": sampled.issued, "trained": trained, "passed_over": sampled.passed_over}
        metrics = (
            _metrics(made, self._names, rewards_BK, advantages.reward_B, advantages.zero_std_P)
            | _component_metrics(self._names, self._weights, rewards_BK, advantages.reward_B, made)
            | sampled.shares
            | sampled.metrics
        )
        if self._keys.teachers:
            metrics |= _gap(made) | {"teacher/coef": coef}
        if self._keys.dynamic_sampling:
            metrics["sampling/rounds"] = float(sampled.rounds)
        if controls.resample:
            metrics["sampling/passed_over"] = float(len(sampled.passed_over))
        experience = Experience(generation, sampled.next_prompt, groups, metrics, sampled.reward_bounds)
        shown = tuple(group for _, group in sampled.kept)
        return Collected(experience, shown, ledger, time.monotonic() - started)

    def _advantage_spec(self, num_columns: int) -> AdvantageSpec:
        """Shaping columns come after the reward functions and weigh 1; some losses are defined with their own baseline."""
        spec = spec_from(AdvantageSpec, self._keys)
        weights = self._weights + [1.0] * (num_columns - len(self._weights))
        estimator = advantage_estimator_of(self._keys.loss_type, spec.advantage_estimator)
        return replace(spec, reward_weights=weights, advantage_estimator=estimator)

    def _teacher_coef(self, generation: int) -> float:
        """At the first step that a generation batch is trained in."""
        keys = self._keys
        step = generation * keys.steps_per_generation * keys.num_iterations
        return coefficient_at(keys.teacher_coef, step, keys.teacher_warmup_steps, keys.teacher_decay_steps)

    def _advised(self, one: _Made, advantages: Sequence[float], coef: float) -> Group:
        """The samples with their advantages: one value each, or what teachers make of it token by token."""
        if one.log_ratios is None:
            each = [sample.constant(value) for sample, value in zip(one.samples, advantages, strict=True)]
        else:
            of_tokens = TEACHER_ADVANTAGES[self._keys.teacher_advantage]
            pairs = zip(advantages, one.log_ratios, strict=True)
            each = [_of_tokens(of_tokens, value, ratio, coef, self._keys.teacher_clip) for value, ratio in pairs]
        return tuple(replace(s, advantage=values) for s, values in zip(one.samples, each, strict=True))

    # --- samples and rewards -----------------------------------------------------------------------------------

    def _made(self, numbered: Sequence[tuple[int, RolloutGroup]]) -> list[_Made]:
        """This rank's groups, scored by whoever the objective asks."""
        keys = self._keys
        unmasked = [tuple(_sample(group, rollout) for rollout in group.rollouts) for _, group in numbered]
        wants_reference = keys.beta > 0
        references = self._reference.logp(unmasked) if wants_reference else [None] * _count(unmasked)
        # The embedded engine's log-probs are the trainer's own; another sampler's are corrected for.
        corrected = keys.importance_sampling_correction != "off"
        olds = self._trainer.logp(unmasked) if corrected else [None] * _count(unmasked)
        scored = iter(zip(olds, references, strict=True))
        ratios = self._log_ratios(numbered, unmasked, olds)
        return [
            self._one(number, group, samples, [next(scored) for _ in samples], None if ratios is None else [next(ratios) for _ in samples])
            for (number, group), samples in zip(numbered, unmasked, strict=True)
        ]  # fmt: skip

    def _log_ratios(
        self, numbered: Sequence[tuple[int, RolloutGroup]], groups: Sequence[Group], olds: Sequence[np.ndarray | None]
    ) -> Iterator[np.ndarray] | None:
        """log teacher − log policy, of each sample. Both from the same forward: a sampler's rounding is no lesson."""
        if not self._keys.teachers:
            return None
        corrected = self._keys.importance_sampling_correction != "off"
        own = [_known(old) for old in olds] if corrected else self._trainer.logp(groups)
        lessons = [(group.prompt, samples) for (_, group), samples in zip(numbered, groups, strict=True)]
        return iter([teacher - policy for teacher, policy in zip(self._teachers.logp(lessons), own, strict=True)])

    def _one(
        self, number: int, group: RolloutGroup, samples: Group,
        scored: Sequence[tuple[np.ndarray | None, np.ndarray | None]], log_ratios: list[np.ndarray] | None,
    ) -> _Made:  # fmt: skip
        keys, rows = self._keys, [reward_parts(rollout) for rollout in group.rollouts]
        lengths = [rollout.completion.num_sampled for rollout in group.rollouts]
        truncated = [rollout.completion.finish == "length" for rollout in group.rollouts]
        if keys.soft_overlong_cache:
            longest, cache = keys.max_completion_length, keys.soft_overlong_cache
            whole = [len(rollout.completion.ids) for rollout in group.rollouts]
            _append(rows, [soft_overlong_penalty(length, longest, cache) for length in whole])
        kls: list[float] = []
        if keys.kl_in_reward and keys.beta:
            # k1, summed over each completion.
            kls = [
                _total(s.behavior_logp if old is None else old) - _total(ref)
                for s, (old, ref) in zip(samples, scored, strict=True)
            ]
            _append(rows, [-keys.beta * self._controls.beta_scale * kl for kl in kls])
        kept = tuple(
            sample.untrained() if keys.mask_truncated_completions and cut
            else replace(sample, old_logp=old, ref_logp=None if keys.kl_in_reward else ref)
            for sample, (old, ref), cut in zip(samples, scored, truncated, strict=True)
        )  # fmt: skip
        if log_ratios is not None:
            log_ratios = [ratio[: s.num_loss_tokens] for s, ratio in zip(kept, log_ratios, strict=True)]
        counts = [rollout.reward.counts for rollout in group.rollouts]
        episodes = [rollout.completion.episode for rollout in group.rollouts if rollout.completion.episode is not None]
        played = [replace(episode, sampled=(), messages=()) for episode in episodes]
        return _Made(number, kept, rows, lengths, truncated, kls, counts, log_ratios, played)


def _count(groups: Sequence[Group]) -> int:
    return sum(len(group) for group in groups)


def _sample(group: RolloutGroup, rollout: Rollout) -> Sample:
    completion = rollout.completion
    ids = np.array((*group.prompt_ids, *completion.ids), np.int32)
    mask = np.arange(len(ids)) >= len(group.prompt_ids)
    logp = np.array(completion.logp, np.float32)
    versions = np.broadcast_to(np.array(completion.policy_versions or completion.policy_version, np.int32), logp.shape)
    if completion.episode is not None:
        sampled = np.array(completion.episode.sampled, np.bool_)
        mask[len(group.prompt_ids) :] = sampled
        logp, versions = logp[sampled], versions[sampled]
    return Sample(ids, mask, logp, policy_version=versions)


def _by_group(made: Sequence[_Made], advantage_B: torch.Tensor) -> Iterator[tuple[_Made, list[float]]]:
    parts = advantage_B.split([len(one.samples) for one in made])
    return ((one, part.tolist()) for one, part in zip(made, parts, strict=True))


def _of_tokens(
    of_tokens: Callable[..., torch.Tensor], advantage: float, log_ratio: np.ndarray, coef: float, clip: float
) -> np.ndarray:
    values_M = of_tokens(torch.tensor(advantage, dtype=torch.float64), torch.from_numpy(log_ratio).double(), coef, clip)
    return values_M.float().numpy()


def _gap(made: Sequence[_Made]) -> dict[str, float]:
    """log policy − log teacher, a mean over tokens: what is left of KL(policy‖teacher), as far as the samples tell it."""
    ratio_M = np.concatenate([ratio for one in made for ratio in one.log_ratios or ()])
    return {"teacher/gap": -float(ratio_M.mean(dtype=np.float64))} if ratio_M.size else {}


def _total(logp: np.ndarray | None) -> float:
    return sum(_known(logp).tolist())


def _known(logp: np.ndarray | None) -> np.ndarray:
    assert logp is not None
    return logp


def _metrics(
    made: Sequence[_Made], names: Sequence[str], rewards_BK: torch.Tensor, reward_B: torch.Tensor,
    zero_std_P: torch.Tensor,
) -> dict[str, float]:  # fmt: skip
    """Under TRL's names; over all ranks."""
    lengths = [length for one in made for length in one.lengths]
    ended = [n for one in made for n, cut in zip(one.lengths, one.truncated, strict=True) if not cut]
    kls = [kl for one in made for kl in one.kl]
    scored_B = reward_B[~reward_B.isnan()]
    metrics = {
        "reward": float(scored_B.mean()),
        "reward_std": _std(scored_B),
        "frac_reward_zero_std": float(zero_std_P.double().mean()),
        "frac_unscored": float(reward_B.isnan().double().mean()),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": 1.0 - len(ended) / len(lengths),
    }
    if ended:
        metrics |= {
            "completions/mean_terminated_length": sum(ended) / len(ended),
            "completions/min_terminated_length": float(min(ended)),
            "completions/max_terminated_length": float(max(ended)),
        }
    metrics |= opinion_metrics([counts for one in made for counts in one.counts])
    if episodes := [episode for one in made for episode in one.episodes]:
        metrics |= _episode_metrics(episodes)
    if kls:
        metrics |= {"kl_in_reward": sum(kls) / len(kls), "kl": sum(kls) / sum(lengths)}
    for name, column in zip(names, rewards_BK.unbind(1), strict=False):
        scored = column[~column.isnan()]
        metrics[f"rewards/{name}/mean"] = float(scored.mean())
        metrics[f"rewards/{name}/std"] = _std(scored)
    return metrics


def _component_metrics(
    names: Sequence[str], weights: Sequence[float], rewards_BK: torch.Tensor, reward_B: torch.Tensor, made: Sequence[_Made]
) -> dict[str, float]:  # fmt: skip
    """What each reward adds to the spread of their sum, and what it says of the length; shaping is what the shares leave to 1."""
    scored_B = ~reward_B.isnan()
    lengths = [float(n) for n, scored in zip((n for one in made for n in one.lengths), scored_B, strict=True) if scored]
    every = [*weights, *[1.0] * (rewards_BK.shape[1] - len(weights))]
    columns = [
        (w * column[scored_B].nan_to_num(0.0)).tolist() for w, column in zip(every, rewards_BK.unbind(1), strict=True)
    ]
    metrics = {
        "reward_length_information": mutual_information([sum(row) for row in zip(*columns, strict=True)], lengths)
    }
    shares = spread_shares(columns)
    for place, name in enumerate(names):
        if not rewards_BK[:, place].isnan().all():
            metrics[f"rewards/{name}/share"] = shares[place]
            metrics[f"rewards/{name}/length_information"] = mutual_information(columns[place], lengths)
    return metrics


def opinion_metrics(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`rewards/NAME/…` of judges: tokens as a sum, all else as a share of the verdicts asked for; and failures over all judges."""
    sums = Counter[str]()
    for one in counts:
        sums.update(one)
    metrics: dict[str, float] = {}
    for path, total in sums.items():
        name, _, what = path.rpartition("/")
        metrics[f"rewards/{path}"] = float(total if what in ("tokens", ASKED) else total / sums[f"{name}/{ASKED}"])
    asked = sum(total for path, total in sums.items() if path.endswith(f"/{ASKED}"))
    failed = sum(total for path, total in sums.items() if path.endswith(f"/{FAILED}"))
    return metrics | ({"judge/failed": failed / asked} if asked else {})


def _episode_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """TRL's names for tools; seconds are a mean over episodes of the time that their environment took."""
    num, calls = len(episodes), sum(episode.calls for episode in episodes)
    paid = [episode.env_reward for episode in episodes if episode.env_reward is not None]
    metrics = {
        "env/turns": sum(episode.turns for episode in episodes) / num,
        "time/env_s": sum(episode.env_s for episode in episodes) / num,
        "env/failed_ratio": sum(episode.error is not None for episode in episodes) / num,
        "tools/call_frequency": calls / num,
    }
    if calls:
        metrics["tools/failure_frequency"] = sum(episode.failed_calls for episode in episodes) / calls
    return metrics | ({"env/reward": sum(paid) / len(paid)} if paid else {})


def _std(values: torch.Tensor) -> float:
    """Sample std: 0 of a single value; NaN, which is written as null, of none."""
    return math.nan if not values.numel() else float(values.std()) if values.numel() > 1 else 0.0


def _append(rows: list[list[float | None]], values: Sequence[float]) -> None:
    """A column of shaping. A completion that could not be scored has none: shaping alone would make it count as scored."""
    for row, value in zip(rows, values, strict=True):
        row.append(None if all(part is None for part in row) else value)
