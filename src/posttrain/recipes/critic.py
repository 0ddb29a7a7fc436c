"""A critic: a model with a value head that is trained beside the policy, and the advantages that it makes of rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from posttrain.config.ppo import PPOKeys
from posttrain.errors import ModelError
from posttrain.health.controls import Controls
from posttrain.models.batch import pack
from posttrain.models.load import load_config, load_policy, load_tokenizer
from posttrain.models.policy import Policy
from posttrain.models.vocabulary import vocabulary_digest
from posttrain.names import STAGE
from posttrain.objectives.advantages import as_rewards, combine, gae_advantage, whitened
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import LossTerms
from posttrain.objectives.value import explained_variance, value_loss
from posttrain.protocols import Ranks
from posttrain.recipes.credit import Credited, Made, column_weights, credited_steps, known, paid_share, step_rewards
from posttrain.recipes.experience.sampled import Numbered
from posttrain.recipes.optim import make_optimizer
from posttrain.recipes.policy_step import stream
from posttrain.recipes.run.train_state import Learner
from posttrain.recipes.scorers import ValueScorer
from posttrain.rollout.experience import Group
from posttrain.types import Sample

_CLIPPED_TOKEN_MEAN = "dapo"
"""The row of `POLICY_LOSSES` that is arXiv 1707.06347 eq. 7, a mean over tokens."""


def ppo_objective(keys: PPOKeys) -> PolicySpec:
    """PPO's loss of the policy. Raises: ConfigError for what it is not defined for."""
    taken = {field.name for field in fields(PolicySpec)} & type(keys).model_fields.keys()
    return PolicySpec(loss_type=_CLIPPED_TOKEN_MEAN, **{name: getattr(keys, name) for name in taken})


def load_critic(keys: PPOKeys, policy: Policy) -> Learner:
    """`value_model`, or the policy's base under a head that says 0. Raises: ModelError for another vocabulary."""
    own = keys.critic
    assert not (keys.value_model or "").startswith(STAGE), (
        "the pipeline puts the folder of a stage in the place of its name"
    )
    refuse_other_critic(keys, policy.tokenizer)
    critic = load_policy(own, tokenizer=policy.tokenizer, sharding=policy.sharding).without_dropout()
    if not any("ForSequenceClassification" in name for name in load_config(own).architectures or ()):
        # What a random head says would be noise in the first advantages.
        head: torch.nn.Linear = critic.base.score  # pyright: ignore[reportAssignmentType]
        critic.sharding.local(head.weight).data.zero_()
    return Learner(critic, make_optimizer(critic, own))


