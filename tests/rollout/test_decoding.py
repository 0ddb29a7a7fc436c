"""Rows join and leave while others decode; each is what it is alone."""

import tracemalloc

import pytest
import torch

from posttrain.rollout import decoding as decoding_module
from posttrain.rollout.decoding import Decoding, DecodingRow, Ends
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import sample, uniforms
from posttrain.types import Request, SamplingParams, in_order

ARCHITECTURES = ["qwen3", "gemma2", "mamba"]


def row(seed, prompt=(5, 6, 7), max_tokens=8, stop_ids=(), **options):
    params = SamplingParams(max_tokens, **options.pop("params", {}))
    ends = Ends(max_tokens, frozenset(stop_ids), None)
    return DecodingRow(seed, Request(prompt, seed), params, ends, **options)


def decode(policy, plan):
    """`plan`: step → rows that join then. Runs until all have ended."""
    with torch.no_grad():
        decoding = Decoding(policy, alone=not policy.ragged)
        for step in range(200):
            for new in plan.pop(step, ()):
                decoding.join(new)
            if not decoding.is_busy and not plan:
                return
            decoding.advance(4, prefill_tokens=8)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_join_at_any_time_with_their_own_params_are_what_they_are_alone(shared_policy, architecture):
    policy = shared_policy(architecture)
    rows = [
        row(1, max_tokens=12),
        row(2, (9,), params={"temperature": 0.0}),
        row(3, (5, 6, 7), params={"temperature": 0.7, "top_p": 0.9}, num_top=2),
        row(4, tuple(range(40, 60)), params={"top_k": 5}),
        row(5, (5, 6, 7), max_tokens=3),
        row(6, (8, 9), params={"min_p": 0.1}),
    ]
    decode(policy, {0: rows[:2], 3: rows[2:4], 4: rows[4:], 5: []})
    engine = EmbeddedEngine(policy, stop_token_ids=())
    for one in rows:
        [alone] = engine.generate([one.request], one.params)
        assert tuple(one.ids) == alone.ids
        assert one.logp == pytest.approx(alone.logp, abs=1e-5)
        assert one.finish == "length"


def test_a_row_that_leaves_makes_room_and_changes_no_other(shared_policy):
    policy = shared_policy("qwen3")
    gone, waiting, stays, last = row(1, max_tokens=50), row(2), row(3, (8,), max_tokens=6), row(4)
    with torch.no_grad():
        decoding = Decoding(policy, [gone, stays])
        decoding.advance(2)
        decoding.join(waiting)
        decoding.join(last)
        decoding.leave(gone)
        decoding.leave(waiting)
        while decoding.is_busy:
            decoding.advance(2)
        decoding.leave(gone)
    assert (len(gone.ids), gone.finish, waiting.ids) == (2, None, [])
    engine = EmbeddedEngine(policy, stop_token_ids=())
    for one in (stays, last):
        [alone] = engine.generate([one.request], one.params)
        assert tuple(one.ids) == alone.ids


class CountedRow(DecodingRow):
    looks = 0

    @property
    def encoded_with(self):
        CountedRow.looks += 1
        return super().encoded_with


