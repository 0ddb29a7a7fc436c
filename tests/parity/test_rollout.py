"""The embedded engine against transformers: greedy tokens, log-probs, and independence of the batch."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.stages import ModelKeys
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

FAMILIES = ["qwen3", "llama", "mistral", "gemma2", "gemma3_text"]
LONGEST = 24


def _prompts():
    rng = random.Random(2)
    return [tuple(rng.randrange(3, 300) for _ in range(length)) for length in (1, 3, 20, 7, 12)]


def _engine(folder, batch_size=64):
    policy = load_policy(ModelKeys(base_model=str(folder), device="cpu"), trainable=False)
    stops = stop_token_ids(policy.base, policy.tokenizer)
    return EmbeddedEngine(policy, stop_token_ids=stops, batch_size=batch_size)


def _fresh_logp(model, prompt, completion, temperature=1.0):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_generate(model_dir, family):
    folder = model_dir(family)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    completions = in_order(
        _engine(folder).generate(
            [Request(prompt, seed=0) for prompt in _prompts()], SamplingParams(LONGEST, temperature=0.0)
        )
    )
    for prompt, completion in zip(_prompts(), completions, strict=True):
        ids = torch.tensor([prompt])
        whole = plain.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LONGEST, cache_implementation=None
        )
        assert list(completion.ids) == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_logprobs_are_those_of_a_fresh_forward(model_dir, family):
    """Each prompt three times, fewer rows than requests: rows are refilled, prompts shared, windows passed."""
    folder = model_dir(family)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    engine = _engine(folder, batch_size=4)
    requests = [Request(prompt, seed=10 * i + j) for i, prompt in enumerate(_prompts()) for j in range(3)]
    completions = in_order(engine.generate(requests, SamplingParams(LONGEST, temperature=0.8)))
    assert len({completion.ids for completion in completions}) == len(requests)
    for request, completion in zip(requests, completions, strict=True):
        expected = _fresh_logp(plain, request.prompt_ids, completion.ids, temperature=0.8)
        torch.testing.assert_close(torch.tensor(completion.logp), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_completion_does_not_depend_on_its_batch(model_dir, family):
    requests = [Request(prompt, seed=7 * i + j) for i, prompt in enumerate(_prompts()) for j in range(3)]
    params = SamplingParams(LONGEST, temperature=1.0, top_p=0.95)
    folder = model_dir(family)
    together = in_order(_engine(folder).generate(requests, params))
    backwards = in_order(_engine(folder, batch_size=5).generate(requests[::-1], params))[::-1]
    alone = [in_order(_engine(folder).generate([request], params))[0] for request in requests[:4]]
    assert [c.ids for c in together] == [c.ids for c in backwards]
    assert [c.ids for c in together[:4]] == [c.ids for c in alone]
    for one, other in zip(together, backwards, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)
