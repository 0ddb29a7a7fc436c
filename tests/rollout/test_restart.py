"""An engine that is gone in the middle comes back with its weights, and answers what it had not answered."""

from functools import partial

import pytest

from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.canary import check_arrival
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.rollout.restart import RestartedEngine
from posttrain.types import Request, SamplingParams, in_order

REQUESTS = [Request((5, 9, n), seed) for n in range(3) for seed in range(2)]
PARAMS = SamplingParams(max_tokens=5)


class Mortal(EmbeddedEngine):
    """Ours, gone after so many completions, scores or updates; a canary takes four."""

    def __init__(self, policy, deaths, made):
        super().__init__(policy, stop_token_ids=(), batch_size=2)
        self.deaths, self.closed, self.asked = deaths, False, []
        made.append(self)

    def _die(self, at):
        if at in self.deaths:
            if not self.deaths[at]:
                raise EngineGoneError(f"gone in {at}")
            self.deaths[at] -= 1

    def generate(self, requests, params):
        self.asked.append(list(requests))
        return self._mortal(super().generate(requests, params))

    def _mortal(self, completions):
        for completion in completions:
            self._die("generate")
            yield completion

    def score(self, sequences, temperature=1.0):
        self._die("score")
        return super().score(sequences, temperature)

    def update(self, weights, version):
        self._die("update")
        return super().update(weights, version)

    def close(self):
        self.closed = True


@pytest.fixture
def started(shared_policy):
    """`started(deaths, …)`: an engine that is started again, and the list of those that were made."""
    policy = shared_policy("qwen3")

    def start(*deaths, max_restarts=2, check=None):
        left, made = iter(deaths), []
        check = check or (lambda engine, weights: check_arrival(engine, partial(score_sequences, weights)))
        engine = RestartedEngine(lambda: Mortal(policy, dict(next(left, {})), made), check, max_restarts)
        return engine, made

    return start


def test_every_request_is_answered_once_and_as_if_nothing_had_happened(started, shared_policy):
    engine, made = started({"generate": 2}, {"generate": 4 + 1})
    engine.update(shared_policy("qwen3"), 3)
    found = list(engine.generate(REQUESTS, PARAMS))
    untouched, _ = started()
    untouched.update(shared_policy("qwen3"), 3)
    assert sorted(c.request for c in found) == list(range(len(REQUESTS)))
    expected = in_order(untouched.generate(REQUESTS, PARAMS))
    assert [(c.ids, c.finish, c.policy_version) for c in in_order(found)] == [(c.ids, c.finish, 3) for c in expected]
    assert [one.policy_version for one in made] == [3] * 3
    assert [one.closed for one in made] == [True, True, False]
    assert engine.restarts == 2


def test_what_was_given_out_is_not_asked_again(started):
    engine, made = started({"generate": 2})
    given = []
    for completion in engine.generate(REQUESTS, PARAMS):
        given.append(completion.request)
    again = made[1].asked[-1]
    assert len(again) == len(REQUESTS) - 2
    assert not {REQUESTS[n] for n in given[:2]} & set(again)


def test_it_comes_back_when_it_scores_and_when_it_takes_weights(started, shared_policy):
    engine, made = started({"update": 0}, {"score": 0})
    assert engine.update(shared_policy("qwen3"), 5).num_bytes == 0
    assert engine.score([((5, 6, 7), 1)]) == made[-1].score([((5, 6, 7), 1)])
    assert (engine.policy_version, engine.restarts) == (5, 2)


def test_after_the_last_restart_the_error_is_the_last_ones(started):
    engine, made = started({"generate": 0}, {"generate": 0}, max_restarts=1)
    with pytest.raises(EngineGoneError, match="gone in generate"):
        list(engine.generate(REQUESTS, PARAMS))
    assert len(made) == 2
    assert all(one.closed for one in made)


def test_one_that_comes_back_with_other_weights_is_not_sampled_from(started, shared_policy):
    def ring(engine, weights):
        raise EngineError("it decodes with other weights")

    engine, _ = started({"generate": 1}, check=ring)
    engine.update(shared_policy("qwen3"), 1)
    with pytest.raises(EngineError, match="other weights"):
        list(engine.generate(REQUESTS, PARAMS))
