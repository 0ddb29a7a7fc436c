"""Feature matching: what a completion earns by being like a given answer, and unlike others, in a frozen model's states.

Source: EBFT, arXiv 2603.12248. The features φ of a prompt with a completion are given; the objective is to bring the mean of the
policy's own to those of the answer, ‖E φ(ŷ) − φ(y)‖² (eq. 2). Everything is told from inner products, in float64, so that no
matrix is as large as φ. Knows no model and no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from posttrain.objectives.advantages import Advantages, AdvantageSpec, compute_advantages

_LEAST_SINGULAR = 1e-5
"""Directions with a smaller share of the largest singular value are rounding, and not whitened."""


@dataclass(frozen=True, slots=True)
class MatchingSpec:
    """Knobs under their configuration names."""

    use_whitening: bool = True
    alignment_coef: float = 1.0
    diversity_coef: float = 1.0
    unbiased_baseline: bool = True
    advantage_estimator: str = "rloo"
    scale_rewards: str = "group"
    advantage_eps: float = 1e-4


@dataclass(frozen=True, slots=True)
class Match:
    """Of the completions of one prompt: cosine with the answer, mean inner product with the others, both of whitened features
    where they are; and ‖mean φ(ŷ) − φ(y)‖² of the features as they are. Shapes: [G]."""

    alignment_G: Tensor
    diversity_G: Tensor
    distance: float


def match(sampled_GD: Tensor, answer_D: Tensor, *, use_whitening: bool) -> Match:
    """Source: arXiv 2603.12248 eq. 7, with the cosine in place of the first inner product as in its variant (i)."""
    rows = torch.cat([sampled_GD, answer_D[None]]).double()
    gram = rows @ rows.T
    group = len(sampled_GD)
    own_GG, with_answer_G, answer = gram[:group, :group], gram[:group, group], gram[group, group]
    distance = own_GG.mean() - 2 * with_answer_G.mean() + answer
    if use_whitening:
        own_GG, with_answer_G, answer = _whitened(own_GG, with_answer_G)
    lengths_G = (own_GG.diagonal() * answer).clamp(min=0).sqrt()
    alignment_G = torch.where(lengths_G > 0, with_answer_G / lengths_G, 0.0)
    others_GG = own_GG - torch.diag(own_GG.diagonal())
    return Match(alignment_G, others_GG.sum(1) / max(group - 1, 1), float(distance))


def _whitened(own_GG: Tensor, with_answer_G: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same inner products of (XᵀX)^(−1/2) φ, X being the features of the group; directions that it does not have are 0.

    With K = X Xᵀ and k = X φ(y) these are K K⁺, K⁺ k and ‖K⁺ k‖². Samples with independent features are orthonormal then.
    """
    values, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(own_GG))  # pyright: ignore[reportUnknownMemberType]
    kept = values > _LEAST_SINGULAR**2 * values.max().clamp(min=0)
    basis = vectors[:, kept]
    shares_G = basis @ ((basis.T @ with_answer_G) / values[kept])
    return basis @ basis.T, shares_G, shares_G.square().sum()


def matching_advantages(matches: list[Match], spec: MatchingSpec) -> Advantages:
    """Of all groups of a step, whose completions lie end to end. Reward: 2·alignment_coef·alignment − 2·diversity_coef·diversity."""
    columns = [torch.stack([one.alignment_G, one.diversity_G], 1) for one in matches]
    sizes = [len(one) for one in columns]
    group_B = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
    weights = (2 * spec.alignment_coef, -2 * spec.diversity_coef)
    how = AdvantageSpec(spec.advantage_estimator, spec.scale_rewards, spec.advantage_eps, reward_weights=weights)
    rewards_BK = torch.cat(columns)
    found = compute_advantages(rewards_BK, group_B, how)
    if not spec.unbiased_baseline or not spec.diversity_coef:
        return found
    # What others earn holds their likeness to this one. Left in the baseline it takes 1/(G − 1) of the diversity's gradient away;
    # a baseline of the others alone differs from the usual one by this factor and by nothing else.
    factor_B = torch.tensor([(size - 1) / (size - 2) for size in sizes for _ in range(size)], dtype=torch.float64)
    scaled_BK = torch.stack([rewards_BK[:, 0], factor_B * rewards_BK[:, 1]], 1)
    return replace(compute_advantages(scaled_BK, group_B, how), reward_B=found.reward_B)
