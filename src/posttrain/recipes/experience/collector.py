"""Makes a generation batch: completions with their log-probs and advantages, ready to be trained on, once or several times."""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from posttrain.config.rl import PolicyGradientKeys, RewardedKeys
from posttrain.errors import ConfigError
from posttrain.health.controls import Controls
from posttrain.names import reward_names
from posttrain.objectives.advantages import soft_overlong_penalty
from posttrain.protocols import Ranks, Scorer
from posttrain.recipes.credit import Credit, Credited, Made, Steps, append, column_weights, known
from posttrain.recipes.experience.sampled import Sampled, reward_parts
from posttrain.recipes.metrics import length_metrics
from posttrain.rewards.learned import ASKED, FAILED
from posttrain.rewards.measures import mutual_information, spread_shares
from posttrain.rollout.experience import Experience, Group
from posttrain.types import Decode, Episode, Rollout, RolloutGroup, Sample


@dataclass(frozen=True, slots=True)
class Collected:
    """A generation batch with what was seen of it: this rank's groups with their texts, the prompts' ledger, seconds."""

    experience: Experience
    groups: tuple[RolloutGroup, ...]
    ledger: Mapping[str, list[int]]
    wall_s: float


class Sampling(Protocol):
    """Gives the scored groups of one generation batch after the other."""

    def sampled(self, generation: int, previous: Experience | None, controls: Controls) -> Sampled: ...

    def close(self) -> None: ...


