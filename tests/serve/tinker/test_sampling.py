"""Sampling clients are answered by the embedded engine, from the weights that they were made of."""

import numpy as np
import pytest
import tinker

from posttrain.config.stages import ModelKeys
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Request, SamplingParams, in_order

PROMPT = [5, 9, 40]
HOT = {"max_tokens": 6, "temperature": 1.0, "seed": 11}
ADAM = tinker.AdamParams(learning_rate=3e-2)


@pytest.fixture(scope="module")
def alone(bases):
    engine = EmbeddedEngine(load_policy(ModelKeys(base_model=str(bases["tiny"])), trainable=False), stop_token_ids=(2,))

    def ask(ids, number=0, seed=11, **params):
        request = Request(tuple(ids), request_seed("tinker", seed, number))
        [completion] = in_order(engine.generate([request], SamplingParams(**params)))
        return completion

    ask.engine = engine
    return ask


def sample(sampling, ids=PROMPT, number=1, logprobs=False, **params):
    prompt = tinker.ModelInput.from_ints(list(ids))
    options = {"include_prompt_logprobs": True} if logprobs else {}
    return sampling.sample(prompt, number, tinker.SamplingParams(**{**HOT, **params}), **options)


def test_a_sample_is_the_engines_whatever_it_is_asked_beside(client, alone):
    sampling = client.create_sampling_client(base_model="tiny").result()
    assert sampling.get_base_model() == "tiny"
    waiting = [sample(sampling, [*PROMPT, n], 2) for n in range(30, 42)]
    for n, result in zip(range(30, 42), waiting, strict=True):
        for number, sequence in enumerate(result.result().sequences):
            expected = alone([*PROMPT, n], number, max_tokens=6)
            assert tuple(sequence.tokens) == expected.ids
            assert sequence.logprobs == pytest.approx(expected.logp, abs=1e-5)
            assert sequence.stop_reason == ("stop" if expected.finish == "stop" else "length")
    ids = [sequence.sequence_id for result in waiting for sequence in result.result().sequences]
    assert len(set(ids)) == 24


def test_prompts_are_scored_as_the_engine_does(client, alone):
    sampling = client.create_sampling_client(base_model="tiny").result()
    ids = [5, 9, 40, 41, 7]
    logp = sampling.compute_logprobs(tinker.ModelInput.from_ints(ids)).result()
    [expected] = alone.engine.score([(ids, 1)])
    assert logp[0] is None
    assert logp[1:] == pytest.approx(expected, abs=1e-5)
    last = sampling.compute_logprobs(tinker.ModelInput.from_ints(ids), prompt_logprobs_last_n=2).result()
    assert last[:3] == [None] * 3
    assert last[3:] == pytest.approx(expected[2:], abs=1e-5)
    prompt = tinker.ModelInput.from_ints(ids)
    top = sampling.sample(prompt, 1, tinker.SamplingParams(max_tokens=1), True, topk_prompt_logprobs=3).result()
    assert top.topk_prompt_logprobs[0] is None
    assert all(len(row) == 3 for row in top.topk_prompt_logprobs[1:])


def test_a_clients_stops_take_the_place_of_the_models_own(client):
    sampling = client.create_sampling_client(base_model="tiny").result()
    free = sample(sampling, max_tokens=40, stop=[]).result().sequences[0]
    assert len(free.tokens) == 40
    assert free.stop_reason == "length"
    cut = sample(sampling, max_tokens=40, stop=[free.tokens[3]]).result().sequences[0]
    assert cut.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]
    assert cut.stop_reason == "stop"


def test_a_snapshot_stays_while_the_model_learns_and_rl_goes_on_from_its_log_probs(client, serving, datum):
    training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
    first = training.save_weights_and_get_sampling_client().result()
    base = client.create_sampling_client(base_model="tiny").result()
    before = sample(first, number=4).result().sequences
    assert [s.tokens for s in before] == [s.tokens for s in sample(base, number=4).result().sequences]  # B is 0
    data = []
    for sequence, advantage in zip(before, (1.0, -1.0, 0.5, 0.0), strict=True):
        ids, blank = [*PROMPT, *sequence.tokens], [0.0] * (len(PROMPT) - 1)
        streams = {
            "logprobs": [*blank, *sequence.logprobs],
            "advantages": [*blank, *[advantage] * len(sequence.tokens)],
        }
        data.append(datum(ids, **streams))
    passed = training.forward_backward(data, "importance_sampling")
    training.optim_step(ADAM).result()
    # At the weights that sampled every ratio is 1, and the loss the sum of −A.
    ratios = -sum(a * len(s.tokens) for a, s in zip((1.0, -1.0, 0.5, 0.0), before, strict=True))
    assert passed.result().metrics["loss:sum"] == pytest.approx(ratios, abs=1e-4)
    for sequence, out in zip(before, passed.result().loss_fn_outputs, strict=True):
        assert out["logprobs"].to_numpy()[len(PROMPT) - 1 :] == pytest.approx(sequence.logprobs_np, abs=1e-5)
    second = training.save_weights_and_get_sampling_client().result()
    assert [s.tokens for s in sample(first, number=4).result().sequences] == [s.tokens for s in before]
    ids = tinker.ModelInput.from_ints([*PROMPT, *before[0].tokens])
    learned = sum(second.compute_logprobs(ids).result()[3:])
    assert learned > np.sum(before[0].logprobs)


def test_a_snapshot_that_was_let_go_says_so_and_a_name_keeps_weights(running, bases, client_of, tmp_path):
    with running(bases, tmp_path, max_snapshots=1) as serving, client_of(serving) as client:
        training = client.create_lora_training_client(base_model="tiny", rank=2, seed=3).result()
        old = training.save_weights_and_get_sampling_client().result()
        training.save_weights_and_get_sampling_client().result()
        with pytest.raises(
            tinker.RequestFailedError, match=r"are not kept any more .* save_weights_for_sampler\(NAME\)"
        ):
            sample(old).result()
        path = training.save_weights_for_sampler("kept").result().path
        named = client.create_sampling_client(model_path=path).result()
        assert sample(named).result().sequences[0].tokens
        with pytest.raises(tinker.RequestFailedError, match="sampler_weights/kept is there already"):
            training.save_weights_for_sampler("kept").result()


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"max_tokens": 600}, {}, "max_tokens: got 600 after 3 of prompt; the model's window is 512"),
        ({"top_p": 1.5}, {}, r"top_p 1.5; expected .* above 0 to 1"),
        ({}, {"topk_sample_logprobs": 2}, "topk_sample_logprobs: got 2; this server has no such thing"),
        ({}, {"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k: got 2; this server has no such thing"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(client, params, options, message):
    sampling = client.create_sampling_client(base_model="tiny").result()
    prompt = tinker.ModelInput.from_ints(PROMPT)
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match=message):
        sampling.sample(prompt, 1, tinker.SamplingParams(**{**HOT, **params}), **options).result()
