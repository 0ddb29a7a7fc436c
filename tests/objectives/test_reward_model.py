"""The loss of a reward model against float64 loops written from Bradley and Terry, and against TRL's own method."""

import math
from types import SimpleNamespace

import pytest
import torch

from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.reward_model import reward_model_loss

CHOSEN = [1.3, -0.4, 0.2, 2.0]
REJECTED = [0.3, 0.6, 0.2, -1.5]
MARGIN = [0.0, 0.5, 1.0, 0.25]


def by_hand(coefficient):
    """Value, and d/d chosen and d/d rejected: −(1 − p)/P + 2c(w + l)/P with p = σ(w − l − m); the first with + for rejected."""
    value, chosen, rejected = 0.0, [], []
    for w, low, m in zip(CHOSEN, REJECTED, MARGIN, strict=True):
        p = 1 / (1 + math.exp(-(w - low - m)))
        value += (-math.log(p) + coefficient * (w + low) ** 2) / 4
        chosen.append((-(1 - p) + 2 * coefficient * (w + low)) / 4)
        rejected.append(((1 - p) + 2 * coefficient * (w + low)) / 4)
    return value, chosen, rejected


def ours(coefficient, rows=slice(None)):
    chosen, rejected = (torch.tensor(x[rows], dtype=torch.float64, requires_grad=True) for x in (CHOSEN, REJECTED))
    margin = torch.tensor(MARGIN[rows], dtype=torch.float64)
    terms = reward_model_loss(chosen, rejected, margin, coefficient, Normalizer(tokens=0, sequences=4))
    terms.loss.backward()
    return terms, chosen.grad, rejected.grad


@pytest.mark.parametrize("coefficient", [0.0, 0.01, 0.5])
def test_value_and_gradient_are_those_of_the_equation(coefficient):
    value, chosen, rejected = by_hand(coefficient)
    terms, for_chosen, for_rejected = ours(coefficient)
    assert float(terms.loss.detach()) == pytest.approx(value, rel=1e-12)
    assert for_chosen.tolist() == pytest.approx(chosen, rel=1e-12)
    assert for_rejected.tolist() == pytest.approx(rejected, rel=1e-12)


def test_shares_of_micro_batches_add_up():
    whole, parts = ours(0.1)[0], [ours(0.1, slice(i, j))[0] for i, j in ((0, 1), (1, 4))]
    assert float(sum(part.loss for part in parts)) == pytest.approx(float(whole.loss), rel=1e-12)


def test_accuracy_and_margin_are_counted_without_the_wanted_margin():
    metrics = {name: ratio.value for name, ratio in ours(0.0)[0].metrics.items()}
    assert metrics["rewards/accuracies"] == 0.5, "equal rewards order nothing"
    assert metrics["rewards/margins"] == pytest.approx((1.0 - 1.0 + 0.0 + 3.5) / 4)
    assert metrics["rewards/chosen"] == pytest.approx(sum(CHOSEN) / 4)


@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_it_is_the_loss_of_trl(coefficient):
    trainer = pytest.importorskip("trl").RewardTrainer
    rewards = torch.tensor([*CHOSEN, *REJECTED], dtype=torch.float64)
    nowhere = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    of = SimpleNamespace(
        model=SimpleNamespace(training=False), accelerator=nowhere, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
        _metrics={"eval": {name: [] for name in ("min_reward", "mean_reward", "max_reward", "accuracy", "margin")}},
    )  # fmt: skip
    inputs = {"margin": torch.tensor(MARGIN, dtype=torch.float64)}
    theirs = trainer.compute_loss(of, lambda **_: SimpleNamespace(logits=rewards[:, None]), inputs)
    assert float(ours(coefficient)[0].loss) == pytest.approx(float(theirs), rel=1e-12)
