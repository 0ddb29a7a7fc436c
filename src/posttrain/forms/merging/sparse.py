"""What a task vector keeps of its entries before it is added to others: by size, by size without outliers, by chance.

Source: mergekit 0.1.5's conventions, where papers leave them open: how many are kept of a count, what is rescaled (the sum of magnitudes).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Draw = Callable[[torch.Tensor], torch.Tensor]
"""From probabilities to ones and zeros of the same shape."""
Keep = Callable[[torch.Tensor, float, float, Draw], torch.Tensor]
"""(task vector, density, the method's second number, draw) → which entries stay, as ones and zeros of its shape."""
_TINY = 1e-7


def largest(delta: torch.Tensor, density: float, _: float, __: Draw) -> torch.Tensor:
    """The share `density` of largest magnitude, at least one. Source: TIES, arXiv 2306.01708, "trim"."""
    count = max(1, int(density * delta.numel())) if density > 0 else 0
    order = torch.argsort(delta.abs().reshape(-1), descending=True)
    return _marked(delta, order[:count])


def between(delta: torch.Tensor, density: float, gamma: float, _: Draw) -> torch.Tensor:
    """`density` of all, less the share `gamma` of largest magnitude and those below. Source: Breadcrumbs, arXiv 2312.06795."""
    total = delta.numel()
    count, outliers = int(density * total), int(gamma * total)
    below = max(0, total - count - outliers)
    order = torch.sort(delta.abs().reshape(-1)).indices
    return _marked(delta, order[below : below + count])


def at_random(delta: torch.Tensor, density: float, _: float, draw: Draw) -> torch.Tensor:
    """Each with probability `density`. Source: DARE, arXiv 2311.03099."""
    return draw(torch.full_like(delta, density))


def by_rank(delta: torch.Tensor, density: float, epsilon: float, draw: Draw) -> torch.Tensor:
    """Each with a probability from density − ε to density + ε that grows with its rank in the row. Source: DELLA, arXiv 2406.11617."""
    rows = delta.abs().reshape(1, -1) if delta.dim() < 2 else delta.abs()
    ranks = rows.argsort(dim=1).argsort(dim=1).to(delta.dtype)
    share = (ranks / max(rows.shape[1] - 1, 1)).clamp(0, 1)
    return draw(density - epsilon + 2 * epsilon * share).reshape(delta.shape)


def _marked(delta: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(delta.numel(), dtype=delta.dtype)
    mask[places] = 1
    return mask.reshape(delta.shape)


def thinned(delta: torch.Tensor, mask: torch.Tensor, *, rescale: bool) -> torch.Tensor:
    """The kept entries; with `rescale` multiplied so that the sum of magnitudes is what it was."""
    kept = delta * mask
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept * (before / after) if rescale and before >= _TINY and after >= _TINY else kept
