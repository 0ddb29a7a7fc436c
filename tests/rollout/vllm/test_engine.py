"""vLLM in this process: what its log-probs are, what arrives at it, and what is refused."""

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError
from posttrain.models.load import load_policy
from posttrain.recipes.experience.engines import EngineSource, make_engine, sync_engine
from posttrain.rollout.embedded import score_sequences
from posttrain.rollout.sampling import cut
from posttrain.rollout.transfer.delta import DeltaReceiver
from posttrain.types import Request, SamplingParams, in_order

pytestmark = [
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.xdist_group("vllm"),
]
PROMPTS = [(5, 9, 40, 41, 42), (7,), tuple(range(60, 73))]


def keys_of(model_dir, architecture="qwen3", **options):
    return SFTKeys(base_model=str(model_dir(architecture)), datasets=[{"path": "unused.jsonl"}], **options)


def moved(policy, std=0.05):
    torch.manual_seed(3)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(torch.randn_like(parameter) * std)
    return policy


@pytest.fixture
def policy(model_dir):
    return load_policy(keys_of(model_dir))


@pytest.fixture
def engine(vllm_engine, shared_policy):
    yield vllm_engine
    vllm_engine.update(shared_policy("qwen3"), 0)


@pytest.fixture
def made(model_dir):
    """`made(architecture, rollout, **keys)` is a policy and an engine on it, closed after the test."""
    engines = []

    def make(architecture="qwen3", rollout=(), **options):
        keys = keys_of(model_dir, architecture, **options)
        policy = load_policy(keys)
        rollout_keys = RolloutKeys(engine="vllm", memory_gib=0.1, **dict(rollout))
        engines.append(make_engine(EngineSource(keys, policy), keys=rollout_keys))
        return policy, engines[-1]

    yield make
    for engine in engines:
        engine.close()


def sampled(engine, **params):
    requests = [Request(prompt, seed) for prompt in PROMPTS for seed in range(4)]
    completions = in_order(engine.generate(requests, SamplingParams(**{"max_tokens": 12, **params})))
    return [(r.prompt_ids + c.ids, len(r.prompt_ids), c.logp) for r, c in zip(requests, completions, strict=True)]


def gaps(engine, policy, **params):
    """Differences to the trainer's log-probs, over all sampled tokens."""
    rows = sampled(engine, **params)
    scored = score_sequences(policy, [(ids, start) for ids, start, _ in rows], params.get("temperature", 1.0))
    return [a - b for (_, _, logp), row in zip(rows, scored, strict=True) for a, b in zip(logp, row, strict=True)]


# --- log-probs -----------------------------------------------------------------------------------------------------


def test_before_the_first_step_the_ratio_to_the_trainer_is_one(engine, policy):
    for temperature in (1.0, 0.7):
        assert max(map(abs, gaps(engine, policy, temperature=temperature))) <= 1e-4


@pytest.mark.parametrize("cuts", [{"top_k": 20}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}])
def test_with_cuts_the_log_ratio_is_the_log_of_the_kept_mass(cuts, engine, policy):
    params = SamplingParams(max_tokens=12, temperature=0.8, **cuts)
    for ids, start, logp in sampled(engine, temperature=0.8, **cuts):
        with torch.no_grad():
            logits_TV = policy.base(torch.tensor([ids]), use_cache=False).logits[0].float() / 0.8
        probs_TV = logits_TV.softmax(-1)
        kept_T = cut(probs_TV, params).sum(-1)
        for place, token in enumerate(ids[start:], start=start - 1):
            ratio = logp[place - start + 1] - float(probs_TV[place, token].log())
            assert ratio == pytest.approx(-float(kept_T[place].log()), abs=1e-4)


def test_more_tokens_of_prompts_than_a_step_of_vllm_takes_are_sampled(engine, policy):
    """A prompt would be prefilled in parts, which vLLM cannot do with a seed on a CPU."""
    requests = [Request(tuple((7 * n + i) % 280 + 3 for i in range(150)), n) for n in range(32)]
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=2)))
    scored = score_sequences(policy, [(r.prompt_ids + c.ids, 150) for r, c in zip(requests, completions, strict=True)])
    for completion, row in zip(completions, scored, strict=True):
        assert completion.logp == pytest.approx(row, abs=1e-4)


