import math

import pytest
import torch
from scipy.stats import chisquare

from posttrain.rollout.sampling import RequestUniforms, cut, request_seed, sample, stop_test, uniforms
from posttrain.types import SamplingParams


def kept_by_hand(probs, top_k, top_p, min_p):
    """Ids that stay, in plain Python: top-k, then the smallest set of the rest whose share reaches top-p, then min-p."""
    ordered = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    if top_k:
        ordered = ordered[:top_k]
    total, mass, kept = sum(probs[i] for i in ordered), 0.0, []
    for i in ordered:
        if kept and mass / total >= top_p and top_p < 1:
            break
        kept.append(i)
        mass += probs[i]
    return {i for i in kept if probs[i] >= min_p * max(probs)}


CUTS = [
    (0, 1.0, 0.0),
    (3, 1.0, 0.0),
    (1, 1.0, 0.0),
    (0, 0.5, 0.0),
    (0, 0.01, 0.0),
    (0, 1.0, 0.3),
    (5, 0.8, 0.0),
    (5, 0.9, 0.2),
    (50, 0.999, 1.0),
]


@pytest.mark.parametrize(("top_k", "top_p", "min_p"), CUTS)
def test_cut_keeps_what_a_plain_loop_keeps(top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(1)
    probs = torch.softmax(3 * torch.randn(40, 17, generator=generator, dtype=torch.float64), -1)
    result = cut(probs, SamplingParams(1, top_k=top_k, top_p=top_p, min_p=min_p))
    for row, before in zip(result.tolist(), probs.tolist(), strict=True):
        kept = kept_by_hand(before, top_k, top_p, min_p)
        assert {i for i, p in enumerate(row) if p > 0} == kept
        assert all(row[i] == before[i] for i in kept)


def test_ties_at_the_edge_of_top_k_keep_exactly_k():
    result = cut(torch.full((1, 8), 1 / 8), SamplingParams(1, top_k=3))
    assert result[0].nonzero()[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 5}],
)
def test_tokens_come_as_often_as_their_probability_says(options):
    logits = torch.tensor([[1.0, -0.5, 0.3, 2.0, -1.0, 0.0, 1.5]])
    params = SamplingParams(1, **options)
    number = 20_000
    uniform = torch.from_numpy(uniforms(11, number))
    ids, _ = sample(logits.expand(number, -1), uniform, params)
    probs = torch.softmax(logits.double() / params.temperature, -1)
    expected = cut(probs, params)[0]
    expected = (expected / expected.sum() * number).tolist()
    counts = torch.bincount(ids, minlength=7).tolist()
    possible = [i for i, e in enumerate(expected) if e > 0]
    assert sum(counts[i] for i in possible) == number
    assert chisquare([counts[i] for i in possible], [expected[i] for i in possible]).pvalue > 1e-3


def test_log_probs_are_of_the_uncut_distribution_at_the_temperature():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    ids, logp = sample(logits, torch.rand(5), SamplingParams(1, temperature=0.5, top_k=2, top_p=0.5))
    torch.testing.assert_close(logp, (logits / 0.5).log_softmax(-1).gather(-1, ids[:, None])[:, 0])


def test_temperature_zero_is_greedy_with_log_probs_at_one():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    ids, logp = sample(logits, torch.full((5,), 0.999), SamplingParams(1, temperature=0.0))
    assert torch.equal(ids, logits.argmax(-1))
    torch.testing.assert_close(logp, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-40, 1e-10])
def test_a_temperature_next_to_zero_is_the_most_likely_token_for_certain(temperature):
    logits = torch.tensor([[1.0, 1e6, -1e6, 3.0]]).expand(3, -1)
    ids, logp = sample(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), SamplingParams(1, temperature))
    assert ids.tolist() == [1, 1, 1] and logp.tolist() == [0, 0, 0]


@pytest.mark.parametrize("level", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_stay_inside_the_kept_tokens(level):
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf], [0.0, -50.0, 1.0, -80.0]])
    ids, logp = sample(logits, torch.full((2,), level, dtype=torch.float64), SamplingParams(1, top_k=2))
    assert ids[0] in (1, 2)
    assert ids[1] in (0, 2)
    assert logp.isfinite().all()


def test_uniforms_are_a_stream_that_only_the_seed_decides():
    assert uniforms(5, 4).tolist() == uniforms(5, 9)[:4].tolist()
    assert uniforms(5, 4).tolist() != uniforms(6, 4).tolist()
    assert uniforms(2**64 - 1, 3).min() >= 0


def test_random_numbers_drawn_as_they_are_needed_are_those_drawn_at_once():
    for seed in (0, 5, 2**64 - 1):
        drawn = RequestUniforms(seed)
        assert [drawn[number] for number in range(300)] == uniforms(seed, 300).tolist()
        assert [drawn[number] for number in (299, 0, 64, 63)] == uniforms(seed, 300)[[299, 0, 64, 63]].tolist()
    assert uniforms(5, 3, first=8).tolist() == uniforms(5, 11)[8:].tolist()
    # The stream is what resumed runs continue, on every machine.
    assert uniforms(5, 66)[[0, 1, 64, 65]].tolist() == [
        0.7337459554446363,
        0.5905206445727093,
        0.23977256769716782,
        0.3229888799124798,
    ]


def test_request_seeds_tell_their_parts_apart():
    seeds = {request_seed(1, 23), request_seed(12, 3), request_seed(1, 2, 3), request_seed("1", "23", "")}
    assert len(seeds) == 4
    assert request_seed(1, 23) == request_seed("1", 23)
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_a_stop_string_is_found_where_tokens_join():
    def decode(ids):
        return "".join(chr(i) for i in ids)

    hit = stop_test(["</a>", "##"], decode)
    assert not hit([ord(c) for c in "x</a"])
    assert hit([ord(c) for c in "long " * 50 + "</a>"])
    assert hit([ord("#"), ord("#")])
    assert stop_test([], decode) is None
