"""The loss of a process reward model against float64 loops written from Math-Shepherd's equations."""

import math

import pytest
import torch

from posttrain.objectives.process_reward_model import process_reward_model_loss
from posttrain.objectives.reduce import Normalizer

LOGITS = [[0.3, 1.2], [-0.5, -0.1], [2.0, 0.4], [0.0, 0.0], [1.5, -1.0]]
LABELS = [1.0, 0.0, 0.0, 1.0, 0.25]


def by_hand():
    """r = e^b / (e^a + e^b); the mean of −y·log r − (1 − y)·log(1 − r); d/db = (r − y)/N and d/da the contrary."""
    value, gradient = 0.0, []
    for (a, b), y in zip(LOGITS, LABELS, strict=True):
        r = math.exp(b) / (math.exp(a) + math.exp(b))
        value -= (y * math.log(r) + (1 - y) * math.log(1 - r)) / 5
        gradient.append([(y - r) / 5, (r - y) / 5])
    return value, gradient


def ours(rows=slice(None)):
    logits = torch.tensor(LOGITS[rows], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor(LABELS[rows], dtype=torch.float64)
    terms = process_reward_model_loss(logits, labels, Normalizer(tokens=5, sequences=2))
    terms.loss.backward()
    return terms, logits.grad


def test_value_and_gradient_are_those_of_the_equation():
    (value, gradient), (terms, found) = by_hand(), ours()
    assert float(terms.loss.detach()) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=0)


def test_shares_of_micro_batches_add_up():
    parts = [ours(slice(i, j))[0] for i, j in ((0, 1), (1, 5))]
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(ours()[0].loss), rel=1e-12)


def test_hard_labels_are_the_cross_entropy_of_transformers_with_100_elsewhere():
    from transformers.loss.loss_utils import ForTokenClassification

    logits = torch.tensor([*LOGITS[:4], [9.0, -9.0]], dtype=torch.float32)
    config = type("Config", (), {"num_labels": 2})
    theirs = ForTokenClassification(logits, torch.tensor([1, 0, 0, 1, -100]), config)
    mine = process_reward_model_loss(logits[:4], torch.tensor(LABELS[:4]), Normalizer(tokens=4, sequences=1))
    assert float(mine.loss) == pytest.approx(float(theirs), rel=1e-6)


def test_accuracy_is_counted_of_the_right_and_of_the_wrong():
    """Of the right one of two (equal logits say wrong), of the wrong two of three: 0.25 is wrong."""
    metrics = {name: ratio.value for name, ratio in ours()[0].metrics.items()}
    assert metrics == pytest.approx({"accuracy": 3 / 5, "accuracy/right": 1 / 2, "accuracy/wrong": 2 / 3})
