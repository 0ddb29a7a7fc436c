"""Engines that are gone in the middle: others answer what they had not, and they come back with the weights of the others."""

import threading
import time
from functools import partial

import pytest

from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.canary import check_arrival
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.rollout.replicas import Replicas
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
        engine = Replicas([lambda: Mortal(policy, dict(next(left, {})), made)], check, max_restarts, start_synced=True)
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


# --- several -------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(shared_policy):
    """`several([deaths of each life of engine 0], …)`: those engines as one, and all that were made, by engine."""
    policy, opened = shared_policy("qwen3"), []

    def start(*lives, may_start=None, **options):
        made = [[] for _ in lives]

        def begin(number):
            if made[number] and may_start is not None:
                assert may_start.wait(20)
            return Mortal(policy, dict((lives[number][len(made[number]) :] or [{}])[0]), made[number])

        check = partial(check_with, policy)
        engine = Replicas(
            [partial(begin, number) for number in range(len(lives))], check, options.get("max_restarts", 2),
            start_synced=options.get("start_synced", True),
        )  # fmt: skip
        opened.append(engine)
        return engine, made

    yield start
    for engine in opened:
        engine.close()


def check_with(policy, engine, weights):
    check_arrival(engine, partial(score_sequences, policy))


def until(seen):
    deadline = time.monotonic() + 20
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(found, expected):
    return [(c.ids, c.finish) for c in in_order(found)] == [(c.ids, c.finish) for c in in_order(expected)]


def test_groups_are_dealt_whole_and_answered_as_by_one(several):
    engine, made = several([], [])
    found = list(engine.generate(REQUESTS, PARAMS))
    alone, _ = several([])
    assert same(found, alone.generate(REQUESTS, PARAMS))
    asked = [[r.prompt_ids for one in life for call in one.asked for r in call] for life in made]
    assert all(asked)
    assert not set(asked[0]) & set(asked[1])


def test_what_a_lost_engine_had_not_answered_the_others_do_while_it_is_started_again(several, shared_policy):
    may_start = threading.Event()
    engine, made = several([{"generate": 4 + 1}], [], may_start=may_start)
    engine.update(shared_policy("qwen3"), 3)
    found = list(engine.generate(REQUESTS, PARAMS))
    alone, _ = several([])
    assert same(found, alone.generate(REQUESTS, PARAMS))
    assert engine.states == ["restarting", "healthy"]
    # With their seeds, and only what was not given out.
    again, first = made[1][0].asked[-1], made[0][0].asked[-1]
    assert len(again) == len(first) - 1
    assert set(again) < set(first)
    may_start.set()
    until(lambda: engine.states == ["stale", "healthy"])
    engine.update(shared_policy("qwen3"), 4)
    assert engine.states == ["healthy", "healthy"]
    assert [made[0][-1].policy_version, made[1][0].policy_version] == [4, 4]


def test_one_that_was_started_again_is_asked_nothing_before_it_has_the_weights(several, shared_policy):
    """A thread that samples does not bring weights: they may be moving."""
    engine, made = several([{"generate": 2}])
    engine.update(shared_policy("qwen3"), 3)
    found = []
    sampling = threading.Thread(target=lambda: found.extend(engine.generate(REQUESTS, PARAMS)))
    sampling.start()
    until(lambda: engine.states == ["stale"])
    time.sleep(0.3)
    assert sampling.is_alive()
    assert made[0][1].asked == []
    engine.revive()
    sampling.join(20)
    assert {completion.policy_version for completion in found} == {3}
    assert sorted(completion.request for completion in found) == list(range(len(REQUESTS)))


def test_engines_that_start_with_other_weights_are_asked_nothing_before_the_first_update(several, shared_policy):
    engine, made = several([], [], start_synced=False)
    assert engine.states == ["stale", "stale"]
    with pytest.raises(AssertionError, match="before they have the weights"):
        engine.generate(REQUESTS, PARAMS)
    engine.revive()
    assert engine.states == ["stale", "stale"]
    assert not any(one.asked for life in made for one in life)
    engine.update(shared_policy("qwen3"), 0)
    assert engine.states == ["healthy", "healthy"]
    assert len(list(engine.generate(REQUESTS, PARAMS))) == len(REQUESTS)


def test_what_a_lost_engine_still_delivers_is_dropped_counted_and_asked_again(several, shared_policy, caplog):
    engine, made = several([])
    engine.update(shared_policy("qwen3"), 3)
    completions = engine.generate(REQUESTS, PARAMS)
    found = [next(completions)]
    orphan = made[0][0]
    orphan.deaths["score"] = 0
    engine.score([((5, 6, 7), 1)])
    assert (engine.restarts, engine.dropped, engine.states) == (1, 0, ["healthy"])
    found += completions
    alone, _ = several([])
    assert same(found, alone.generate(REQUESTS, PARAMS))
    assert {completion.policy_version for completion in found} == {3}
    assert len(made[0][1].asked[-1]) == len(REQUESTS) - 1
    assert engine.dropped == 1
    assert "engine-0 answered after it was lost: what it said is not taken (1 times so far)" in caplog.text


def test_without_restarts_left_the_others_go_on_until_the_last(several):
    engine, made = several([{"generate": 1}], [{"generate": 8}], max_restarts=0)
    assert len(list(engine.generate(REQUESTS, PARAMS))) == len(REQUESTS)
    assert engine.states == ["dead", "healthy"]
    with pytest.raises(EngineGoneError, match="gone in generate"):
        list(engine.generate(REQUESTS, PARAMS))
    assert all(one.closed for life in made for one in life)


def test_one_that_cannot_be_started_leaves_none(shared_policy):
    made = []

    def fail():
        raise EngineGoneError("no room")

    with pytest.raises(EngineGoneError, match="no room"):
        Replicas([partial(Mortal, shared_policy("qwen3"), {}, made), fail], lambda *_: None, 2, start_synced=True)
    assert [one.closed for one in made] == [True]
