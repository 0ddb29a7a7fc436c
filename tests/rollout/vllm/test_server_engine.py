"""vLLM behind HTTP: what arrives at it, what a completion says of its weights, and what becomes of a server that dies."""

import copy
import os
import signal
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tests.processes import all_gone, family

from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError, EngineGoneError
from posttrain.models.load import load_policy
from posttrain.recipes.experience.engines import sync_engine
from posttrain.rollout.embedded import score_sequences
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.vllm.server_engine import VLLMServerEngine
from posttrain.types import Moved, Request, SamplingParams, in_order

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.xdist_group("vllm"),
]
PROMPTS = [(5, 9, 40, 41, 42), (7,), tuple(range(60, 73))]
REQUESTS = [Request(prompt, seed) for prompt in PROMPTS for seed in range(4)]
LONG = SamplingParams(max_tokens=480)


def moved(policy, std=0.05):
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


@pytest.fixture
def policy_with(model_dir):
    def make(**options):
        return load_policy(SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}], **options))

    return make


@pytest.fixture
def engine(vllm_server_engine, shared_policy):
    """The one that is started again when it dies; afterwards with the weights that it was started with."""
    yield vllm_server_engine
    vllm_server_engine.update(shared_policy("qwen3"), 0)


def gaps(engine, policy):
    completions = in_order(engine.generate(REQUESTS, SamplingParams(max_tokens=12)))
    rows = [(r.prompt_ids + c.ids, len(r.prompt_ids)) for r, c in zip(REQUESTS, completions, strict=True)]
    scored = score_sequences(policy, rows)
    return [abs(a - b) for c, row in zip(completions, scored, strict=True) for a, b in zip(c.logp, row, strict=True)]


def server_of(engine):
    return engine._replicas[0].engine._server


def test_a_server_that_rests_is_asleep_and_wakes_for_whatever_it_is_asked(engine, policy_with):
    """On a CPU vLLM only stops its scheduler: that memory is let go of a card is not seen here."""
    server = engine._replicas[0].engine
    awake = in_order(engine.generate(REQUESTS, SamplingParams(max_tokens=6)))
    engine.rest()
    assert not asleep(server), "one that has cards of its own does not sleep"
    server._served = replace(server._served, sleeps=True)
    try:
        engine.rest()
        engine.rest()
        assert asleep(server)
        assert in_order(engine.generate(REQUESTS, SamplingParams(max_tokens=6))) == awake
        assert not asleep(server)
        engine.rest()
        policy = moved(policy_with())
        sync_engine(engine, policy, 3)
        assert not asleep(server)
        assert max(gaps(engine, policy)) < 2e-4
        engine.rest()
        assert engine.score([((5, 6, 7), 1)]) and not asleep(server)
    finally:
        server._served = replace(server._served, sleeps=False)


def asleep(server):
    return server._server.client.call("GET", "/is_sleeping")["is_sleeping"]


# --- weights -------------------------------------------------------------------------------------------------------


def test_changed_weights_arrive_at_a_tied_head_too_and_leave_no_file(engine, policy_with):
    policy = moved(policy_with())
    metrics = sync_engine(engine, policy, version=4)
    assert metrics["sync/canary_gap"] < 1e-4
    assert metrics["sync/moved_bytes"] == sum(p.numel() * p.element_size() for p in policy.model.parameters())
    assert max(gaps(engine, policy)) <= 1e-4
    [completion] = in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=3)))
    assert (completion.policy_version, completion.policy_versions) == (4, ())
    assert [path.name for path in engine._replicas[0].engine._folder.iterdir()] == ["socket"]


def test_deltas_reach_a_server_too_and_leave_no_file(engine, policy_with):
    own, policy, shares, folder = engine._replicas[0].engine, policy_with(), [], OwnFolder()
    served = replace(own._served, transfer="delta", delta_anchor=5)
    other = VLLMServerEngine(own._server, served, own._decode, folder)
    for version in range(3):
        with torch.no_grad():
            policy.base.model.layers[version % 2].mlp.up_proj.weight.mul_(1.5)
        shares.append(sync_engine(other, policy, version)["sync/moved_share"])
    assert max(gaps(other, policy)) <= 1e-4
    assert shares[0] > 1
    assert max(shares[1:]) < 0.3
    assert list(folder.path.iterdir()) == []
    folder.remove()
    own._sender.connect(own._init)


def test_a_broadcast_reaches_a_server_too_and_leaves_no_file(engine, policy_with):
    own, policy, folder = engine._replicas[0].engine, moved(policy_with()), OwnFolder()
    other = VLLMServerEngine(own._server, replace(own._served, transfer="broadcast"), own._decode, folder)
    for version in (1, 2):
        metrics = sync_engine(other, moved(policy), version)
        assert metrics["sync/moved_bytes"] == sum(p.numel() * p.element_size() for p in policy.model.parameters())
        assert max(gaps(other, policy)) <= 1e-4
    assert list(folder.path.iterdir()) == []
    other._sender.close()
    folder.remove()
    own._sender.connect(own._init)