class Collector:
    """Makes experience of what `sampling` gives it: scores, lets `credit` give advantages over all ranks. `reference` is asked only where the keys say so."""

    def __init__(
        self, keys: RewardedKeys, sampling: Sampling, trainer: Scorer, reference: Scorer, credit: Credit, ranks: Ranks,
        decode: Decode | None = None,
    ) -> None:  # fmt: skip
        self._keys, self._sampling, self._decode = keys, sampling, decode
        self._trainer, self._reference, self._credit, self._ranks = trainer, reference, credit, ranks
        self._names = reward_names(keys.reward_funcs)

    def collect(self, generation: int, previous: Experience | None, controls: Controls) -> Collected:
        """Generation batch number `generation`, from where the run's endless shuffled prompts were left by the `previous` one."""
        started = time.monotonic()
        sampled = self._sampling.sampled(generation, previous, controls)
        # In the order of one process: how groups are split over the steps of a batch must not depend on the ranks.
        made = sorted(
            (one for rank in self._ranks.gather(self._made(sampled.kept)) for one in rank),
            key=lambda one: one.number,
        )
        credited = self._credit.credited(made, generation, self._keys.beta * controls.beta_scale)
        # Every prompt group is issued once and either trained on or let go; counted along the surviving weights.
        numbered = zip(made, credited.groups, strict=True)
        trained = [one.number for one, group in numbered if self._credit.teaches(group, controls)]
        ledger = {"issued": sampled.issued, "trained": trained, "passed_over": sampled.passed_over}
        weights = column_weights(self._keys, credited.rewards_BK.shape[1])
        metrics = (
            _metrics(made, self._names, credited)
            | _component_metrics(self._names, weights, credited.rewards_BK, credited.reward_B, made)
            | sampled.shares
            | sampled.metrics
            | credited.metrics
        )
        if self._keys.dynamic_sampling:
            metrics["sampling/rounds"] = float(sampled.rounds)
        if controls.resample:
            metrics["sampling/passed_over"] = float(len(sampled.passed_over))
        experience = Experience(generation, sampled.next_prompt, credited.groups, metrics, sampled.reward_bounds)
        shown = tuple(group for _, group in sampled.kept)
        return Collected(experience, shown, ledger, time.monotonic() - started)

    # --- samples and rewards -----------------------------------------------------------------------------------

    def _made(self, numbered: Sequence[tuple[int, RolloutGroup]]) -> list[Made]:
        """This rank's groups, scored by whoever the objective asks."""
        keys = self._keys
        unmasked = [tuple(_sample(group, rollout) for rollout in group.rollouts) for _, group in numbered]
        references = self._reference.logp(unmasked) if keys.asks_reference else [None] * _count(unmasked)
        # The embedded engine's log-probs are the trainer's own; another sampler's are corrected for.
        olds = self._trainer.logp(unmasked) if keys.asks_trainer else [None] * _count(unmasked)
        scored = iter(zip(olds, references, strict=True))
        said = self._credit.opinions(numbered, unmasked, olds)
        return [
            self._one(number, group, samples, [next(scored) for _ in samples], None if said is None else [next(said) for _ in samples])
            for (number, group), samples in zip(numbered, unmasked, strict=True)
        ]  # fmt: skip

    def _one(
        self, number: int, group: RolloutGroup, samples: Group,
        scored: Sequence[tuple[np.ndarray | None, np.ndarray | None]], said: list[np.ndarray] | None,
    ) -> Made:  # fmt: skip
        keys, rows = self._keys, [reward_parts(rollout) for rollout in group.rollouts]
        lengths = [rollout.completion.num_sampled for rollout in group.rollouts]
        truncated = [rollout.completion.finish == "length" for rollout in group.rollouts]
        if keys.soft_overlong_cache:
            longest, cache = keys.max_completion_length, keys.soft_overlong_cache
            whole = [len(rollout.completion.ids) for rollout in group.rollouts]
            append(rows, [soft_overlong_penalty(length, longest, cache) for length in whole])
        if (penalty := keys.missing_eos_penalty) is not None:
            append(rows, [-penalty if cut else 0.0 for cut in truncated])
        kls: list[float] = []
        if keys.pays_kl:
            # k1, summed over each completion.
            kls = [
                _total(s.behavior_logp if old is None else old) - _total(ref)
                for s, (old, ref) in zip(samples, scored, strict=True)
            ]
        filled = [replace(s, old_logp=old, ref_logp=ref) for s, (old, ref) in zip(samples, scored, strict=True)]
        kept = tuple(
            sample.untrained() if keys.mask_truncated_completions and cut else sample
            for sample, cut in zip(filled, truncated, strict=True)
        )
        if said is not None:
            said = [values[: s.num_loss_tokens] for s, values in zip(kept, said, strict=True)]
        counts = [rollout.reward.counts for rollout in group.rollouts]
        episodes = [rollout.completion.episode for rollout in group.rollouts if rollout.completion.episode is not None]
        played = [replace(episode, sampled=(), messages=()) for episode in episodes]
        cut = [bool(rollout.completion.inserted) for rollout in group.rollouts] if keys.thinking_budget else []
        return Made(number, kept, rows, lengths, truncated, kls, counts, said, played, self._steps(group), cut)

    def _steps(self, group: RolloutGroup) -> list[Steps]:
        if not (isinstance(self._keys, PolicyGradientKeys) and self._keys.credit == "step"):
            return []
        assert self._decode is not None, "credit by step is given what decodes"
        name, decode = self._names[self._keys.paying_step], self._decode
        return [steps_of(rollout, name, decode) for rollout in group.rollouts]


def steps_of(rollout: Rollout, reward: str, decode: Decode) -> Steps:
    """The sampled tokens up to the character at which each step ends; those behind the last step are its own, the end of the answer among them.

    Raises: ConfigError where the reward rates no steps.
    """
    scores, completion = rollout.reward.steps.get(reward, ()), rollout.completion
    ids, sampled = completion.ids, completion.sampled or (True,) * len(completion.ids)
    if not scores:
        if rollout.status == "scored":
            raise ConfigError(
                f"credit: step: {reward} rates whole answers; name a process reward model, or set credit: episode"
            )
        return Steps((completion.num_sampled,), (None,))
    ends = [
        bisect.bisect_left(range(len(ids)), end, key=lambda num: len(decode(ids[:num]))) for end, _ in list(scores)[:-1]
    ]
    tokens = tuple(sum(sampled[begin:stop]) for begin, stop in pairwise((0, *ends, len(ids))))
    return Steps(tokens, tuple(score for _, score in scores))


