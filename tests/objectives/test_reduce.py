import pytest
import torch

from posttrain.objectives.reduce import (
    REDUCTIONS,
    LossSegments,
    Normalizer,
    segment_lengths,
    segment_mean,
    segment_sum,
    sequence_sum_over_constant,
)
from posttrain.types import Counts

# Three sequences of 2, 0 and 3 tokens.
SEQ = torch.tensor([0, 0, 2, 2, 2])
TERM = torch.tensor([1.0, 3.0, 2.0, 4.0, 6.0], dtype=torch.float64)
NORM = Normalizer(tokens=5, sequences=3, max_tokens=10, prompts=2)
# The first two are of one prompt, the last of another.
PROMPT_TOKENS = torch.tensor([2, 2, 3])

# Σ = 16, token means 2 and 4, the empty sequence counts in every mean over sequences.
BY_HAND = {
    "token_mean": 16 / 5,
    "sequence_mean_of_token_mean": (2 + 0 + 4) / 3,
    "prompt_mean_of_token_mean": (4 / 2 + 12 / 3) / 2,
    "sequence_sum_over_constant": 16 / (3 * 10),
    "sequence_sum_mean": 16 / 3,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_by_hand(name):
    value = REDUCTIONS[name](TERM, LossSegments(SEQ, segment_lengths(SEQ, 3), PROMPT_TOKENS), NORM)
    assert value.item() == pytest.approx(BY_HAND[name], rel=1e-15)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_micro_batches_add_up(name):
    """Counts are global, so [sequence 0] + [sequences 1, 2] is the whole step."""
    lengths = segment_lengths(SEQ, 3)
    whole = REDUCTIONS[name](TERM, LossSegments(SEQ, lengths, PROMPT_TOKENS), NORM)
    first = REDUCTIONS[name](TERM[:2], LossSegments(SEQ[:2], lengths[:1], PROMPT_TOKENS[:1]), NORM)
    second = REDUCTIONS[name](TERM[2:], LossSegments(SEQ[2:] - 1, lengths[1:], PROMPT_TOKENS[1:]), NORM)
    assert (first + second).item() == pytest.approx(whole.item(), rel=1e-15)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_nothing_to_train_is_zero_with_a_gradient(name):
    term = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    nothing = LossSegments(none, segment_lengths(none, 2), torch.zeros(2, dtype=torch.int64))
    loss = REDUCTIONS[name](term, nothing, Normalizer(tokens=0, sequences=2, max_tokens=4, prompts=1))
    loss.backward()
    assert loss.item() == 0
    assert term.grad is not None


def test_segments_by_hand():
    assert segment_sum(TERM, SEQ, 3).tolist() == [4, 0, 12]
    assert segment_mean(TERM, SEQ, 3).tolist() == [2, 0, 4]
    assert segment_lengths(SEQ, 4).tolist() == [2, 0, 3, 0]


def test_segment_sum_keeps_the_last_bits_of_long_sums():
    """4096 × 0.1 in float32 accumulates an error of 1e-3 when added one by one; the float64 sum rounds once."""
    x = torch.full((4096,), 0.1)
    total = segment_sum(x, torch.zeros(4096, dtype=torch.int64), 1)
    assert total.item() == pytest.approx(float(x[0]) * 4096, rel=1e-7)
    assert total.dtype == torch.float32


def test_segment_sum_gradient_reaches_every_token():
    x = TERM.clone().requires_grad_()
    (segment_sum(x, SEQ, 3) * torch.tensor([1.0, 5.0, 7.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 7, 7, 7]


def test_dr_grpo_without_its_constant_is_refused():
    with pytest.raises(AssertionError, match="max_completion_length"):
        sequence_sum_over_constant(TERM, Normalizer(tokens=5, sequences=3))


def test_normalizer_from_counts():
    assert Normalizer.of(Counts(7, 2), 9) == Normalizer(7.0, 2.0, 9.0)