def test_a_transfer_that_moves_nothing_is_refused(engine, policy_with, monkeypatch):
    monkeypatch.setattr(engine._replicas[0].engine._sender, "send", lambda tensors, version, update: Moved(0, 1))
    with pytest.raises(EngineError, match=r"after the sync to policy version 2 .* it decodes with other weights"):
        sync_engine(engine, moved(policy_with()), version=2)


def test_of_an_adapter_only_the_adapter_is_moved_and_the_old_one_is_unloaded(engine, policy_with):
    policy = moved(policy_with(adapter="lora", lora_r=4), std=0.2)
    size = sum(p.numel() * p.element_size() for _, p in policy.trainable())
    for version in (1, 2):
        metrics = sync_engine(engine, moved(policy, std=0.2), version)
        assert metrics["sync/moved_bytes"] == size
        assert max(gaps(engine, policy)) <= 1e-4
    served = [model["id"] for model in server_of(engine).client.call("GET", "/v1/models")["data"]]
    assert [name.partition("@")[2].partition(".")[0] for name in served] == ["", "2"]
    [completion] = in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=3)))
    assert completion.policy_version == 2
    ids = [((*prompt, 7, 9), len(prompt)) for prompt in PROMPTS]
    for found, expected in zip(engine.score(ids), score_sequences(policy, ids), strict=True):
        assert found == pytest.approx(expected, abs=2e-4)


def test_what_was_cached_under_old_weights_is_not_used(engine, policy_with):
    request = [Request(tuple(range(3, 280)), 1)]
    in_order(engine.generate(request, SamplingParams(max_tokens=2)))
    policy = moved(policy_with())
    sync_engine(engine, policy, version=1)
    [completion] = in_order(engine.generate(request, SamplingParams(max_tokens=4)))
    [expected] = score_sequences(policy, [(request[0].prompt_ids + completion.ids, len(request[0].prompt_ids))])
    assert completion.logp == pytest.approx(expected, abs=1e-4)


# --- weights that come in the middle -------------------------------------------------------------------------------


@pytest.fixture
def pausing(engine, shared_policy):
    """`pausing(mode)`: long completions, during which weights of version 9 came."""

    def run(mode, policy):
        inner = copy.copy(engine._replicas[0].engine)
        inner._served = replace(inner._served, pause=mode, stop_token_ids=())
        inner.update(shared_policy("qwen3"), 0)
        found = []
        requests = [Request((5, 9, 40), seed) for seed in range(32)]
        sampling = threading.Thread(target=lambda: found.extend(in_order(inner.generate(requests, LONG))))
        sampling.start()
        while not inner._under_way.total():
            time.sleep(0.01)
        time.sleep(0.5)
        inner.update(policy, 9)
        sampling.join(120)
        assert not inner._cache_is_stale
        inner.update(shared_policy("qwen3"), 0)
        return found

    return run


def test_waiting_ends_what_is_sampled_under_the_weights_it_began_with(pausing, policy_with):
    found = pausing("wait", moved(policy_with()))
    assert {(len(c.ids), c.finish, c.policy_versions) for c in found} == {(480, "length", ())}
    # What was still queued is sampled from the new weights.
    assert 0 in {c.policy_version for c in found} <= {0, 9}


def test_keeping_says_of_each_token_which_weights_it_was_drawn_from(pausing, policy_with, shared_policy):
    across = [c for c in pausing("keep", moved(policy_with())) if c.policy_versions]
    assert across
    for completion in across:
        assert completion.policy_version == 0
        old = completion.policy_versions.index(9)
        assert completion.policy_versions == (0,) * old + (9,) * (480 - old)
        [scored] = score_sequences(shared_policy("qwen3"), [((5, 9, 40, *completion.ids), 3)])
        assert completion.logp[:old] == pytest.approx(scored[:old], abs=2e-4)
        assert max(abs(a - b) for a, b in zip(completion.logp[old:], scored[old:], strict=True)) > 1e-3


def test_aborting_gives_out_what_there_is(pausing, policy_with):
    found = pausing("abort", moved(policy_with()))
    aborted = [c for c in found if c.finish == "aborted"]
    assert aborted
    assert all(len(c.ids) == len(c.logp) < 480 and c.policy_versions == () for c in aborted)


