"""KL of the policy to its reference, estimated from sampled tokens, and the controllers that steer KL and entropy.

With x = log π(y) − log π_ref(y) for a token y ~ π:  k1 = x,  k2 = x²/2,  k3 = e^(−x) + x − 1.
k1 and k3 are unbiased for KL(π‖π_ref); k2 and k3 are never negative. Source: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.objectives.ratios import LOG_RATIO_MAX


def k1(policy_logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    return policy_logp_M - ref_logp_M


def k2(policy_logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    return (policy_logp_M - ref_logp_M) ** 2 / 2


def k3(policy_logp_M: Tensor, ref_logp_M: Tensor) -> Tensor:
    # The log ratio itself is clamped: with only its exponential clamped, −x alone is left beyond, which pulls away.
    log_ratio_M = (ref_logp_M - policy_logp_M).clamp(max=LOG_RATIO_MAX)
    return torch.exp(log_ratio_M) - log_ratio_M - 1


KLEstimator = Callable[[Tensor, Tensor], Tensor]
KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3}


def kl_in_loss(estimator: str, policy_logp_M: Tensor, ref_logp_M: Tensor, ratio_M: Tensor | None) -> Tensor:
    """Per-token KL term for the loss; with a ratio its gradient is that of KL(π‖π_ref), also off-policy.

    As a loss, k1 and k3 need the gradient through the sampling distribution, that is the differentiable ratio; k2's own
    gradient x·∇log π already is it, so its ratio only reweights. Without a ratio k1 has expected gradient 0.
    Source: DeepSeek-V3.2, arXiv 2512.02556 (unbiased KL estimate); Tang & Munos, arXiv 2506.09477.
    """
    kl_M = KL_ESTIMATORS[estimator](policy_logp_M, ref_logp_M)
    if ratio_M is None:
        return kl_M
    return kl_M * (ratio_M.detach() if estimator == "k2" else ratio_M)


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """Multiplies beta so that the KL stays near its target. Source: Ziegler et al. 2019, arXiv 1909.08593 sec. 2.2."""

    beta: float
    target: float
    gain: float = 0.1
    limit: float = 0.2

    def update(self, kl: float) -> AdaptiveKL:
        """The controller after a step with this mean KL per sequence; a NaN changes nothing."""
        if math.isnan(kl):
            return self
        error = min(max(kl / self.target - 1, -self.limit), self.limit)
        return replace(self, beta=self.beta * (1 + self.gain * error))


@dataclass(frozen=True, slots=True)
class AdaptiveEntropy:
    """Moves the entropy bonus by a fixed step towards a target entropy in nats. Source: Skywork-OR1, arXiv 2505.22312."""

    coef: float
    target: float = 0.2
    step: float = 0.005
    low: float = 0.0
    high: float = 1.0
    entropy: float = math.inf

    @property
    def applied(self) -> float:
        """The coefficient for the next step: 0 while the entropy measured last is above the target."""
        return self.coef if self.entropy <= self.target else 0.0

    def update(self, entropy: float) -> AdaptiveEntropy:
        """The controller after a step with this token-mean entropy; a NaN changes nothing."""
        if math.isnan(entropy):
            return self
        moved = self.coef + (self.step if entropy <= self.target else -self.step)
        return replace(self, coef=min(max(moved, self.low), self.high), entropy=entropy)