def test_a_waiting_prompt_is_looked_at_a_few_times_however_many_wait(shared_policy):
    policy = shared_policy("qwen3")
    for count in (20, 80):
        CountedRow.looks = 0
        rows = []
        for seed in range(count):
            one = row(seed, (5 + seed // 2 % 40, 6), max_tokens=2)
            rows.append(CountedRow(one.place, one.request, one.params, one.ends))
        with torch.no_grad():
            decoding = Decoding(policy, rows)
            decoding.leave(rows[-1])
            while decoding.is_busy:
                decoding.advance(4)
        assert all(one.finish == "length" for one in rows[:-1])
        assert CountedRow.looks <= 4 * count


def test_a_prompt_is_kept_while_a_row_waits_for_it_and_no_longer(shared_policy):
    encoded = []
    with torch.no_grad():
        decoding = Decoding(shared_policy("qwen3"), [row(n, prompt) for n, prompt in enumerate([(5, 6), (7,), (5, 6)])])
        prefill = decoding._running.prefill
        decoding._running.prefill = lambda prompts: encoded.extend(prompts) or prefill(prompts)
        while decoding.is_busy:
            decoding.advance(1)
            assert set(decoding._prompts) <= {(None, (5, 6))}
        assert (encoded, decoding._prompts) == ([(5, 6), (7,)], {})
        gone = row(9, (5, 6))
        decoding.join(gone)
        decoding.join(row(10, (5, 6), max_tokens=2))
        decoding.advance(1)
        decoding.leave(gone)
        while decoding.is_busy:
            decoding.advance(1)
    assert (len(encoded), decoding._prompts) == (3, {})


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_prompts_encoded_in_parts_give_the_same_tokens_and_log_probs(shared_policy, monkeypatch, architecture):
    """Prompts of one length and of others, more than a part's limit, and one shared by two rows."""
    policy, sizes = shared_policy(architecture), []
    prompts = [tuple(range(9 + n, 9 + n + length)) for n, length in enumerate((6, 6, 30, 2, 6, 6, 9))]
    requests = [Request(prompt, n) for n, prompt in enumerate([*prompts, prompts[0]])]
    engine, params = EmbeddedEngine(policy, stop_token_ids=()), SamplingParams(12)
    whole = in_order(engine.generate(requests, params))
    monkeypatch.setattr(decoding_module, "_ENCODED_AT_ONCE", 14)
    hook = policy.base.get_input_embeddings().register_forward_hook(lambda _, args, __: sizes.append(args[0].numel()))
    parts = in_order(engine.generate(requests, params))
    hook.remove()
    assert sizes[:5] == [12, 30, 14, 9, 8]
    assert [c.ids for c in parts] == [c.ids for c in whole]
    for one, other in zip(parts, whole, strict=True):
        assert one.logp == pytest.approx(other.logp, abs=1e-5)


def test_tokens_are_drawn_from_the_whole_stream_of_their_request_in_double_precision(shared_policy, monkeypatch):
    found = []

    def noted(logits_RV, uniform_R, params):
        found.append(uniform_R)
        return sample(logits_RV, uniform_R, params)

    monkeypatch.setattr(decoding_module, "sample", noted)
    decode(shared_policy("qwen3"), {0: [row(7, max_tokens=70)]})
    assert torch.equal(torch.cat(found), torch.from_numpy(uniforms(7, 70)))


def test_a_row_that_waits_takes_no_memory_for_how_long_it_may_become():
    tracemalloc.start()
    rows = [row(seed, max_tokens=100_000) for seed in range(50)]
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(rows) == 50 and taken < 50 * 4000


def test_likeliest_tokens_are_those_of_the_model_before_temperature_and_cuts(shared_policy):
    policy = shared_policy("qwen3")
    one = row(1, params={"temperature": 0.5, "top_k": 3}, num_top=4)
    decode(policy, {0: [one, row(2, num_top=0)]})
    for at, (token, noted) in enumerate(zip(one.ids, one.likeliest, strict=True)):
        with torch.no_grad():
            ids = torch.tensor([[5, 6, 7, *one.ids[:at]]])
            logp_V = policy.base(ids, use_cache=False, logits_to_keep=1).logits[0, -1].log_softmax(-1)
        assert noted.logp == pytest.approx(float(logp_V[token]), abs=1e-5)
        assert [i for i, _ in noted.top] == logp_V.topk(4).indices.tolist()
        assert [p for _, p in noted.top] == pytest.approx(logp_V.topk(4).values.tolist(), abs=1e-5)


def test_a_shaper_decides_what_can_be_sampled_and_aborts_a_row_that_it_leaves_nothing(shared_policy):
    policy = shared_policy("qwen3")

    def only(tokens):
        def shape(ids, logits_V):
            kept = torch.full_like(logits_V, -torch.inf)
            if len(ids) < len(tokens):
                kept[tokens[len(ids)]] = logits_V[tokens[len(ids)]]
            return kept

        return shape

    forced, free = row(1, max_tokens=20, shaper=only([40, 41, 42])), row(2)
    decode(policy, {0: [forced, free]})
    assert (forced.ids, forced.finish) == ([40, 41, 42], "aborted")
    [alone] = EmbeddedEngine(policy, stop_token_ids=()).generate([free.request], free.params)
    assert tuple(free.ids) == alone.ids
