"""The canary must ring: when nothing arrives, when something else arrives, and when the engine decodes otherwise."""

import copy
from functools import partial

import pytest
import torch

from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError
from posttrain.models.load import load_policy
from posttrain.rollout.canary import TOLERANCE, check_arrival
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences


@pytest.fixture
def policy(model_dir):
    return load_policy(SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}]))


def copy_of(policy):
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    return other


def move(policy, scale=1.1):
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(scale)


def check(engine, policy):
    return check_arrival(engine, partial(score_sequences, policy))


def test_an_engine_that_nothing_arrives_at_is_refused(policy):
    """It agrees with itself to rounding, so only the trainer's own log-probs can tell."""
    stale = EmbeddedEngine(copy_of(policy), stop_token_ids=())
    stale.update(policy, 1)
    assert check(stale, policy) < 1e-4
    move(policy)
    stale.update(policy, 2)
    assert check_arrival(stale, stale.score) < 1e-4
    with pytest.raises(EngineError, match=r"after the sync to policy version 2 .* it decodes with other weights"):
        check(stale, policy)


def test_an_engine_that_shares_the_weights_or_gets_them_passes(policy):
    shared = EmbeddedEngine(policy, stop_token_ids=())
    copied = EmbeddedEngine(copy_of(policy), stop_token_ids=(), shares_weights=False)
    for version in (1, 2):
        for engine in (shared, copied):
            engine.update(policy, version)
            assert check(engine, policy) < 1e-4
        move(policy)


def test_the_canary_sees_what_only_decoding_computes_with(policy, monkeypatch):
    """Prefill runs through the model's own forward, scoring through its parts: tamper with the first."""
    engine = EmbeddedEngine(policy, stop_token_ids=())
    original = policy.model.forward

    def tampered(**options):
        output = original(**options)
        output.logits = output.logits * 1.2
        return output

    monkeypatch.setattr(policy.model, "forward", tampered)
    with pytest.raises(EngineError, match="it decodes with other weights"):
        check(engine, policy)


def off_by(policy, gap, completions):
    """A trainer whose log-probs of the first completions differ by `gap`."""

    def trainer(sequences):
        scored = score_sequences(policy, sequences)
        return [[logp + (gap if i < completions else 0.0) for logp in row] for i, row in enumerate(scored)]

    return trainer


def test_a_single_token_that_rounding_sends_to_another_expert_does_not_ring(model_dir):
    """In bf16 a router of near ties chooses otherwise for a token here and there; other weights move every token."""
    policy = load_policy(SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}], bf16=True))
    engine = EmbeddedEngine(policy, stop_token_ids=())
    assert check_arrival(engine, off_by(policy, 0.5, 1)) < 0.1
    with pytest.raises(EngineError, match="it decodes with other weights"):
        check_arrival(engine, off_by(policy, 0.5, 3))


@pytest.mark.parametrize("gap", [0.5, float("nan")])
def test_a_single_token_rings_in_float32_and_what_is_no_number_always(policy, gap):
    with pytest.raises(EngineError, match="it decodes with other weights"):
        check_arrival(EmbeddedEngine(policy, stop_token_ids=()), off_by(policy, gap, 1))


def test_dropout_does_not_ring(model_dir):
    keys = SFTKeys(
        base_model=str(model_dir("qwen3")), datasets=[{"path": "x.jsonl"}], adapter="lora", lora_r=4, lora_dropout=0.5
    )
    policy = load_policy(keys)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.normal_(std=0.1)
    policy.model.train()
    assert check(EmbeddedEngine(policy, stop_token_ids=()), policy) < 1e-4
    assert policy.model.training


@pytest.mark.parametrize(("options", "dtype"), [({}, "float32"), ({"bf16": True}, "bfloat16")])
def test_the_tolerance_is_that_of_the_dtype_the_engine_computes_in(options, dtype, model_dir):
    keys = SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}], **options)
    policy = load_policy(keys)
    engine = EmbeddedEngine(policy, stop_token_ids=())
    assert engine.describe().dtype == dtype
    assert check(engine, policy) <= TOLERANCE[dtype]
