"""Teachers against float64 loops written from the papers; sampled losses against the sum over the whole vocabulary."""

import math

import pytest
import torch
from torch.testing import assert_close

from posttrain.objectives.distill import (
    DIVERGENCES,
    TEACHER_ADVANTAGES,
    DistillSpec,
    Head,
    coefficient_at,
    divergence,
    sampled_reverse_kl,
)

V = 23


def logits(seed, rows=1, vocab=V):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- advantages ------------------------------------------------------------------------------------------------------


def rlsd_by_hand(advantage, log_teacher, log_student, lam, eps):
    sign = (advantage > 0) - (advantage < 0)
    weight = math.exp(sign * (log_teacher - log_student))
    return advantage * ((1 - lam) + lam * min(max(weight, 1 - eps), 1 + eps))


@pytest.mark.parametrize("advantage", [1.5, -0.7, 0.0])
def test_rlsd_is_the_papers_formula(advantage):
    teacher, student = torch.tensor([-0.1, -3.0, -1.0]).double(), torch.tensor([-0.2, -1.0, -1.0]).double()
    found = TEACHER_ADVANTAGES["rlsd"](torch.tensor(advantage).double(), teacher - student, 0.5, 0.2)
    pairs = zip(teacher.tolist(), student.tolist(), strict=True)
    assert found.tolist() == pytest.approx([rlsd_by_hand(advantage, t, s, 0.5, 0.2) for t, s in pairs])


@pytest.mark.parametrize("lam", [0.1, 0.3, 0.5, 1.0])
def test_rlsd_never_turns_a_sign_and_stays_within_its_clip(lam):
    ratios_M = 30 * logits(0, 1, 500)[0]
    for advantage in (2.0, -2.0):
        found_M = TEACHER_ADVANTAGES["rlsd"](torch.tensor(advantage).double(), ratios_M, lam, 0.2)
        assert (torch.sign(found_M) == math.copysign(1, advantage)).all()
        shares_M = found_M / advantage
        assert shares_M.min() >= 1 - 0.2 * lam - 1e-12 and shares_M.max() <= 1 + 0.2 * lam + 1e-12
        assert shares_M.min() < 1 < shares_M.max()


def test_rlsd_gives_what_a_teacher_prefers_more_of_the_praise_and_less_of_the_blame():
    for advantage in (1.0, -1.0):
        liked, disliked = TEACHER_ADVANTAGES["rlsd"](torch.tensor(advantage), torch.tensor([0.1, -0.1]), 0.5, 0.2)
        assert liked > disliked


def test_tokens_that_a_privileged_teacher_knows_never_gain_on_a_wrong_answer():
    """However much likelier the given answer makes a token for the teacher, a negative reward pushes it down."""
    ratios_M = torch.tensor([0.0, 1.0, 10.0, 500.0]).double()
    assert (TEACHER_ADVANTAGES["rlsd"](torch.tensor(-1.0).double(), ratios_M, 1.0, 0.2) < 0).all()


@pytest.mark.parametrize("name", TEACHER_ADVANTAGES)
@pytest.mark.parametrize("advantage", [0.37, -1.234567, 0.0])
def test_without_weight_or_difference_the_advantage_is_what_it_was_to_the_bit(name, advantage):
    of_tokens, given = TEACHER_ADVANTAGES[name], torch.tensor(advantage, dtype=torch.float64)
    assert (of_tokens(given, logits(1)[0], 0.0, 0.2) == given).all()
    for coef in (0.1, 0.3, 0.7, 1.0):
        assert (of_tokens(given, torch.zeros(5, dtype=torch.float64), coef, 0.2) == given).all()


def test_opd_adds_what_the_teacher_finds_likelier():
    found = TEACHER_ADVANTAGES["opd"](torch.tensor(1.0), torch.tensor([0.5, -2.0]), 0.1, 0.2)
    assert found.tolist() == pytest.approx([1.05, 0.8])


def test_the_coefficient_rises_and_falls_by_the_step():
    found = [coefficient_at(0.5, step, 2, 4) for step in range(8)]
    assert found == pytest.approx([0.0, 0.25, 0.5, 0.375, 0.25, 0.125, 0.0, 0.0])
    assert [coefficient_at(0.5, step, 0, 0) for step in (0, 1000)] == [0.5, 0.5]


# --- divergences -----------------------------------------------------------------------------------------------------


