"""What every engine must do. An engine is one row of `ENGINES`; `make(stops)` makes it with stop tokens of its own."""

from importlib.util import find_spec

import pytest
import torch

from posttrain.errors import EngineError
from posttrain.protocols import Engine
from posttrain.rollout.embedded import EmbeddedEngine, score_sequences
from posttrain.types import Request, SamplingParams, in_order

ENGINES = {
    "ragged": ("qwen3", "embedded"),
    "ragged with windows": ("mistral", "embedded"),
    "ragged with windows and soft caps": ("gemma2", "embedded"),
    "ragged with experts": ("qwen3_moe", "embedded"),
    "one by one": ("mamba", "embedded"),
    "one by one with sinks": ("gpt_oss", "embedded"),
    "vllm": ("qwen3", "vllm"),
    "vllm behind HTTP": ("qwen3", "vllm_server"),
}
NEEDS_VLLM = (
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.xdist_group("vllm"),
)
ROWS = [pytest.param(row, id=name, marks=() if row[1] == "embedded" else NEEDS_VLLM) for name, row in ENGINES.items()]


@pytest.fixture(params=ROWS)
def row(request):
    return request.param


@pytest.fixture
def policy(row, shared_policy):
    return shared_policy(row[0])


@pytest.fixture
def make(row, policy, request):
    def embedded(stops):
        return EmbeddedEngine(policy, stop_token_ids=stops, batch_size=3)

    return embedded if row[1] == "embedded" else request.getfixturevalue(f"make_{row[1]}")


@pytest.fixture
def engine(make):
    return make(())


PROMPTS = [(5, 9, 40, 41, 42), (7,), tuple(range(60, 73)), (5, 9, 40, 41, 43)]


def ask(seeds=(0, 1), prompts=PROMPTS):
    return [Request(prompt, seed) for prompt in prompts for seed in seeds]


def test_it_is_an_engine(engine):
    assert isinstance(engine, Engine)


def test_one_completion_per_request_in_order(engine):
    params = SamplingParams(max_tokens=5)
    requests = ask()
    together = in_order(engine.generate(requests, params))
    assert len(together) == len(requests)
    for request, completion in zip(requests, together, strict=True):
        [alone] = in_order(engine.generate([request], params))
        assert alone.ids == completion.ids
        assert alone.logp == pytest.approx(completion.logp, abs=1e-5)


def test_a_completion_does_not_depend_on_its_company(engine):
    params = SamplingParams(max_tokens=6, temperature=0.8, top_p=0.95)
    requests = ask(seeds=(3,))
    forward = in_order(engine.generate(requests, params))
    backward = in_order(engine.generate(requests[::-1], params))[::-1]
    for a, b in zip(forward, backward, strict=True):
        assert a.ids == b.ids
        assert a.logp == pytest.approx(b.logp, abs=1e-5)


def test_seeds_decide_and_differ(engine):
    params = SamplingParams(max_tokens=6)
    requests = [Request(PROMPTS[0], seed) for seed in range(6)]
    first, second = in_order(engine.generate(requests, params)), in_order(engine.generate(requests, params))
    assert [c.ids for c in first] == [c.ids for c in second]
    assert len({c.ids for c in first}) > 3


def test_greedy_takes_the_most_likely_token_of_a_single_run(engine, policy):
    [completion] = in_order(engine.generate([Request(PROMPTS[2], 0)], SamplingParams(max_tokens=8, temperature=0.0)))
    ids = list(PROMPTS[2])
    for token in completion.ids:
        with torch.no_grad():
            logits = policy.base(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
        assert logits[token] >= logits.max() - 1e-4
        ids.append(token)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainer(engine, policy, temperature):
    """After a cut only where they are said to be those before it."""
    cuts = {"top_k": 20, "top_p": 0.9, "min_p": 0.01} if engine.describe().logprobs == "uncut" else {}
    requests = ask(seeds=(4,))
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=9, temperature=temperature, **cuts)))
    sequences = [(r.prompt_ids + c.ids, len(r.prompt_ids)) for r, c in zip(requests, completions, strict=True)]
    for completion, scored in zip(completions, score_sequences(policy, sequences, temperature), strict=True):
        assert completion.logp == pytest.approx(scored, abs=2e-4)
        assert max(completion.logp) < 0


