"""Merge methods as pure functions of one tensor from each model, and the table of their names and parameters.

Names, parameters and defaults are mergekit's. What is random takes its draw from the caller, so that a mask can be given.
Computes in the dtype of its inputs: float32, or float64 for updates of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.forms.merging.sparse import Draw, Keep, at_random, between, by_rank, largest, thinned

MergeParameters = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MergeInput:
    """One model's tensor with what the recipe says of it (`weight`, `density` …); the base says nothing of task vectors."""

    tensor: torch.Tensor
    settings: MergeParameters = field(default_factory=dict[str, Any])
    is_base: bool = False


MergeFunction = Callable[[Sequence[MergeInput], MergeParameters, Draw], torch.Tensor]


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A row of `MERGE_METHODS`. Parameters without a default are `...`.

    `shared` are said once; `of_model` of each model, the base too if `of_base`. `needs_base`: the base is one of the inputs.
    """

    merge: MergeFunction
    shared: MergeParameters = field(default_factory=dict[str, Any])
    of_model: MergeParameters = field(default_factory=dict[str, Any])
    of_base: bool = False
    needs_base: bool = False
    models: tuple[int, int] = (1, 10_000)
    others: tuple[int, int] = (0, 10_000)


def _base(inputs: Sequence[MergeInput]) -> torch.Tensor:
    return next(entry.tensor for entry in inputs if entry.is_base)


def _others(inputs: Sequence[MergeInput]) -> list[MergeInput]:
    return [entry for entry in inputs if not entry.is_base]


def linear(inputs: Sequence[MergeInput], shared: MergeParameters, _: Draw) -> torch.Tensor:
    """Σ wᵢ θᵢ, divided by Σ wᵢ unless `normalize: false`. Source: arXiv 2203.05482."""
    total = torch.zeros_like(inputs[0].tensor)
    for entry in inputs:
        total += entry.settings["weight"] * entry.tensor
    return total / sum(entry.settings["weight"] for entry in inputs) if shared["normalize"] else total


def spherical(inputs: Sequence[MergeInput], shared: MergeParameters, _: Draw) -> torch.Tensor:
    """From the base (t = 0) to the other (t = 1) along the great circle of the whole tensor; nearly parallel: a line."""
    a, b, t = _base(inputs), _others(inputs)[0].tensor, shared["t"]
    unit_a, unit_b = (tensor / _norm_or_one(tensor) for tensor in (a, b))
    cosine = float((unit_a * unit_b).sum().clamp(-1, 1))
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def _norm_or_one(tensor: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(tensor)
    return norm if norm > 1e-8 else torch.ones_like(norm)


def weighted_spherical(inputs: Sequence[MergeInput], shared: MergeParameters, _: Draw) -> torch.Tensor:
    """Great circle between two models, or between their task vectors where there is a base; whole, by rows or by columns."""
    base = next((entry.tensor for entry in inputs if entry.is_base), None)
    first, second = _others(inputs)
    total = first.settings["weight"] + second.settings["weight"]
    t = 0.5 if abs(total) < 1e-6 else second.settings["weight"] / total
    a, b = (entry.tensor if base is None else entry.tensor - base for entry in (first, second))
    if shared["nuslerp_flatten"]:
        mixed = _along_last(a.reshape(-1), b.reshape(-1), t).reshape(a.shape)
    elif shared["nuslerp_row_wise"]:
        mixed = _along_last(a.transpose(0, -1), b.transpose(0, -1), t).transpose(0, -1)
    else:
        mixed = _along_last(a, b, t)
    return mixed if base is None else base + mixed


def _along_last(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    norms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-7) for x in (a, b)]
    cosine = (a / norms[0] * (b / norms[1])).sum(-1, keepdim=True).clamp(-1, 1)
    parallel = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(parallel, 0, cosine))
    curve = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
    return torch.where(parallel, (1 - t) * a + t * b, curve)


def task_vectors(keep: Keep | None, second: str = "", *, elect: bool = False) -> MergeFunction:
    """base + λ Σ wᵢ · thinned(θᵢ − base), over the weights where normalised.

    With `elect`, an entry counts only where its sign is that of the weighted sum. Source: arXiv 2212.04089; TIES, arXiv 2306.01708.
    """

    def merge(inputs: Sequence[MergeInput], shared: MergeParameters, draw: Draw) -> torch.Tensor:
        base, others = _base(inputs), _others(inputs)
        if not others:
            return base
        deltas = torch.empty((len(others), *base.shape), dtype=base.dtype)
        for place, entry in enumerate(others):
            delta, density = entry.tensor - base, entry.settings["density"]
            if keep is not None and density < 1:
                number = entry.settings[second] if second else 0.0
                mask = keep(delta, density, number, draw) if density > 0 else torch.zeros_like(delta)
                delta = thinned(delta, mask, rescale=shared["rescale"])
            deltas[place] = delta * entry.settings["weight"]
        weights = torch.tensor([entry.settings["weight"] for entry in others], dtype=base.dtype)
        return base + shared["lambda"] * _added(deltas, weights, elect=elect, normalize=shared["normalize"])

    return merge


def _added(deltas: torch.Tensor, weights: torch.Tensor, *, elect: bool, normalize: bool) -> torch.Tensor:
    mask = _elected(deltas) if elect else torch.ones_like(deltas)
    total = (deltas * mask).sum(0)
    if not normalize:
        return total
    divisor = (weights.reshape(-1, *[1] * (deltas.dim() - 1)) * mask).sum(0)
    nothing = divisor == 0 if elect else divisor.abs() < 1e-8
    return total / torch.where(nothing, 1, divisor)


def _elected(deltas: torch.Tensor) -> torch.Tensor:
    """Ones where an entry has the sign of the sum over models; a sum of zero is positive."""
    majority = torch.where(deltas.sum(0) >= 0, 1.0, -1.0).to(deltas.dtype)
    return (deltas.sign() == majority).to(deltas.dtype)


def select_calculate_erase(inputs: Sequence[MergeInput], shared: MergeParameters, _: Draw) -> torch.Tensor:
    """Entries of highest variance over models, weighted by each model's mean square, without the minority sign. Source: arXiv 2408.07990."""
    base, others = _base(inputs), _others(inputs)
    if not others:
        return base
    deltas = torch.stack([entry.tensor - base for entry in others])
    if shared["select_topk"] < 1:
        deltas = deltas * _most_varied(deltas, shared["select_topk"])
    squares = deltas.square().reshape(len(others), -1).mean(1)
    total = squares.sum()
    shares = squares / total if total >= 1e-6 else torch.full_like(squares, 1 / len(others))
    weights = shares.reshape(-1, *[1] * (deltas.dim() - 1)) * _elected(deltas)
    return base + (deltas * weights).sum(0) / weights.sum(0).clamp(min=1e-6)