# --- weights -------------------------------------------------------------------------------------------------------


def test_changed_weights_arrive_at_a_tied_head_too(engine, policy):
    assert policy.base.config.tie_word_embeddings
    metrics = sync_engine(engine, moved(policy), version=4)
    assert metrics["sync/canary_gap"] < 1e-4
    assert metrics["sync/moved_bytes"] == sum(p.numel() * p.element_size() for p in policy.model.parameters())
    assert metrics["sync/moved_share"] == 1.0
    assert max(map(abs, gaps(engine, policy))) <= 1e-4
    assert engine.policy_version == 4
    [completion] = in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=1)))
    assert completion.policy_version == 4


def test_a_transfer_that_moves_nothing_is_refused(engine, policy, monkeypatch):
    from posttrain.rollout.vllm.receiver import Receiver

    for name in ("start_weight_update", "finish_weight_update"):
        monkeypatch.setattr(Receiver, name, lambda self: None)
    monkeypatch.setattr(Receiver, "receive_weights", lambda self, update: None)
    sync_engine(engine, policy, version=1)
    with pytest.raises(EngineError, match=r"after the sync to policy version 2 .* it decodes with other weights"):
        sync_engine(engine, moved(policy), version=2)


def test_a_head_that_is_not_packed_again_is_refused(engine, policy, monkeypatch):
    from posttrain.rollout.vllm.receiver import Receiver

    monkeypatch.setattr(Receiver, "_pack_tied_heads", lambda self: None)
    with pytest.raises(EngineError, match="it decodes with other weights"):
        sync_engine(engine, moved(policy), version=2)


def test_what_was_cached_under_old_weights_is_not_used(engine, policy):
    """A prompt longer than a block of the cache."""
    request = [Request(tuple(range(3, 280)), 1)]
    in_order(engine.generate(request, SamplingParams(max_tokens=2)))
    sync_engine(engine, moved(policy), version=1)
    [completion] = in_order(engine.generate(request, SamplingParams(max_tokens=4)))
    [expected] = score_sequences(policy, [(request[0].prompt_ids + completion.ids, len(request[0].prompt_ids))])
    assert completion.logp == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_deltas_hand_to_the_loader_is_what_the_trainer_has(dtype, made, monkeypatch):
    def seen(tensors):
        return {name: t.detach().to(getattr(torch, dtype)).flatten().view(torch.uint8).tolist() for name, t in tensors}

    taken, take = [], DeltaReceiver.take
    monkeypatch.setattr(DeltaReceiver, "take", lambda end, message: taken.append(list(take(end, message))) or taken[-1])
    policy, engine = made(rollout={"transfer": "delta", "delta_anchor": 3, "dtype": dtype})
    shares = []
    for version in range(5):
        with torch.no_grad():
            policy.base.model.layers[version % 2].mlp.up_proj.weight.mul_(1.5)
        shares.append(sync_engine(engine, policy, version)["sync/moved_share"])
        assert seen(taken[-1]) == seen(policy.weights("all"))
    assert [share > 1 for share in shares] == [True, False, False, True, False]
    assert max(shares[1], shares[2], shares[4]) < 0.3


def test_a_delta_that_is_torn_is_refused_and_the_engine_not_asked_again(made, monkeypatch):
    def torn(end, message):
        path = Path(message["path"])
        path.write_bytes(path.read_bytes()[:-1])
        return take(end, message)

    policy, engine = made(rollout={"transfer": "delta"})
    sync_engine(engine, policy, 0)
    take = DeltaReceiver.take
    monkeypatch.setattr(DeltaReceiver, "take", torn)
    with pytest.raises(EngineError, match="torn or has a flipped bit"):
        sync_engine(engine, moved(policy), 1)
    with pytest.raises(EngineError, match=r"vLLM ended before .*torn or has a flipped bit"):
        sampled(engine)