def refuse_other_critic(keys: PPOKeys, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ModelError for a given `value_model` that reads other tokens; that of an earlier stage is not there yet."""
    if keys.value_model is None or keys.value_model.startswith(STAGE):
        return
    if vocabulary_digest(load_tokenizer(keys.critic)) != vocabulary_digest(tokenizer):
        raise ModelError(
            f"value_model: {keys.value_model} has another vocabulary than the policy, so it would read other tokens; expected a "
            "reward model or critic trained from a model with the policy's tokenizer"
        )


def critic_loss(
    critic: Policy, groups: Sequence[Group], cliprange_value: float | None, norm: Normalizer
) -> LossTerms:  # fmt: skip
    """This micro-batch's share of the step's value loss."""
    samples = [sample for group in groups for sample in group]
    value_M = critic.rewards(pack(groups))
    old_M, return_M = (stream(samples, name, value_M.device) for name in ("value", "returns"))
    return value_loss(value_M, old_M, return_M, cliprange_value, norm)


class CriticCredit:
    """A `Credit`: generalised advantages over the values of a critic, whitened over the generation batch.

    The reward of a completion comes at its last trained token, the KL to the reference at each. One that could not be scored is
    not trained on. A group teaches whatever its rewards are: it has no part in the baseline.
    """

    def __init__(self, keys: PPOKeys, critic: Learner, ranks: Ranks) -> None:
        self._keys, self.critic = keys, critic
        self._scorer = ValueScorer(critic.policy, keys.per_device_train_batch_size, ranks)
        self.objective = ppo_objective(keys)

    def opinions(
        self, numbered: Sequence[Numbered], groups: Sequence[Group], olds: Sequence[np.ndarray | None]
    ) -> Iterator[np.ndarray] | None:
        return iter(self._scorer.values(groups))

    def credited(self, made: Sequence[Made], generation: int, beta: float) -> Credited:
        rewards_BK = as_rewards([row for one in made for row in one.rewards])
        weights = torch.tensor(column_weights(self._keys, rewards_BK.shape[1]), dtype=torch.float64)
        reward_B = combine(rewards_BK, weights)
        samples = [
            replace(sample, value=value) if scored else replace(sample, value=value).untrained()
            for (sample, value), scored in zip(_valued(made), (~reward_B.isnan()).tolist(), strict=True)
        ]
        paid = [self._paid(sample, reward, beta) for sample, reward in zip(samples, reward_B.tolist(), strict=True)]
        metrics: dict[str, float] = {}
        if self._keys.credit != "episode":
            earned = step_rewards(made, reward_B, self._keys)
            metrics = paid_share(earned)
            each = zip(paid, earned, credited_steps(made, self._keys), reward_B.tolist(), strict=True)
            for paid_T, rewards, steps, reward in each:
                if self._keys.credit == "step" and len(paid_T):  # all scores are paid, not their aggregate
                    paid_T[-1] += sum(one or 0.0 for one in rewards) - reward
                _advance(paid_T, rewards, steps.tokens)
        found = _estimated(samples, paid, self._keys)
        each = iter(
            replace(sample, advantage=advantage, returns=returns, ref_logp=None if self._keys.kl_in_reward else sample.ref_logp)
            for sample, advantage, returns in zip(samples, found.advantages, found.returns, strict=True)
        )  # fmt: skip
        groups = tuple(tuple(next(each) for _ in one.samples) for one in made)
        return Credited(groups, rewards_BK, reward_B, None, found.metrics | metrics)

    def teaches(self, group: Group, controls: Controls) -> bool:
        return any(sample.num_loss_tokens for sample in group)

    def _paid(self, sample: Sample, reward: float, beta: float) -> torch.Tensor:
        """What each trained token earns. Shape: [T] float64."""
        paid_T = torch.zeros(sample.num_loss_tokens, dtype=torch.float64)
        if self._keys.pays_kl:
            own = known(sample.behavior_logp if sample.old_logp is None else sample.old_logp)
            paid_T -= beta * torch.from_numpy(own.astype(np.float64) - known(sample.ref_logp).astype(np.float64))
        if len(paid_T):
            paid_T[-1] += reward
        return paid_T


def _advance(paid_T: torch.Tensor, turns: Sequence[float | None], turn_tokens: Sequence[int]) -> None:
    """Give what earlier turns earned at the last token of each, not of all."""
    if len(paid_T):
        for reward, end in zip(turns[:-1], np.cumsum(turn_tokens), strict=False):
            paid_T[end - 1] += reward or 0.0
            paid_T[-1] -= reward or 0.0


@dataclass(frozen=True, slots=True)
class _Estimated:
    """Per sample, one number a trained token; over all of them, metrics."""

    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    metrics: dict[str, float]


def _estimated(samples: Sequence[Sample], paid: Sequence[torch.Tensor], keys: PPOKeys) -> _Estimated:
    lengths = [len(one) for one in paid]
    there_BT = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    value_BT = pad_sequence([torch.from_numpy(known(s.value).astype(np.float64)) for s in samples], batch_first=True)
    advantage_BT = gae_advantage(pad_sequence(list(paid), batch_first=True), value_BT, keys.gamma, keys.gae_lambda)
    advantage_M, value_M = advantage_BT[there_BT], value_BT[there_BT]
    return_M = advantage_M + value_M
    metrics = {}
    if len(return_M):
        metrics = {"critic/values/mean": float(value_M.mean()), "critic/returns/mean": float(return_M.mean())}
    if (explained := explained_variance(value_M, return_M)) is not None:
        metrics["critic/vf_explained_var"] = explained
    split = [x_M.float().split(lengths) for x_M in (whitened(advantage_M), return_M)]
    advantages, returns = ([part.numpy() for part in parts] for parts in split)
    return _Estimated(advantages, returns, metrics)


def _valued(made: Sequence[Made]) -> Iterator[tuple[Sample, np.ndarray]]:
    for one in made:
        assert one.said is not None, "a critic has an opinion of every sample"
        yield from zip(one.samples, one.said, strict=True)