def kl_by_hand(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def by_hand(name, student, teacher, beta):
    s, t = torch.softmax(student[0], -1).tolist(), torch.softmax(teacher[0], -1).tolist()
    mixed = [beta * a + (1 - beta) * b for a, b in zip(t, s, strict=True)]
    return {
        "forward_kl": lambda: kl_by_hand(t, s),
        "reverse_kl": lambda: kl_by_hand(s, t),
        "jsd": lambda: beta * kl_by_hand(t, mixed) + (1 - beta) * kl_by_hand(s, mixed),
    }[name]()


def slope_by_hand(name, student, teacher, beta, h=1e-6):
    moved = [student.clone() for _ in range(2 * V)]
    for v in range(V):
        moved[2 * v][0, v] += h
        moved[2 * v + 1][0, v] -= h
    values = [by_hand(name, one, teacher, beta) for one in moved]
    return torch.tensor([[(values[2 * v] - values[2 * v + 1]) / (2 * h) for v in range(V)]]).double()


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_divergence_and_its_gradient_are_the_definitions(name, beta):
    student, teacher = logits(2).requires_grad_(), logits(3)
    spec = DistillSpec(name, beta)
    term, said = divergence(Head(student), Head(teacher), torch.tensor([4]), spec)
    term.sum().backward()
    assert float(term.detach()) == pytest.approx(by_hand(name, student.detach(), teacher, beta))
    assert_close(student.grad, slope_by_hand(name, student.detach(), teacher, beta), rtol=1e-5, atol=1e-8)
    s, t = torch.log_softmax(student.detach()[0], -1), torch.log_softmax(teacher[0], -1)
    assert said[:, 0].tolist() == pytest.approx(
        [float(s[4] - t[4]), float(-(s.exp() * s).sum()), float(s.argmax() == t.argmax())]
    )


def expected_gradient(k, student, teacher):
    """Of the term, over every token that may have been sampled, each with its probability."""
    chance = torch.softmax(student[0], -1)
    value, gradient = 0.0, torch.zeros(V, dtype=torch.float64)
    for token in range(V):
        z = student.clone().requires_grad_()
        if k:
            spec = DistillSpec("opd", teacher_top_k=k)
            term, _ = divergence(Head(z), Head(teacher), torch.tensor([token]), spec)
        else:
            own, taught = (torch.log_softmax(x[0], -1)[token : token + 1] for x in (z, teacher))
            term = sampled_reverse_kl(own, taught)
        term.sum().backward()
        value += float(chance[token] * term.detach())
        gradient += chance[token] * z.grad[0]
    return value, gradient


@pytest.mark.parametrize("k", [0, 1, 5, V - 1, V, 100])
def test_over_all_tokens_opd_is_the_reverse_kl_in_value_and_gradient(k):
    student, teacher = logits(5), logits(6)
    exact = student.clone().requires_grad_()
    term, _ = divergence(Head(exact), Head(teacher), torch.tensor([0]), DistillSpec("reverse_kl"))
    term.sum().backward()
    value, gradient = expected_gradient(k, student, teacher)
    assert value == pytest.approx(float(term.detach()))
    assert_close(gradient, exact.grad[0], rtol=1e-9, atol=1e-12)


def test_more_tokens_exact_is_less_noise():
    student, teacher = logits(7), logits(8)
    chance = torch.softmax(student[0], -1)

    def spread(k):
        whole, mean = 0.0, expected_gradient(k, student, teacher)[1]
        for token in range(V):
            z = student.clone().requires_grad_()
            spec = DistillSpec("opd", teacher_top_k=k)
            divergence(Head(z), Head(teacher), torch.tensor([token]), spec)[0].sum().backward()
            whole += float(chance[token] * (z.grad[0] - mean).square().sum())
        return whole

    spreads = [spread(k) for k in (1, 8, 16, V)]
    assert spreads == sorted(spreads, reverse=True) and spreads[-1] < 1e-20


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_teacher_that_is_the_student_teaches_nothing(name):
    student = logits(9, 4).requires_grad_()
    spec = DistillSpec(name, teacher_top_k=3)
    term, said = divergence(Head(student), Head(student.detach().clone()), torch.tensor([0, 1, 2, 3]), spec)
    term.sum().backward()
    assert term.abs().max() < 1e-12 and student.grad.abs().max() < 1e-12
    assert said[0].tolist() == [0.0] * 4 and said[2].tolist() == [1.0] * 4


@pytest.mark.parametrize("name", DIVERGENCES)
def test_tiles_and_temperature_and_a_longer_head_change_nothing_but_memory(name, monkeypatch):
    """A head of hidden states is the logits that it makes; rows beyond the other head's vocabulary are left out."""
    hidden, weight = logits(10, 9, 6), logits(11, V, 6)
    taught, longer = logits(12, 9, V), torch.cat([logits(12, 9, V), torch.full((9, 3), 50.0).double()], 1)
    target, spec = torch.arange(9), DistillSpec(name, teacher_top_k=4, temperature=0.7)
    found = []
    for rows, teacher in ((1000, taught), (4, longer)):
        monkeypatch.setattr("posttrain.objectives.distill.head_tile_rows", lambda *_, rows=rows: rows)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        term, said = divergence(Head(h, w, softcap=5.0), Head(teacher), target, spec)
        term.sum().backward()
        found.append((term.detach(), said, h.grad, w.grad))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-12)
    capped = 5.0 * torch.tanh(hidden @ weight.t() / 5.0)
    assert_close(divergence(Head(capped), Head(taught), target, spec)[0], found[0][0], rtol=1e-10, atol=1e-12)