LORA = {"adapter": "lora", "lora_r": 4}


def test_of_an_adapter_only_the_adapter_is_moved(made):
    policy, engine = made(**LORA, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 3})
    size = sum(p.numel() * p.element_size() for _, p in policy.trainable())
    for version in (1, 2):
        metrics = sync_engine(engine, moved(policy, std=0.2), version)
        assert metrics["sync/moved_bytes"] == size
        assert max(map(abs, gaps(engine, policy))) <= 1e-4
    assert engine._engine.list_loras() == {2}
    with policy.model.disable_adapter():
        assert max(map(abs, gaps(engine, policy))) > 0.1


def test_an_engine_with_adapters_scores_several_sequences(made):
    policy, engine = made(**LORA)
    sync_engine(engine, moved(policy, std=0.2), version=1)
    sequences = [((*prompt, 7, 9), len(prompt)) for prompt in PROMPTS]
    for found, expected in zip(engine.score(sequences), score_sequences(policy, sequences), strict=True):
        assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_modules_to_save": ["lm_head"]}], ids=["dora", "whole"])
def test_an_adapter_that_vllm_cannot_serve_is_merged(options, made):
    policy, engine = made("llama", **LORA, **options)
    metrics = sync_engine(engine, moved(policy, std=0.2), version=1)
    assert metrics["sync/canary_gap"] < 1e-4
    assert metrics["sync/moved_bytes"] == sum(t.numel() * t.element_size() for _, t in policy.weights("all"))


# --- what is refused -----------------------------------------------------------------------------------------------


def test_who_stops_taking_completions_ends_them(engine, policy):
    running = engine.generate(
        [Request((5,), 0), Request((6,), 0)], SamplingParams(max_tokens=8, stop_token_ids=range(144))
    )
    next(running)
    if engine._engine.has_unfinished_requests():
        with pytest.raises(EngineError, match="weights of version 3 came while completions"):
            engine.update(policy, 3)
    running.close()
    assert not engine._engine.has_unfinished_requests()
    engine.update(policy, 3)


def test_two_generations_may_be_taken_by_turns(engine):
    ask = [[Request((5, n), seed) for seed in range(3)] for n in (1, 2)]
    alone = [in_order(engine.generate(requests, SamplingParams(max_tokens=6))) for requests in ask]
    first, second = (engine.generate(requests, SamplingParams(max_tokens=6)) for requests in ask)
    mixed = [next(first)]
    late = in_order(second)
    assert [in_order([*mixed, *first]), late] == alone


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused(engine):
    with pytest.raises(
        EngineError, match=r"request 0: 500 tokens of prompt and up to 20 .* 512 .*rollout.max_model_len"
    ):
        engine.generate([Request((5,) * 500, 0)], SamplingParams(max_tokens=20))


def test_scores_at_another_temperature_are_the_trainers_business(engine):
    with pytest.raises(EngineError, match=r"temperature 1 only, got 0\.7; at another one the trainer scores them"):
        engine.score([((5, 6, 7), 1)], temperature=0.7)


def test_it_says_what_it_is(engine):
    info = engine.describe()
    assert (info.name, info.dtype, info.logprobs, info.seed_bits) == ("vllm", "float32", "processed", 63)
    assert info.version.startswith("0.32")
    assert not info.exact_resume


def test_a_dead_engine_is_a_typed_error_and_is_not_asked_again(vllm_engine, monkeypatch):
    engine = copy.copy(vllm_engine)

    def broken():
        raise RuntimeError("the worker is gone")

    monkeypatch.setattr(engine._engine, "step", broken)
    with pytest.raises(EngineError, match="vLLM could not generate: RuntimeError: the worker is gone"):
        in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=2)))
    monkeypatch.undo()
    vllm_engine._engine.abort_request([f"posttrain-{n}" for n in range(10_000)])
    with pytest.raises(EngineError, match=r"vLLM ended before .* the run goes on from its checkpoint"):
        in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=2)))
