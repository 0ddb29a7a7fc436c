"""The losses of Tinker's API: sums over tokens that nothing divides, since the client's weights and advantages do that.

Source: https://tinker-docs.thinkingmachines.ai/tinker/losses. Knows nothing of models or of who sends what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.errors import ConfigError, DataError
from posttrain.objectives.ratios import bounded_exp, log_ratios
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.surrogates import cispo, clipped, unclipped

Streams = Mapping[str, Tensor]
"""What the client says of each token, by its name in `loss_fn_inputs`. Shapes: [M]."""
LossConfig = Mapping[str, float]


def _ratio(logp_M: Tensor, given: Streams) -> Tensor:
    return bounded_exp(log_ratios(logp_M, given["logprobs"]))


def _spec(config: LossConfig) -> PolicySpec:
    return PolicySpec(epsilon=1 - config["clip_low_threshold"], epsilon_high=config["clip_high_threshold"] - 1)


def weighted_nll(logp_M: Tensor, given: Streams, config: LossConfig) -> Tensor:
    """−w·log p; a weight may be negative, which is how the SDK sends the gradient of a loss of the client's own."""
    return -given["weights"] * logp_M


def importance_sampling(logp_M: Tensor, given: Streams, config: LossConfig) -> Tensor:
    """−p/q·A."""
    return unclipped(_ratio(logp_M, given), given["advantages"], logp_M, PolicySpec())


def clipped_ratio(logp_M: Tensor, given: Streams, config: LossConfig) -> Tensor:
    """−min(p/q·A, clip(p/q, low, high)·A)."""
    return clipped(_ratio(logp_M, given), given["advantages"], logp_M, _spec(config))


def cispo_of_two_sides(logp_M: Tensor, given: Streams, config: LossConfig) -> Tensor:
    """−sg(clip(p/q, low, high))·A·log p: CISPO with a lower bound too."""
    ratio_M = _ratio(logp_M, given).clamp(min=config["clip_low_threshold"])
    return cispo(ratio_M, given["advantages"], logp_M, PolicySpec(epsilon_high=config["clip_high_threshold"]))


def dro(logp_M: Tensor, given: Streams, config: LossConfig) -> Tensor:
    """−(A·log p − β/2·(log p − log q)²). Source: Richemond et al. 2024, arXiv 2405.19107."""
    return -(given["advantages"] * logp_M - config["beta"] / 2 * (logp_M - given["logprobs"]) ** 2)


@dataclass(frozen=True, slots=True)
class TinkerLoss:
    """`term(logp_M, streams, config)`, the streams it reads, and what is configured where the client says nothing."""

    term: Callable[[Tensor, Streams, LossConfig], Tensor]
    reads: tuple[str, ...]
    defaults: LossConfig = field(default_factory=dict[str, float])


_SAMPLED = ("logprobs", "advantages")
TINKER_LOSSES: Mapping[str, TinkerLoss] = {
    "cross_entropy": TinkerLoss(weighted_nll, ("weights",)),
    "importance_sampling": TinkerLoss(importance_sampling, _SAMPLED),
    "ppo": TinkerLoss(clipped_ratio, _SAMPLED, {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    "cispo": TinkerLoss(cispo_of_two_sides, _SAMPLED, {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0}),
    "dro": TinkerLoss(dro, _SAMPLED, {"beta": 0.05}),
}
"""By `loss_fn`."""


def tinker_loss(name: str, config: Mapping[str, float | str]) -> tuple[TinkerLoss, LossConfig]:
    """The row of a `loss_fn` with its whole configuration. Raises: DataError, ConfigError."""
    if name not in TINKER_LOSSES:
        raise DataError(
            f"loss_fn: got {name!r}, this server computes {', '.join(TINKER_LOSSES)}; a loss of your own goes through "
            "forward_backward_custom, which computes it in the client"
        )
    row = TINKER_LOSSES[name]
    for key, value in config.items():
        if key not in row.defaults:
            known = ", ".join(row.defaults) or "nothing"
            raise ConfigError(f"loss_fn_config of {name}: got {key!r}, expected {known}")
        if isinstance(value, str):
            raise ConfigError(f"loss_fn_config of {name}: {key} is {value!r}, expected a number")
    whole = {key: float(config.get(key, default)) for key, default in row.defaults.items()}
    low, high = whole.get("clip_low_threshold", 0.0), whole.get("clip_high_threshold", 1.0)
    if not 0 <= low <= high:
        raise ConfigError(
            f"loss_fn_config of {name}: clip_low_threshold={low:g}, clip_high_threshold={high:g}; expected 0 ≤ low ≤ high: they bound "
            "the ratio itself, as 0.8 and 1.2 do"
        )
    return row, whole