def _most_varied(deltas: torch.Tensor, share: float) -> torch.Tensor:
    variance = deltas.var(0, unbiased=False)
    mask = torch.zeros(variance.numel(), dtype=deltas.dtype)
    count = int(int(torch.count_nonzero(variance)) * share) if share > 0 else 0
    mask[torch.topk(variance.reshape(-1), count).indices] = 1
    return mask.reshape(variance.shape)


def model_stock(inputs: Sequence[MergeInput], shared: MergeParameters, _: Draw) -> torch.Tensor:
    """Between the base and the average, t = k cos θ / (1 + (k − 1) cos θ) from the mean angle of task vectors. Source: arXiv 2403.19522."""
    base, models = _base(inputs), [entry.tensor for entry in _others(inputs)]
    shape = base.shape
    by_rows = shared["filter_wise"] and base.dim() > 1
    flat = [tensor if by_rows else tensor.reshape(1, -1) for tensor in (base, *models)]
    offsets = [tensor - flat[0] for tensor in flat[1:]]
    cosines = [_cosine(a, b) for place, a in enumerate(offsets) for b in offsets[place + 1 :]]
    cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
    count = len(models)
    below = 1 + (count - 1) * cosine
    singular = below.abs() < 1e-6
    t = torch.where(singular, 0, count * cosine / torch.where(singular, 1, below))
    average = sum(flat[1:], torch.zeros_like(flat[0])) / count
    return (t * average + (1 - t) * flat[0]).reshape(shape)