def test_who_stops_taking_completions_ends_them(engine):
    stops = SamplingParams(max_tokens=480, stop_token_ids=tuple(range(40)))
    running = engine._replicas[0].engine.generate([Request((5, n), 0) for n in range(12)], stops)
    next(running)
    running.close()
    deadline = time.monotonic() + 10
    while server_of(engine).client.call("POST", "/abort_requests", {})["aborted"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server_of(engine).client.call("POST", "/abort_requests", {})["aborted"] == 0
    assert not engine._replicas[0].engine._under_way.total()


# --- its process ---------------------------------------------------------------------------------------------------


def test_its_key_stands_in_no_command_line_and_no_file(engine):
    server = server_of(engine)
    token = server.client.token
    assert len(token) > 30
    for pid in family(server.pid):
        assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert token not in server.log.read_text()
    assert os.stat(engine._replicas[0].engine._folder).st_mode & 0o077 == 0
    with pytest.raises(EngineError, match="answered 401"):
        type(server.client)(server.client.address, "wrong").call("GET", "/v1/models")


def killed(engine, number=signal.SIGKILL):
    """The youngest process of the server is killed: the worker that holds the weights."""
    pids = family(server_of(engine).pid)
    os.kill(pids[-1], number)
    return pids


def test_a_server_killed_while_it_samples_comes_back_and_answers_the_rest(engine, policy_with):
    policy = moved(policy_with())
    sync_engine(engine, policy, version=3)
    # Few stop tokens: when the first answer is read the others are still being sampled, on a loaded machine too.
    params = SamplingParams(max_tokens=480, stop_token_ids=tuple(range(3)))
    expected = [c.ids for c in in_order(engine.generate(REQUESTS, params))]
    found, restarts = [], engine.restarts
    for completion in engine.generate(REQUESTS, params):
        if not found:
            pids = killed(engine)
        found.append(completion)
    assert [c.ids for c in in_order(found)] == expected
    assert [c.policy_version for c in found] == [3] * len(REQUESTS)
    assert engine.restarts == restarts + 1
    assert all_gone(pids)
    assert max(gaps(engine, policy)) <= 1e-4


@pytest.mark.slow
def test_a_server_killed_while_it_is_idle_comes_back_with_its_weights(engine, policy_with):
    policy = moved(policy_with())
    sync_engine(engine, policy, version=3)
    restarts = engine.restarts
    pids = killed(engine)
    time.sleep(1)
    assert max(gaps(engine, policy)) <= 1e-4
    assert (engine.restarts, engine.policy_version) == (restarts + 1, 3)
    assert all_gone(pids)


@pytest.mark.slow
def test_a_server_killed_while_it_takes_weights_comes_back_with_them(engine, policy_with, monkeypatch):
    policy, update, restarts = moved(policy_with()), type(engine._replicas[0].engine)._update, engine.restarts

    def dying(self, message):
        monkeypatch.undo()
        killed(engine)
        update(self, message)

    monkeypatch.setattr(type(engine._replicas[0].engine), "_update", dying)
    metrics = sync_engine(engine, policy, version=3)
    assert metrics["sync/moved_bytes"] == sum(p.numel() * p.element_size() for p in policy.model.parameters())
    assert max(gaps(engine, policy)) <= 1e-4
    assert (engine.restarts, engine.policy_version) == (restarts + 1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("doing", ["idle", "syncing"])
def test_a_server_that_stands_still_comes_back_with_its_weights(engine, policy_with, monkeypatch, doing):
    policy, kind = moved(policy_with()), type(engine._replicas[0].engine)
    monkeypatch.setattr(server_of(engine).client, "timeout_s", 2.0)
    update, restarts, pids = kind._update, engine.restarts, family(server_of(engine).pid)

    def standing(self, message):
        monkeypatch.setattr(kind, "_update", update)
        killed(engine, signal.SIGSTOP)
        update(self, message)

    if doing == "idle":
        killed(engine, signal.SIGSTOP)
    else:
        monkeypatch.setattr(kind, "_update", standing)
    sync_engine(engine, policy, version=3)
    assert max(gaps(engine, policy)) <= 1e-4
    assert (engine.restarts, engine.policy_version) == (restarts + 1, 3)
    assert all_gone(pids)


@pytest.mark.slow
def test_a_server_that_stands_still_is_taken_for_dead_within_seconds(engine, policy_with, monkeypatch):
    sync_engine(engine, policy_with(), version=3)
    monkeypatch.setattr(server_of(engine).client, "timeout_s", 2.0)
    inner, started, params = (
        engine._replicas[0].engine,
        None,
        SamplingParams(max_tokens=480, stop_token_ids=tuple(range(3))),
    )
    with pytest.raises(
        EngineGoneError,
        match=r"could not generate: GET /is_paused: .* did not answer within 2 s; raise rollout.timeout_s",
    ):
        for _ in inner.generate(REQUESTS, params):
            if started is None:
                started, stopped = time.monotonic(), family(server_of(engine).pid)[-1]
                os.kill(stopped, signal.SIGSTOP)
    assert time.monotonic() - started < 15
    assert len(in_order(engine.generate(REQUESTS, SamplingParams(max_tokens=4)))) == len(REQUESTS)
