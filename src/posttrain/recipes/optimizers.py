"""The optimizers, as rows of a table: `optim` → what makes it of groups of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from posttrain.config.optimizing import TAKE_SHARES
from posttrain.config.stages import TrainKeys
from posttrain.errors import ConfigError, MissingExtraError
from posttrain.models.policy import Policy

ParamGroup = dict[str, Any]
MakeOptimizer = Callable[[Policy, list[ParamGroup], TrainKeys], torch.optim.Optimizer]


def _betas(keys: TrainKeys) -> tuple[float, float]:
    return (keys.adam_beta1, keys.adam_beta2)


def _adamw(policy: Policy, groups: list[ParamGroup], keys: TrainKeys) -> torch.optim.Optimizer:
    options = {"lr": keys.learning_rate, "betas": _betas(keys), "eps": keys.adam_epsilon}
    # One kernel takes the parameters of a group together, where they are cut over the same ranks.
    apart = [group | {"params": part} for group in groups for part in policy.sharding.together(group["params"])]
    return torch.optim.AdamW(apart, fused=True, **options)


def _bitsandbytes(name: str, *, has_epsilon: bool = True) -> MakeOptimizer:
    def make(policy: Policy, groups: list[ParamGroup], keys: TrainKeys) -> torch.optim.Optimizer:
        try:
            optimizers = import_module("bitsandbytes.optim")
        except ImportError as error:
            raise MissingExtraError(
                f"optim: {keys.optim} needs bitsandbytes; pip install 'posttrain[qlora]'"
            ) from error
        options = {"eps": keys.adam_epsilon} if has_epsilon else {}
        return getattr(optimizers, name)(groups, lr=keys.learning_rate, betas=_betas(keys), **options)

    return make


def _adafactor(policy: Policy, groups: list[ParamGroup], keys: TrainKeys) -> torch.optim.Optimizer:
    """With the learning rate of the schedule, as transformers' trainer runs it. Source: Shazeer and Stern 2018, arXiv 1804.04235."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=keys.learning_rate, scale_parameter=False, relative_step=False)


def _sgd(policy: Policy, groups: list[ParamGroup], keys: TrainKeys) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=keys.learning_rate)


def _muon(policy: Policy, groups: list[ParamGroup], keys: TrainKeys) -> torch.optim.Optimizer:
    """Muon for the matrices inside the layers, AdamW for embeddings, head and vectors.

    By default both have updates of one size, so that they take one learning rate. Source: Liu et al. 2025, arXiv 2502.16982, equation 4.
    """
    inner = {id(parameter) for parameter in _inner_matrices(policy)}
    parts: list[torch.optim.Optimizer] = []
    if muon := _only(groups, lambda parameter: id(parameter) in inner):
        spectral = keys.muon_adjust_lr == "spectral_norm"
        muon, adjust = (_wide_apart(muon), "original") if spectral else (muon, "match_rms_adamw")
        parts.append(torch.optim.Muon(muon, lr=keys.learning_rate, adjust_lr_fn=adjust))
    if others := _only(groups, lambda parameter: id(parameter) not in inner):
        parts.append(_adamw(policy, others, keys))
    return JointOptimizer(parts)


def _wide_apart(groups: list[ParamGroup]) -> list[ParamGroup]:
    """Matrices by shape, at sqrt(rows / columns) of the learning rate where they are wider than high, which torch leaves at 1; the decay stays."""
    apart: list[ParamGroup] = []
    for group in groups:
        by_ratio: dict[float, list[torch.Tensor]] = {}
        for matrix in group["params"]:
            by_ratio.setdefault(min(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5, []).append(matrix)
        for ratio, matrices in by_ratio.items():
            lr_ratio = group.get("lr_ratio", 1.0) * ratio
            apart.append(
                group | {"params": matrices, "lr_ratio": lr_ratio, "weight_decay": group["weight_decay"] / ratio}
            )
    return apart


def _inner_matrices(policy: Policy) -> list[torch.Tensor]:
    ends = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    outside = {id(parameter) for end in ends if end is not None for parameter in end.parameters()}
    return [parameter for _, parameter in policy.trainable() if parameter.ndim == 2 and id(parameter) not in outside]


def _only(groups: list[ParamGroup], wanted: Callable[[torch.Tensor], bool]) -> list[ParamGroup]:
    parts = [group | {"params": [p for p in group["params"] if wanted(p)]} for group in groups]
    return [part for part in parts if part["params"]]


class JointOptimizer(torch.optim.Optimizer):
    """Optimizers of different parameters as one, with one state and one list of groups."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._parts, self._sizes = parts, [len(part.param_groups) for part in parts]

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        first = 0
        for part, size in zip(self._parts, self._sizes, strict=True):
            part.state, part.param_groups = self.state, self.param_groups[first : first + size]
            part.step()
            first += size


OPTIMIZERS: Mapping[str, MakeOptimizer] = {
    "adamw": _adamw,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
    "paged_adamw": _bitsandbytes("PagedAdamW32bit"),
    "paged_adamw_8bit": _bitsandbytes("PagedAdamW8bit"),
    # Source: Chen et al. 2023, arXiv 2302.06675.
    "lion": _bitsandbytes("Lion", has_epsilon=False),
    "lion_8bit": _bitsandbytes("Lion8bit", has_epsilon=False),
    "paged_lion_8bit": _bitsandbytes("PagedLion8bit", has_epsilon=False),
    "adafactor": _adafactor,
    "muon": _muon,
    "sgd": _sgd,
}


def optimizer_of(policy: Policy, groups: list[ParamGroup], keys: TrainKeys) -> torch.optim.Optimizer:
    """Raises: ConfigError where the parameters are sharded and the optimizer does not take shares of them; MissingExtraError."""
    if policy.sharded and keys.optim not in TAKE_SHARES:
        raise ConfigError(
            f"optim: {keys.optim} needs whole parameters, and each process holds a share of them; set {' or '.join(TAKE_SHARES)}, or "
            "start one process"
        )
    return OPTIMIZERS[keys.optim](policy, groups, keys)
