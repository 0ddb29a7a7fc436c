"""Each loss of Tinker's API against float64 loops written from its page, value and gradient."""

import math

import pytest
import torch

from posttrain.errors import ConfigError, DataError
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.sft import sft_loss
from posttrain.objectives.tinker import TINKER_LOSSES, tinker_loss

LOGP = [-0.1, -2.0, -0.7, -1.3, -3.0, -0.2]
GIVEN = {
    "logprobs": [-0.2, -0.5, -0.7, -2.9, -1.0, -0.9],
    "advantages": [1.0, 1.5, -0.5, -2.0, 0.0, 0.7],
    "weights": [0.0, 1.0, 2.0, -0.5, 1.0, 0.25],
}


def by_hand(name, p, q, a, w, config):
    """Loss and derivative by p of one token."""
    r = math.exp(p - q)
    if name == "cross_entropy":
        return -w * p, -w
    if name == "importance_sampling":
        return -r * a, -r * a
    if name == "dro":
        return -(a * p - config["beta"] / 2 * (p - q) ** 2), -(a - config["beta"] * (p - q))
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    held = min(max(r, low), high)
    if name == "cispo":
        return -held * a * p, -held * a
    return (-r * a, -r * a) if r * a <= held * a else (-held * a, 0.0)


@pytest.mark.parametrize("name", TINKER_LOSSES)
@pytest.mark.parametrize("config", [{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1}, {"beta": 0.3}])
def test_a_loss_is_its_formula_summed(name, config):
    config = {key: value for key, value in config.items() if key in TINKER_LOSSES[name].defaults}
    row, whole = tinker_loss(name, config)
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    given = {key: torch.tensor(values, dtype=torch.float64) for key, values in GIVEN.items()}
    term = row.term(logp, given, whole)
    term.sum().backward()
    expected = [by_hand(name, p, *numbers, whole) for p, *numbers in zip(LOGP, *GIVEN.values(), strict=True)]
    torch.testing.assert_close(term.detach(), torch.tensor([loss for loss, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(logp.grad, torch.tensor([slope for _, slope in expected], dtype=torch.float64))


def test_cross_entropy_is_our_sft_loss_times_its_tokens():
    logp = torch.tensor(LOGP)
    row, whole = tinker_loss("cross_entropy", {})
    ours = sft_loss(logp, Normalizer(len(LOGP), 1)).loss
    torch.testing.assert_close(row.term(logp, {"weights": torch.ones(6)}, whole).sum(), ours * len(LOGP))


def test_what_is_not_computed_is_refused_by_name():
    for name in ("gspo", "stable_reinforce", "custom"):
        with pytest.raises(
            DataError, match=f"loss_fn: got '{name}', this server computes cross_entropy, importance_sampling"
        ):
            tinker_loss(name, {})
    with pytest.raises(ConfigError, match="cross_entropy: got 'beta', expected nothing"):
        tinker_loss("cross_entropy", {"beta": 1.0})
    with pytest.raises(ConfigError, match="beta is 'much', expected a number"):
        tinker_loss("dro", {"beta": "much"})
    with pytest.raises(ConfigError, match=r"clip_low_threshold=1.5, clip_high_threshold=1.2; expected 0 ≤ low ≤ high"):
        tinker_loss("ppo", {"clip_low_threshold": 1.5})