def _cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return ((a * b).sum(-1) / norms.clamp(min=1e-6)).clamp(-1, 1)


def karcher_mean(inputs: Sequence[MergeInput], shared: MergeParameters, _: Draw) -> torch.Tensor:
    """The mean of the directions on the sphere, found by steps along it, at the mean length."""
    tensors, least = [entry.tensor for entry in inputs], shared["tol"]
    norms = [torch.linalg.vector_norm(tensor) for tensor in tensors]
    units = [tensor / norm for tensor, norm in zip(tensors, norms, strict=True) if norm > least]
    if len(tensors) == 1 or not units:
        return tensors[0] if len(tensors) == 1 else torch.zeros_like(tensors[0])
    mean = sum(units, torch.zeros_like(units[0])) / len(units)
    length = torch.linalg.vector_norm(mean)
    mean = units[0].clone() if length < least else mean / length
    for _step in range(shared["max_iter"]):
        step = sum((_towards(mean, unit, least) for unit in units), torch.zeros_like(mean)) / len(units)
        length = torch.linalg.vector_norm(step)
        if length < least:
            break
        mean = torch.cos(length) * mean + torch.sin(length) * step / length
        mean = mean / torch.linalg.vector_norm(mean)
    return mean * (sum(norms, torch.zeros_like(norms[0])) / len(tensors))


def _towards(here: torch.Tensor, there: torch.Tensor, least: float) -> torch.Tensor:
    """The tangent at `here` whose great circle ends at `there`."""
    cosine = (here * there).sum().clamp(-1, 1)
    angle = torch.arccos(cosine)
    return torch.zeros_like(here) if angle < least else angle / torch.sin(angle) * (there - cosine * here)


def as_it_is(inputs: Sequence[MergeInput], _: MergeParameters, __: Draw) -> torch.Tensor:
    """One model's tensor, times `scale` where it has one."""
    scale = inputs[0].settings["scale"]
    return inputs[0].tensor if scale is None else inputs[0].tensor * scale


def _of_task_vectors(
    keep: Keep | None, second: str = "", number: float = 0.0, *, elect: bool, normalize: bool, rescale: bool
) -> MergeMethod:
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    own = {"weight": ..., "density": 1.0} | ({second: number} if second else {})
    return MergeMethod(task_vectors(keep, second, elect=elect), shared, own, needs_base=True)


MERGE_METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod(linear, {"normalize": True}, {"weight": ...}, of_base=True),
    "slerp": MergeMethod(spherical, {"t": ...}, needs_base=True, models=(2, 2)),
    "nuslerp": MergeMethod(
        weighted_spherical, {"nuslerp_row_wise": False, "nuslerp_flatten": True}, {"weight": ...}, others=(2, 2)
    ),
    "task_arithmetic": _of_task_vectors(None, elect=False, normalize=False, rescale=False),
    "ties": _of_task_vectors(largest, elect=True, normalize=True, rescale=False),
    "dare_ties": _of_task_vectors(at_random, elect=True, normalize=False, rescale=True),
    "dare_linear": _of_task_vectors(at_random, elect=False, normalize=False, rescale=True),
    "della": _of_task_vectors(by_rank, "epsilon", 0.15, elect=True, normalize=True, rescale=True),
    "della_linear": _of_task_vectors(by_rank, "epsilon", 0.15, elect=False, normalize=False, rescale=True),
    "breadcrumbs": _of_task_vectors(between, "gamma", 0.01, elect=False, normalize=False, rescale=False),
    "breadcrumbs_ties": _of_task_vectors(between, "gamma", 0.01, elect=True, normalize=False, rescale=False),
    "sce": MergeMethod(select_calculate_erase, {"select_topk": 1.0, "int8_mask": False}, needs_base=True),
    "model_stock": MergeMethod(model_stock, {"filter_wise": False}, needs_base=True, models=(3, 10_000)),
    "karcher": MergeMethod(karcher_mean, {"max_iter": 10, "tol": 1e-5}),
    "passthrough": MergeMethod(as_it_is, {}, {"scale": None}, of_base=True, models=(1, 1)),
}
"""mergekit's `merge_method` → what it computes and takes."""
