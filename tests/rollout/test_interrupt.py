"""Interrupted thoughts: what is put in where, that nothing of it is trained on, and that all else is as the engine samples it."""

import numpy as np
import pytest

from posttrain.recipes.experience.collector import _sample
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.interrupt import InterruptedEngine, Interruption
from posttrain.types import Prompt, Request, RewardBreakdown, Rollout, RolloutGroup, SamplingParams, in_order

PHRASE = (11, 12, 13)
PARAMS = SamplingParams(max_tokens=16)
REQUESTS = [Request((5, 6, 7), seed) for seed in range(12)]


@pytest.fixture
def engine(shared_policy):
    return EmbeddedEngine(shared_policy("llama"), stop_token_ids=range(40))


def _interrupted(engine, budget=5, spread=0, has_ended=lambda ids: False, phrase=PHRASE):
    return InterruptedEngine(engine, Interruption(budget, spread, phrase, has_ended))


def test_a_thought_is_cut_at_its_budget_and_goes_on_behind_the_phrase(engine):
    free = in_order(engine.generate(REQUESTS, PARAMS))
    found = in_order(_interrupted(engine).generate(REQUESTS, PARAMS))
    cut = [one for one in found if one.inserted]
    assert 0 < len(cut) < len(found)
    for one, alone in zip(found, free, strict=True):
        if len(alone.ids) <= 5 and alone.finish == "stop":
            assert one == alone
            continue
        assert one.inserted == (5, 8) and one.ids[:5] == alone.ids[:5] and one.ids[5:8] == PHRASE
        assert one.logp[:5] == alone.logp[:5] and one.logp[5:8] == (0.0,) * 3
        assert len(one.ids) == len(one.logp) <= 16 and one.num_sampled == len(one.ids) - 3
        assert (one.finish == "length") == (len(one.ids) == 16 and one.ids[-1] >= 40)


def test_what_is_sampled_behind_the_phrase_has_the_log_probs_of_the_whole(engine):
    for one in _interrupted(engine).generate(REQUESTS, PARAMS):
        (scored,) = engine.score([((5, 6, 7, *one.ids), 3)])
        sampled = one.sampled or (True,) * len(one.ids)
        ours, theirs = (np.array(values)[np.array(sampled)] for values in (one.logp, scored))
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_nothing_that_was_put_in_is_trained_on(engine):
    one = next(one for one in _interrupted(engine).generate(REQUESTS, PARAMS) if one.inserted)
    rollout = Rollout(one, "", RewardBreakdown(1.0, {}))
    sample = _sample(RolloutGroup(Prompt(origin=None, prompt=""), (5, 6, 7), (rollout,)), rollout)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert sample.loss_mask[3:].tolist() == [not 5 <= place < 8 for place in range(len(one.ids))]
    assert sample.num_loss_tokens == one.num_sampled == len(sample.behavior_logp)  # pyright: ignore[reportArgumentType]


def test_a_thought_that_has_ended_is_not_interrupted(engine):
    found = list(_interrupted(engine, has_ended=lambda ids: True).generate(REQUESTS, PARAMS))
    assert all(not one.inserted and one.sampled is None for one in found)
    assert any(len(one.ids) > 5 for one in found)


def test_budgets_are_spread_by_the_seed_of_each(engine):
    asked = _interrupted(engine, budget=6, spread=3)
    places = {one.request: one.inserted[0] for one in asked.generate(REQUESTS, PARAMS) if one.inserted}
    assert set(places.values()) <= {3, 4, 5, 6} and len(set(places.values())) > 1
    again = {one.request: one.inserted[0] for one in asked.generate(REQUESTS[:6], PARAMS) if one.inserted}
    assert again == {place: at for place, at in places.items() if place < 6}


def test_a_phrase_that_fills_what_is_left_ends_the_completion(engine):
    short = [Request((5, 6, 7), seed, 7) for seed in range(12)]
    cut = [one for one in _interrupted(engine).generate(short, PARAMS) if one.inserted]
    assert cut and all(one.ids[5:] == PHRASE[:2] and one.finish == "length" for one in cut)
