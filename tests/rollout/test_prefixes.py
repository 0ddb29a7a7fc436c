"""How prompts begin, kept between requests: no bit of an answer depends on it, and nothing crosses adapters or outgrows its room."""

import pytest
import torch

from posttrain.config.stages import ModelKeys
from posttrain.models.load import load_policy
from posttrain.models.slots import AdapterSlots
from posttrain.rollout.decoding import Decoding, DecodingRow, Ends
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.prefixes import BLOCK, PrefixCache
from posttrain.types import Request, SamplingParams, in_order

MAX_TOKENS = 6
PARAMS = SamplingParams(MAX_TOKENS)
SHARED = [3 + (7 * n) % 250 for n in range(2 * BLOCK)]
PROMPTS = [(*SHARED, *range(5, 5 + rest)) for rest in (9, 30, BLOCK)] + [
    tuple(SHARED),
    tuple(SHARED[: BLOCK + 1]),
    (4, 5),
]
LARGE = 1 << 30


@pytest.fixture(scope="module", params=["qwen3", "gemma2"])
def policy(request, model_dir):
    """Full attention; and windows of few tokens, soft caps beside them."""
    return load_policy(ModelKeys(base_model=str(model_dir(request.param))), trainable=False)


def decoded(policy, prefixes, prompts, adapters=None, names=(None,)):
    """Of each prompt and adapter: the ids, and their log-probs to the bit."""
    ends = Ends(MAX_TOKENS, frozenset(), None)
    rows = [
        DecodingRow(n, Request(prompt, n), PARAMS, ends, adapter=names[n % len(names)])
        for n, prompt in enumerate(prompts)
    ]
    with torch.no_grad():
        decoding = Decoding(policy, rows, adapters=adapters, prefixes=prefixes)
        while decoding.is_busy:
            decoding.advance(64)
    return [(tuple(row.ids), tuple(row.logp)) for row in rows]


def test_an_answer_is_the_same_to_the_bit_whether_the_cache_was_cold_warm_or_too_small(policy):
    cold = decoded(policy, PrefixCache(policy, 0), PROMPTS)
    cache = PrefixCache(policy, LARGE)
    assert decoded(policy, cache, PROMPTS) == cold
    assert cache.tokens_reused > 0
    computed = cache.tokens_computed
    assert decoded(policy, cache, PROMPTS) == cold
    assert cache.tokens_computed - computed == 9 + 30 + BLOCK + BLOCK + 1
    assert [ids for ids, _ in decoded(policy, None, PROMPTS)] == [ids for ids, _ in cold]


def test_log_probs_are_those_of_prompts_that_are_encoded_at_once(policy):
    with_blocks, at_once = (decoded(policy, prefixes, PROMPTS) for prefixes in (PrefixCache(policy, LARGE), None))
    for (_, ours), (_, theirs) in zip(with_blocks, at_once, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_room_is_never_outgrown_and_the_end_of_a_prompt_goes_before_its_beginning(policy):
    one = PrefixCache(policy, LARGE)
    decoded(policy, one, [PROMPTS[4]])
    cache = PrefixCache(policy, int(2.5 * one.num_bytes))
    for first in range(4):
        decoded(policy, cache, [(first, *SHARED), (*SHARED, 9)])
        assert 0 < cache.num_bytes <= 2.5 * one.num_bytes
    before = cache.tokens_reused
    decoded(policy, cache, [(*SHARED, 9)])
    assert cache.tokens_reused - before == 2 * BLOCK
    decoded(policy, cache, [(8, *SHARED[1:BLOCK], 9)])  # one block more: of the two kept, the later one goes
    before = cache.tokens_reused
    decoded(policy, cache, [(*SHARED, 9)])
    assert cache.tokens_reused - before == BLOCK
    narrow = PrefixCache(policy, int(1.5 * one.num_bytes))
    for _ in range(2):
        decoded(policy, narrow, [(*SHARED, 9)])
    assert narrow.tokens_reused == BLOCK


def test_nothing_crosses_adapters_and_what_is_forgotten_is_gone(model_dir):
    policy = load_policy(ModelKeys(base_model=str(model_dir("qwen3"))), trainable=False)
    slots = AdapterSlots(policy)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: 0.3 * torch.randn(shape, generator=generator)  # noqa: E731
    for name in ("a", "b"):
        slots.load(name, {m: (draw(2, s.in_features), draw(s.out_features, 2)) for m, s in slots._slots.items()})
    names, prompts = (None, "a", "b"), [PROMPTS[0]] * 3
    cold = decoded(policy, PrefixCache(policy, 0), prompts, slots, names)
    assert len({logp for _, logp in cold}) == 3
    cache = PrefixCache(policy, LARGE)
    for _ in range(2):
        assert decoded(policy, cache, prompts, slots, names) == cold
    assert cache.tokens_reused == 3 * 2 * BLOCK
    whole = cache.num_bytes
    cache.forget("a")
    assert cache.num_bytes == whole * 2 // 3
    before = cache.tokens_reused
    assert decoded(policy, cache, prompts, slots, names) == cold
    assert cache.tokens_reused - before == 2 * 2 * BLOCK


def test_an_engine_keeps_beginnings_until_its_weights_change_and_no_bit_depends_on_them(model_dir):
    policy = load_policy(ModelKeys(base_model=str(model_dir("qwen3"))), trainable=False)
    engine, other = (EmbeddedEngine(policy, stop_token_ids=(), prefix_bytes=size) for size in (LARGE, 1))
    requests = [Request(prompt, n) for n, prompt in enumerate(PROMPTS)]

    def answers(of):
        return [(c.ids, c.logp) for c in in_order(of.generate(requests, PARAMS))]

    cold = answers(engine)
    assert answers(engine) == cold == answers(other), "warm, cold, and without room"
    assert engine._prefixes.tokens_reused > other._prefixes.tokens_reused == 0
    with torch.no_grad():
        for parameter in policy.base.parameters():
            parameter.mul_(1.1)
    engine.update(None, 1)
    changed = answers(engine)
    assert changed != cold
    assert changed == answers(EmbeddedEngine(policy, stop_token_ids=(), prefix_bytes=LARGE))
    plain = in_order(EmbeddedEngine(policy, stop_token_ids=()).generate(requests, PARAMS))
    assert [c.ids for c in plain] == [ids for ids, _ in changed]


def test_where_no_beginnings_are_kept_the_key_says_so(model_dir, caplog):
    policy = load_policy(ModelKeys(base_model=str(model_dir("mamba"))), trainable=False)
    EmbeddedEngine(policy, stop_token_ids=(), prefix_bytes=LARGE)
    assert "prefix_cache_gib: no effect, because" in caplog.text