def _count(groups: Sequence[Group]) -> int:
    return sum(len(group) for group in groups)


def _sample(group: RolloutGroup, rollout: Rollout) -> Sample:
    completion = rollout.completion
    ids = np.array((*group.prompt_ids, *completion.ids), np.int32)
    mask = np.arange(len(ids)) >= len(group.prompt_ids)
    logp = np.array(completion.logp, np.float32)
    versions = np.broadcast_to(np.array(completion.policy_versions or completion.policy_version, np.int32), logp.shape)
    routed = completion.routed_experts
    if completion.sampled is not None:
        sampled = np.array(completion.sampled, np.bool_)
        mask[len(group.prompt_ids) :] = sampled
        logp, versions = logp[sampled], versions[sampled]
        routed = None if routed is None else routed[sampled]
    return Sample(ids, mask, logp, policy_version=versions, routed_experts=routed)


def _total(logp: np.ndarray | None) -> float:
    return sum(known(logp).tolist())


def _metrics(made: Sequence[Made], names: Sequence[str], credited: Credited) -> dict[str, float]:
    """Under TRL's names; over all ranks."""
    rewards_BK, reward_B = credited.rewards_BK, credited.reward_B
    lengths = [length for one in made for length in one.lengths]
    ended = [n for one in made for n, cut in zip(one.lengths, one.truncated, strict=True) if not cut]
    kls = [kl for one in made for kl in one.kl]
    scored_B = reward_B[~reward_B.isnan()]
    metrics = {
        "reward": float(scored_B.mean()),
        "reward_std": _std(scored_B),
        "frac_unscored": float(reward_B.isnan().double().mean()),
        **length_metrics(lengths, len(lengths) - len(ended)),
    }
    if credited.zero_std_P is not None:
        metrics["frac_reward_zero_std"] = float(credited.zero_std_P.double().mean())
    if ended:
        metrics |= {
            "completions/mean_terminated_length": sum(ended) / len(ended),
            "completions/min_terminated_length": float(min(ended)),
            "completions/max_terminated_length": float(max(ended)),
        }
    if any(one.interrupted for one in made):
        metrics["completions/interrupted_ratio"] = sum(flag for one in made for flag in one.interrupted) / len(lengths)
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
    names: Sequence[str], weights: Sequence[float], rewards_BK: torch.Tensor, reward_B: torch.Tensor, made: Sequence[Made]
) -> dict[str, float]:  # fmt: skip
    """What each reward adds to the spread of their sum, and what it says of the length; shaping is what the shares leave to 1."""
    scored_B = ~reward_B.isnan()
    lengths = [float(n) for n, scored in zip((n for one in made for n in one.lengths), scored_B, strict=True) if scored]
    columns = [
        (w * column[scored_B].nan_to_num(0.0)).tolist() for w, column in zip(weights, rewards_BK.unbind(1), strict=True)
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
    metrics = _measured(episodes) | {
        "env/turns": sum(episode.turns for episode in episodes) / num,
        "time/env_s": sum(episode.env_s for episode in episodes) / num,
        "env/failed_ratio": sum(episode.error is not None for episode in episodes) / num,
        "tools/call_frequency": calls / num,
    }
    if calls:
        metrics["tools/failure_frequency"] = sum(episode.failed_calls for episode in episodes) / calls
    return metrics | ({"env/reward": sum(paid) / len(paid)} if paid else {})


def _measured(episodes: Sequence[Episode]) -> dict[str, float]:
    """`env/NAME` of what the environment measured: a mean over the episodes in which it did."""
    names = sorted({name for episode in episodes for name in episode.env_metrics})
    values = {name: [e.env_metrics[name] for e in episodes if name in e.env_metrics] for name in names}
    return {f"env/{name}": sum(found) / len(found) for name, found in values.items()}


def _std(values: torch.Tensor) -> float:
    """Sample std: 0 of a single value; NaN, which is written as null, of none."""
    return math.nan if not values.numel() else float(values.std()) if values.numel() > 1 else 0.0
