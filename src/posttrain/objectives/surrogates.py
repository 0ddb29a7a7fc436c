"""Surrogates: per-token terms, to be minimised, from a ratio and an advantage. A new one is a function and a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objectives.spec import PolicySpec

Flags = dict[str, Tensor]


def clipped(ratio_M: Tensor, advantage_M: Tensor, logp_M: Tensor, spec: PolicySpec) -> Tensor:
    """−min(r·A, clip(r, 1−ε, 1+ε_high)·A); with `delta` r ≤ delta also where A < 0.

    Source: PPO, arXiv 1707.06347 eq. 7; DAPO, arXiv 2503.14476 eq. 8 (ε_high); INTELLECT-2, arXiv 2505.07291 (delta).
    """
    clipped_M = ratio_M.clamp(1 - spec.epsilon, 1 + spec.high)
    free_M = ratio_M if spec.delta is None else ratio_M.clamp(max=spec.delta)
    return -torch.minimum(free_M * advantage_M, clipped_M * advantage_M)


def clipped_flags(ratio_M: Tensor, advantage_M: Tensor, spec: PolicySpec) -> Flags:
    """Where the clip takes the gradient away: only on the side the advantage pushes to."""
    low_M = (ratio_M < 1 - spec.epsilon) & (advantage_M < 0)
    high_M = (ratio_M > 1 + spec.high) & (advantage_M > 0)
    return {"clip_ratio/low_mean": low_M, "clip_ratio/high_mean": high_M, "clip_ratio/region_mean": low_M | high_M}


def cispo(ratio_M: Tensor, advantage_M: Tensor, logp_M: Tensor, spec: PolicySpec) -> Tensor:
    """−sg(min(r, cap))·A·log π: the weight is clipped, no token loses its gradient.

    Source: MiniMax-M1, arXiv 2506.13585 eq. 4–5; the cap is `epsilon_high` itself, as in ScaleRL and TRL, not 1 + ε_high.
    """
    return -ratio_M.detach().clamp(max=spec.high) * advantage_M * logp_M


def cispo_flags(ratio_M: Tensor, advantage_M: Tensor, spec: PolicySpec) -> Flags:
    return {"cispo_clip_ratio": (ratio_M > spec.high) & (advantage_M > 0)}


def sapo(ratio_M: Tensor, advantage_M: Tensor, logp_M: Tensor, spec: PolicySpec) -> Tensor:
    """−(4/τ)·sigmoid(τ(r−1))·A, τ by the sign of A: a soft gate with slope 1 at r = 1. Source: SAPO, arXiv 2511.20347."""
    positive = torch.full_like(advantage_M, spec.sapo_temperature_pos)
    tau_M = torch.where(advantage_M > 0, positive, torch.full_like(advantage_M, spec.sapo_temperature_neg))
    return -4 / tau_M * torch.sigmoid(tau_M * (ratio_M - 1)) * advantage_M


def unclipped(ratio_M: Tensor, advantage_M: Tensor, logp_M: Tensor, spec: PolicySpec) -> Tensor:
    """−r·A, for ratios that are bounded already."""
    return -ratio_M * advantage_M


def dppo(ratio_M: Tensor, advantage_M: Tensor, logp_M: Tensor, spec: PolicySpec) -> Tensor:
    """−M·r·A: M is 0 where the token's probability has changed by more than ε to the side that the advantage pushes to.

    Source: DPPO, arXiv 2602.04879, with its binary total variation |π − π_old|; rare tokens are free to move, frequent ones are not.
    """
    return -ratio_M * advantage_M * ~_has_left(ratio_M, advantage_M, logp_M, spec)


def _has_left(ratio_M: Tensor, advantage_M: Tensor, logp_M: Tensor, spec: PolicySpec) -> Tensor:
    now_M, ratio_M = logp_M.detach().exp(), ratio_M.detach()
    change_M = now_M - now_M / ratio_M
    return ((change_M > spec.high) & (advantage_M > 0)) | ((change_M < -spec.epsilon) & (advantage_M < 0))


def no_flags(ratio_M: Tensor, advantage_M: Tensor, spec: PolicySpec) -> Flags:
    return {}


@dataclass(frozen=True, slots=True)
class Surrogate:
    """`term(ratio_M, advantage_M, logp_M, spec)` and the boolean flags that are logged as shares."""

    term: Callable[[Tensor, Tensor, Tensor, PolicySpec], Tensor]
    flags: Callable[[Tensor, Tensor, PolicySpec], Flags]


SURROGATES: dict[str, Surrogate] = {
    "clipped": Surrogate(clipped, clipped_flags),
    "cispo": Surrogate(cispo, cispo_flags),
    "sapo": Surrogate(sapo, no_flags),
    "unclipped": Surrogate(unclipped, no_flags),
    "dppo": Surrogate(dppo, no_flags),
}
