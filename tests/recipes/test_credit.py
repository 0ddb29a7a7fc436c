"""What tokens are credited with, of groups that are written down by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from posttrain.config.ppo import PPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.errors import ConfigError
from posttrain.objectives.advantages import as_rewards, combine
from posttrain.recipes.credit import GroupCredit, Made, Steps, step_rewards
from posttrain.recipes.critic import CriticCredit
from posttrain.recipes.experience.collector import steps_of
from posttrain.recipes.measure.learned import step_ends
from posttrain.types import Completion, Episode, RewardBreakdown, Rollout, Sample

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
    found = step_rewards(made, combine(rewards, rewards.new_tensor([1.0, 0.5])), GRPOKeys(**REQUIRED, **BY_TURN))
    assert found == [[0.5, None, 0.25], [None, 2.0], [1.0], [0.125, 0.0]]


def test_a_last_turn_that_nobody_paid_for_is_no_zero_among_what_turns_earned():
    """Worked by hand, centred and not scaled: R is 1, 0.5 and, of the episode that was never paid, 0; the mean 0.5. With a 0 for the first
    episode's last turn it would be 0.375."""
    alone = {"credit": "turn", "reward_funcs": ["environment"], "reward_weights": [1.0], "scale_rewards": "none"}
    played = [([2, 1], [1.0, None], [1.0]), ([1, 2], [0.5, None], [0.5]), ([1, 1], [None, None], [0.0])]
    made = [_group(*map(_made, played))]
    rewards = as_rewards([row for one in made for row in one.rewards])
    keys = GRPOKeys(**REQUIRED, **alone)
    assert step_rewards(made, combine(rewards, rewards.new_tensor([1.0])), keys) == [
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


BY_STEP = {
    "base_model": "m", "datasets": [{"path": "p.jsonl"}], "credit": "step", "reward_funcs": ["right", "model:./prm"],
    "reward_weights": [1.0, 0.5], "scale_rewards": "none",
}  # fmt: skip


def _answered(tokens, scores, right):
    """A sample of an answer in steps, what both rewards came to (the second the least of its steps), and its steps."""
    sample, *_ = _made((tokens, scores, []))
    return sample, [right, None if right is None else min(scores)], Steps(tuple(tokens), tuple(scores))


def _stepped(*each):
    samples, rewards, steps = zip(*each, strict=True)
    return Made(0, samples, list(rewards), [1] * len(each), [False] * len(each), [], [{}] * len(each), None, [], list(steps))  # fmt: skip


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_tokens_of_a_step_have_the_normalised_scores_of_it_and_of_all_later_ones(gamma):
    """By hand: half of each step's score, the last with the other reward too: R = 0.4 0.1+1 of one, 0.2 0.3 0.1+0 of the other; the mean
    is 0.42. Source: DeepSeekMath, arXiv 2402.03300 sec. 4.1.3; without γ there."""
    made = [_stepped(_answered([2, 1], [0.8, 0.2], 1.0), _answered([1, 2, 3], [0.4, 0.6, 0.2], 0.0))]
    credit = GroupCredit(GRPOKeys(**BY_STEP, gamma=gamma), None, None)
    found = credit.credited(made, 0, 0.0)
    g = gamma
    expected = [
        [*[-0.02 + g * 0.68] * 2, 0.68],
        [-0.22 + g * -0.12 + g * g * -0.32, *[-0.12 + g * -0.32] * 2, *[-0.32] * 3],
    ]
    for sample, advantages in zip(found.groups[0], expected, strict=True):
        np.testing.assert_allclose(sample.advantage, advantages, rtol=1e-6)
    assert found.metrics == {"env/paid_turns": 1.0}


def test_an_answer_whose_steps_could_not_be_scored_has_no_advantage_and_enters_no_mean():
    scored = [_answered([2, 1], [0.8, 0.2], 1.0), _answered([3], [0.4], 0.0)]
    lost = (_answered([4], [0.0], None)[0], [None, None], Steps((4,), (None,)))
    credit = GroupCredit(GRPOKeys(**BY_STEP), None, None)
    with_it, without = (credit.credited([_stepped(*rows)], 0, 0.0).groups[0] for rows in ([*scored, lost], scored))
    assert not with_it[2].advantage.any()
    assert [a.advantage.tolist() for a in with_it[:2]] == [b.advantage.tolist() for b in without]


def test_a_critic_is_told_of_each_step_s_score_at_its_last_token():
    made = [replace(_stepped(_answered([2, 1], [0.8, 0.2], 1.0)), said=[np.zeros(3, np.float32)])]
    credit = CriticCredit.__new__(CriticCredit)
    credit._keys = PPOKeys(
        **{k: v for k, v in BY_STEP.items() if k != "scale_rewards"}, gae_lambda=1.0, num_generations=1
    )
    (sample,) = credit.credited(made, 0, 0.0).groups[0]
    np.testing.assert_allclose(sample.returns, [1.5, 1.5, 1.1], rtol=1e-6)


def _rollout(text, steps, reward=0.5):
    completion = Completion(tuple(map(ord, text)), (-1.0,) * len(text), "stop", 0)
    return Rollout(completion, text, RewardBreakdown(reward, {"prm": reward}, steps={"prm": steps}))


def _decode(ids):
    return "".join(chr(id_) for id_ in ids if id_ != ord("$"))


def test_a_step_has_the_tokens_up_to_its_end_and_the_last_one_all_that_follows():
    """`$` is the end of the answer, which is not written."""
    assert step_ends("one\n\ntwo\n3", "\n") == [4, 9, 10]
    scores = list(zip(step_ends("one\n\ntwo\n3", "\n"), (0.9, 0.5, 0.1), strict=True))
    assert steps_of(_rollout("one\n\ntwo\n3$", scores), "prm", _decode) == Steps((4, 5, 2), (0.9, 0.5, 0.1))
    assert steps_of(_rollout("ab$", (), reward=None), "prm", _decode) == Steps((3,), (None,))
    with pytest.raises(ConfigError, match="credit: step: prm rates whole answers"):
        steps_of(_rollout("ab$", ()), "prm", _decode)


def test_a_step_has_no_token_that_was_put_in():
    """`two` and the break behind it interrupted the thought; what stands behind keeps its own step."""
    scores = list(zip(step_ends("one\n\ntwo\n\n3", "\n\n"), (0.9, 0.5, 0.1), strict=True))
    for inserted, tokens in (((5, 10), (5, 0, 2)), ((3, 7), (3, 3, 2))):
        rollout = _rollout("one\n\ntwo\n\n3$", scores)
        rollout = replace(rollout, completion=replace(rollout.completion, inserted=inserted))
        found = steps_of(rollout, "prm", _decode)
        assert found.tokens == tokens and sum(found.tokens) == rollout.completion.num_sampled
        unrated = replace(rollout, reward=RewardBreakdown(None, {"prm": None}))
        assert steps_of(unrated, "prm", _decode).tokens == (sum(tokens),)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"reward_funcs": ["right"], "reward_weights": None}, "credit: step with 0 times model: in reward_funcs"),
        ({"reward_funcs": ["model:a", "model:b"]}, "credit: step with 2 times model: in reward_funcs"),
        ({"env": "env.py:Env"}, "credit: step with env"),
        ({"advantage_estimator": "rloo"}, "credit: step is defined on advantage_estimator: group"),
    ],
)
def test_credit_by_step_wants_one_model_that_rates_them(more, why):
    with pytest.raises(ValueError, match=why):
        GRPOKeys(**BY_STEP | more)
