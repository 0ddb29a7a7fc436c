"""Models whose rows cannot be run together: each goes on from the cache that the model keeps itself, and is what it is without."""

from dataclasses import replace

import pytest
from tests.docs.test_families import SHAPES

from posttrain.config.stages import ModelKeys
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Request, SamplingParams, in_order

PROMPTS = [(5, 6, 7), (9,), tuple(range(40, 70)), (5, 6, 7)]
NUM_TOKENS = 12


def sampled(policy):
    """Completions, and how many tokens went through the model."""
    widths = []
    hook = policy.model.register_forward_pre_hook(
        lambda _, args, given: widths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    requests = [Request(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    engine = EmbeddedEngine(policy, stop_token_ids=(), batch_size=3)
    found = in_order(engine.generate(requests, SamplingParams(NUM_TOKENS)))
    hook.remove()
    return found, sum(widths)


@pytest.mark.parametrize(
    "architecture",
    ["mamba", "gpt_oss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("falcon_h1", "lfm2", "qwen3_next"))],
)
def test_tokens_and_log_probs_are_those_of_the_whole_sequence_run_again(architecture, model_dir):
    folder = model_dir(architecture, **SHAPES.get(architecture, {}))
    policy = load_policy(ModelKeys(base_model=str(folder)), trainable=False)
    assert not policy.ragged and policy.cache_is_exact
    ours, few = sampled(policy)
    theirs, many = sampled(replace(policy, cache_is_exact=False))
    assert [one.ids for one in ours] == [one.ids for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=2e-5)
    assert few <= sum(map(len, PROMPTS)) + len(PROMPTS) * (NUM_TOKENS - 1) < many / 5, "each token once"
