"""Prompts of one length lie together, whoever comes and goes, and are attended to in one call with the bits of one call each."""

import random

import pytest
import torch

from posttrain.rollout import kv
from posttrain.rollout.cached import Shortcuts
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.kv import Padding
from posttrain.rollout.paged import PagedRows
from posttrain.rollout.prompts import PromptKV, PromptPool
from posttrain.types import Request, SamplingParams, in_order


def _encode(pool, numbers):
    """Prompts whose keys are their numbers, and whose values ten times that."""
    prompts = pool.reserve([pool.width] * len(numbers))
    for prompt, number in zip(prompts, numbers, strict=True):
        keys = torch.full((2, pool.width, 4), float(number))
        for layer in range(2):
            pool.keep(layer, prompt, keys, 10 * keys)
    return dict(zip(numbers, prompts, strict=True))


def test_live_prompts_are_one_range_and_keep_what_was_encoded():
    rng, pool, held, rows, made = random.Random(0), PromptPool(3), {}, [], 0
    for _ in range(400):
        deed = rng.choice(("encode", "enter", "enter", "leave", "leave", "forget"))
        if deed == "encode" and len(held) < 9:
            count = rng.randint(1, 3)
            held |= _encode(pool, list(range(made, made + count)))
            made += count
        elif deed == "enter" and held:
            rows.append(rng.choice(list(held)))
            pool.enter(held[rows[-1]])
        elif deed == "leave" and rows:
            pool.leave(held[rows.pop(rng.randrange(len(rows)))])
        elif deed == "forget":
            held = {number: prompt for number, prompt in held.items() if number in rows or rng.random() < 0.7}
        assert {prompt.place for prompt in pool.live()} == set(range(len(set(rows))))
        for number, prompt in held.items():
            assert prompt.num_rows == rows.count(number)
            assert all((keys[prompt.place] == number).all() for keys in pool.keys)
            assert all((values[prompt.place] == 10 * number).all() for values in pool.values)
    assert made > 40
    assert len(pool.keys[0]) <= 4 * 9 + 3


def test_a_pool_gives_memory_back_when_its_prompts_are_gone():
    pool = PromptPool(3)
    held = _encode(pool, list(range(32)))
    held = {number: held[number] for number in (5, 30)}
    held |= _encode(pool, [40])
    assert len(pool.keys[0]) == 3
    assert [float(pool.keys[1][prompt.place].max()) for prompt in held.values()] == [5, 30, 40]
    held.clear()
    assert not pool.is_held


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_prompts_of_one_length_are_attended_to_in_one_call_with_the_bits_of_one_call_each(
    shared_policy, monkeypatch, family
):
    engine = EmbeddedEngine(shared_policy(family), stop_token_ids=(2,), batch_size=16)
    prompts = [tuple(range(40 + n, 52 + n + 7 * (n % 2))) for n in range(20)]
    requests = [Request(prompt, 3 * n + i) for n, prompt in enumerate(prompts) for i in range(1 + n // 16)]
    calls, attend = [], kv.attend_masked
    monkeypatch.setattr(kv, "attend_masked", lambda *args: (calls.append(1), attend(*args))[1])
    together = in_order(engine.generate(requests, SamplingParams(max_tokens=30)))
    num_together = len(calls)
    calls.clear()
    monkeypatch.setattr(kv, "_in_flash", lambda *args: False)
    apart = in_order(engine.generate(requests, SamplingParams(max_tokens=30)))
    assert together == apart
    assert num_together < 0.7 * len(calls)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2"])
def test_prompts_of_near_length_are_attended_to_together_where_asked_with_the_trainers_log_probs(
    shared_policy, monkeypatch, family
):
    """Lengths of 3 to 50 tokens, one to three completions each, rows that come and go."""
    policy, params = shared_policy(family), SamplingParams(max_tokens=24)
    prompts = [tuple(range(40 + n, 43 + n + 11 * n % 48)) for n in range(12)]
    requests = [Request(prompt, 3 * n + i) for n, prompt in enumerate(prompts) for i in range(1 + n % 3)]
    calls, attend = [], kv.attend_masked
    monkeypatch.setattr(kv, "attend_masked", lambda *args: (calls.append(1), attend(*args))[1])
    apart = in_order(EmbeddedEngine(policy, stop_token_ids=(2,), batch_size=16).generate(requests, params))
    num_apart = len(calls)
    calls.clear()
    engine = EmbeddedEngine(policy, stop_token_ids=(2,), batch_size=16, shortcuts=Shortcuts(pad_prompts=True))
    together = in_order(engine.generate(requests, params))
    assert len(calls) < 0.5 * num_apart
    assert [c.ids for c in together] == [c.ids for c in apart]
    scored = engine.score(
        [((*r.prompt_ids, *c.ids), len(r.prompt_ids)) for r, c in zip(requests, together, strict=True)]
    )
    for completion, logp in zip(together, scored, strict=True):
        assert completion.logp == pytest.approx(logp, abs=1e-5)


def test_prompts_are_filled_up_while_that_costs_less_than_the_calls_it_saves():
    """A call costs 100 pairs of a row and a key. Lengths 30 and 40 with one row each waste 10; with 8 rows 80; with 12, 120."""
    pool, padding = PromptPool(64), Padding(100)
    for rows, joins in ((1, True), (8, True), (12, False)):
        short, long = (PromptKV(pool, place, length, rows) for place, length in enumerate((30, 40)))
        assert padding.joins([short], long) == joins
    many, one = PromptKV(pool, 0, 40, 8), PromptKV(pool, 1, 40, 1)
    assert not padding.joins([many], one)
    assert padding.joins([PromptKV(pool, n, 40, 8) for n in range(3)], one)


def test_pools_are_few_and_none_is_wider_than_a_call_pays_for():
    padding = Padding.of(256)
    for length in range(1, 600):
        assert 0 <= padding.width(length) - length < padding.call_pairs
    assert len({padding.width(length) for length in range(1, 600)}) < 12
    assert Padding.of(1 << 20).width(77) == 77


def test_where_nothing_is_filled_up_the_key_says_so(shared_policy, monkeypatch, caplog):
    EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=(), shortcuts=Shortcuts(pad_prompts=True))
    assert not caplog.text
    EmbeddedEngine(shared_policy("mamba"), stop_token_ids=(), shortcuts=Shortcuts(pad_prompts=True))
    assert "pad_prompts: no effect, because" in caplog.text and "decodes row by row" in caplog.text
    caplog.clear()
    monkeypatch.setattr("posttrain.rollout.embedded.paged_rows", PagedRows)
    EmbeddedEngine(shared_policy("qwen3"), stop_token_ids=(), shortcuts=Shortcuts(pad_prompts=True))
    assert "pad_prompts: no effect, because pages need no filling up" in caplog.text