def test_scores_are_those_of_the_trainer(engine, policy):
    sequences = [((*prompt, 7, 9), len(prompt)) for prompt in PROMPTS]
    for found, expected in zip(engine.score(sequences), score_sequences(policy, sequences), strict=True):
        assert found == pytest.approx(expected, abs=2e-4)


def test_a_stop_token_ends_and_is_kept(engine):
    params = SamplingParams(max_tokens=8)
    [free] = in_order(engine.generate([Request(PROMPTS[0], 1)], params))
    stop = free.ids[3]
    [stopped] = in_order(
        engine.generate([Request(PROMPTS[0], 1)], SamplingParams(max_tokens=8, stop_token_ids=(stop,)))
    )
    assert stopped.ids == free.ids[: free.ids.index(stop) + 1]
    assert stopped.finish == "stop"
    assert len(stopped.logp) == len(stopped.ids)


def test_the_engines_own_stop_tokens_end_too(engine, make):
    [free] = in_order(engine.generate([Request(PROMPTS[0], 1)], SamplingParams(max_tokens=8)))
    stopping = make((free.ids[2],))
    [stopped] = in_order(stopping.generate([Request(PROMPTS[0], 1)], SamplingParams(max_tokens=8)))
    assert stopped.ids == free.ids[: free.ids.index(free.ids[2]) + 1]


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(engine, policy):
    decode = policy.tokenizer.decode
    [free] = in_order(engine.generate([Request(PROMPTS[0], 1)], SamplingParams(max_tokens=16)))
    text = decode(list(free.ids[4:6]))
    [ended] = in_order(
        engine.generate([Request(PROMPTS[0], 1)], SamplingParams(max_tokens=16, stop=("never said", text)))
    )
    assert ended.finish == "stop"
    assert ended.ids == free.ids[: len(ended.ids)]
    assert text in decode(list(ended.ids))
    assert text not in decode(list(ended.ids[:-1]))


def test_a_stop_string_that_is_a_special_token_matches(engine, tokenizer):
    """It is no token that the engine stops at by itself, and it is left out of the text that rewards see."""
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    asked = [Request((special, 7, special), seed) for seed in range(200)]
    free = in_order(engine.generate(asked, SamplingParams(max_tokens=12, top_k=60)))
    hit = next(n for n, completion in enumerate(free) if special in completion.ids[:-1])
    [ended] = in_order(engine.generate([asked[hit]], SamplingParams(max_tokens=12, top_k=60, stop=("<|im_start|>",))))
    assert ended.ids == free[hit].ids[: free[hit].ids.index(special) + 1]
    assert ended.finish == "stop"


def test_max_tokens_ends_with_length(engine):
    for completion in in_order(engine.generate(ask(), SamplingParams(max_tokens=1))):
        assert (len(completion.ids), completion.finish) == (1, "length")


def test_rows_of_different_lengths_leave_and_others_take_their_places(engine):
    """More requests than places, ending at different times by stop tokens."""
    params = SamplingParams(max_tokens=12, stop_token_ids=tuple(range(0, 288, 4)))
    requests = ask(seeds=range(3))
    together = in_order(engine.generate(requests, params))
    assert len({len(c.ids) for c in together}) > 2
    for request, completion in zip(requests, together, strict=True):
        [alone] = in_order(engine.generate([request], params))
        assert alone.ids == completion.ids


def test_an_empty_prompt_is_an_error_that_names_it(engine):
    with pytest.raises(EngineError, match="request 1 has an empty prompt"):
        in_order(engine.generate([Request((5,), 0), Request((), 0)], SamplingParams(max_tokens=2)))


def test_no_requests_no_completions(engine):
    assert in_order(engine.generate([], SamplingParams(max_tokens=2))) == []


def test_a_sync_sets_the_version_that_completions_carry(engine, policy):
    engine.update(policy, 7)
    assert engine.policy_version == 7
    [completion] = in_order(engine.generate([Request((5,), 0)], SamplingParams(max_tokens=1)))
    assert completion.policy_version == 7


def test_scores_of_part_of_a_sequence(engine):
    ids = PROMPTS[2]
    [whole], [part] = engine.score([(ids, 1)]), engine.score([(ids, 9)])
    assert len(whole) == len(ids) - 1
    assert part == pytest.approx(whole[8:], abs=1e-5)
    for start in (0, len(ids) + 1):
        with pytest.raises(EngineError, match=f"start={start} of a sequence of {len(ids)} tokens"):
            engine.score([(ids, start)])
