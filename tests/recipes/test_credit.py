"""What tokens are credited with, of groups that are written down by hand."""

import math

import numpy as np
import pytest

from posttrain.config.ppo import PPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.objectives.advantages import as_rewards, combine
from posttrain.recipes.credit import GroupCredit, Made, turn_rewards
from posttrain.recipes.critic import CriticCredit
from posttrain.types import Episode, Sample

REQUIRED = {"base_model": "m", "datasets": [{"path": "p.jsonl"}], "env": "env.py:Env"}
BY_TURN = {"credit": "turn", "reward_funcs": ["right", "environment"], "reward_weights": [1.0, 0.5]}
TURNS = {
    "paid on the way": ([2, 1, 3], [1.0, None, 0.5], [0.0, 1.5]),
    "paid at the end": ([1, 4], [None, 2.0], [1.0, 2.0]),
    "never paid": ([2], [None], [1.0, 0.0]),
    "cut before it was paid": ([3, 2], [0.25, None], [0.0, 0.25]),
}
"""Tokens of each turn, what the environment paid for it, and what both rewards came to."""


def _made(played, scored=True, trained=True):
    lengths, paid, rewards = played
    size = sum(lengths)
    ids = np.arange(size + 2, dtype=np.int32)
    sample = Sample(ids, np.arange(size + 2) >= 2, np.full(size, -1.0, np.float32))
    episode = Episode((True,) * size, (), len(lengths), turn_tokens=tuple(lengths), turn_rewards=tuple(paid))
    return sample if trained else sample.untrained(), list(rewards) if scored else [None, None], episode


def _group(*each, number=0, said=None):
    samples, rewards, episodes = zip(*each, strict=True)
    lengths = [int(s.loss_mask.sum()) for s in samples]
    return Made(
        number, samples, list(rewards), lengths, [False] * len(each), [], [{}] * len(each), said, list(episodes)
    )


def _credited(made, **more):
    return GroupCredit(GRPOKeys(**REQUIRED, **{**BY_TURN, **more}), None, None).credited(made, 0, 0.0)


def test_what_a_turn_earned_is_what_the_environment_paid_for_it_and_the_last_one_earned_the_rest():
    made = [_group(*map(_made, TURNS.values()))]
    rewards = as_rewards([row for one in made for row in one.rewards])
    found = turn_rewards(made, combine(rewards, rewards.new_tensor([1.0, 0.5])), GRPOKeys(**REQUIRED, **BY_TURN))
    assert found == [[0.5, None, 0.25], [None, 2.0], [1.0], [0.125, 0.0]]


def test_a_last_turn_that_nobody_paid_for_is_no_zero_among_what_turns_earned():
    """Worked by hand, centred and not scaled: R is 1, 0.5 and, of the episode that was never paid, 0; the mean 0.5. With a 0 for the first
    episode's last turn it would be 0.375."""
    alone = {"credit": "turn", "reward_funcs": ["environment"], "reward_weights": [1.0], "scale_rewards": "none"}
    played = [([2, 1], [1.0, None], [1.0]), ([1, 2], [0.5, None], [0.5]), ([1, 1], [None, None], [0.0])]
    made = [_group(*map(_made, played))]
    rewards = as_rewards([row for one in made for row in one.rewards])
    keys = GRPOKeys(**REQUIRED, **alone)
    assert turn_rewards(made, combine(rewards, rewards.new_tensor([1.0])), keys) == [
        [1.0, None],
        [0.5, None],
        [None, 0.0],
    ]
    (group,) = GroupCredit(keys, None, None).credited(made, 0, 0.0).groups
    assert [sample.advantage.tolist() for sample in group] == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [-0.5, -0.5]]


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_tokens_of_a_turn_have_what_it_and_later_ones_earned_against_all_turns_of_the_group(gamma):
    (group,) = _credited([_group(*map(_made, TURNS.values()))], gamma=gamma, advantage_eps=0.1).groups
    earned = [[0.5, None, 0.25], [None, 2.0], [1.0], [0.125, 0.0]]
    flat = [x for turns in earned for x in turns if x is not None]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    for sample, (lengths, *_), turns in zip(group, TURNS.values(), earned, strict=True):
        expected = []
        for k, length in enumerate(lengths):
            later = [(j, x) for j, x in enumerate(turns) if j >= k and x is not None]
            expected += [sum(gamma ** (j - k) * (x - mean) / (std + 0.1) for j, x in later)] * length
        np.testing.assert_allclose(sample.advantage, expected, rtol=1e-6)


def test_where_only_last_turns_are_paid_each_turn_has_the_advantage_of_the_episode_to_the_bit():
    ends = [_made(([2, 1], [None, paid], [right, paid])) for right, paid in ((0, 1.0), (1, 0.3), (1, 0.0), (0, 0.7))]
    lost = _made(TURNS["paid on the way"], scored=False)
    made = [_group(*ends, lost), _group(*ends[:2], number=1)]
    for scale in ("group", "batch", "none"):
        by_turn, by_episode = (_credited(made, credit=credit, scale_rewards=scale) for credit in ("turn", "episode"))
        for one, other in zip(by_turn.groups, by_episode.groups, strict=True):
            for a, b in zip(one, other, strict=True):
                assert np.array_equal(a.advantage, b.advantage)
    assert by_turn.metrics == {"env/paid_turns": 6 / 15}


def test_an_episode_that_is_not_scored_or_not_trained_on_has_no_advantage():
    played = list(TURNS.values())
    lost, masked = _made(played[0], scored=False), _made(played[1], trained=False)
    (group,) = _credited([_group(lost, masked, *map(_made, played[2:]))]).groups
    assert not group[0].advantage.any() and len(group[1].advantage) == 0
    assert group[2].advantage.any()


def test_a_critic_is_told_of_each_turn_s_earnings_at_its_last_token():
    made = [
        _group(*map(_made, TURNS.values()), said=[np.zeros(sum(lengths), np.float32) for lengths, *_ in TURNS.values()])
    ]
    keys = PPOKeys(**REQUIRED, **BY_TURN, gae_lambda=1.0, num_generations=4)
    credit = CriticCredit.__new__(CriticCredit)
    credit._keys = keys
    by_turn = credit.credited(made, 0, 0.0)
    assert [sample.returns.tolist() for sample in by_turn.groups[0]] == [
        [0.75, 0.75, 0.25, 0.25, 0.25, 0.25],
        [2.0] * 5,
        [1.0, 1.0],
        [0.125, 0.125, 0.125, 0.0, 0.0],
    ]
    credit._keys = keys.model_copy(update={"credit": "episode"})
    at_the_end = credit.credited(made, 0, 0.0)
    assert at_the_end.groups[0][0].returns.tolist() == [0.75] * 6
    assert np.array_equal(at_the_end.groups[0][1].returns, by_turn.groups[0][1].returns)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"env": None}, "credit: turn with no env"),
        ({"reward_funcs": ["right"], "reward_weights": None}, r"credit: turn with reward_funcs: \[right\].*name `environment` once"),
        ({"loss_type": "rloo"}, "defined on advantage_estimator: group .* got loss_type: rloo"),
        ({"advantage_estimator": "maxrl"}, "got advantage_estimator: maxrl"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "got .*normalize_then_sum"),
    ],
)  # fmt: skip
def test_what_turns_cannot_be_credited_with_is_refused(more, said):
    with pytest.raises(ValueError, match=said):
        GRPOKeys(**{**REQUIRED, **BY_TURN, **more})
