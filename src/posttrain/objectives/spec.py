"""The knobs of policy objectives, under their configuration names; defaults are TRL's."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.errors import ConfigError

_CISPO_CAP = 5.0
_WITHOUT_DELTA = frozenset({"cispo", "sapo"})


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """Plain values of one policy loss. Raises: ConfigError for a combination that its paper does not define."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    kl_reduction: str | None = None
    loss_reduction: str | None = None
    use_bias_correction_kl: bool = True
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    off_policy_mask_threshold: float | None = None
    clip_cov_ratio: float = 2e-4
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0
    kl_cov_ratio: float = 2e-4
    ppo_kl_coef: float = 0.1
    importance_sampling_correction: str = "off"
    importance_sampling_cap: float = 3.0

    def __post_init__(self) -> None:
        if self.loss_type == "cispo" and self.high < 1:
            raise ConfigError(
                f"loss_type: cispo with epsilon_high={self.high}: for CISPO it caps the ratio itself, and below 1 every "
                f"token would be cut; set it to 1 or more ({_CISPO_CAP} is usual), or leave it out"
            )
        if self.delta is not None and self.loss_type not in _WITHOUT_DELTA and self.delta <= 1 + self.high:
            raise ConfigError(
                f"delta={self.delta} with epsilon_high={self.high}: delta bounds the ratio beyond the clip range, so it must be "
                f"above 1 + epsilon_high = {1 + self.high:g}; raise it (4 is usual), or leave it out"
            )
        if self.loss_type == "luspo" and self.importance_sampling_level != "sequence":
            raise ConfigError(
                f"loss_type: luspo with importance_sampling_level: {self.importance_sampling_level}: LUSPO is defined on "
                "sequence ratios; set importance_sampling_level: sequence"
            )
        if self.loss_type == "clip_cov" and self.clip_cov_lb >= self.clip_cov_ub:
            raise ConfigError(
                f"clip_cov_lb={self.clip_cov_lb:g} with clip_cov_ub={self.clip_cov_ub:g}: tokens are drawn from those with a covariance "
                "between them; set clip_cov_lb below clip_cov_ub (1 and 5 in verl)"
            )
        if self.loss_type in ("dppo", "gmpo", "kl_cov") and self.delta is not None:
            raise ConfigError(
                f"loss_type: {self.loss_type} with delta={self.delta}: it does not clip the ratio; leave delta out"
            )

    @property
    def high(self) -> float:
        """Upper clip range; for CISPO the cap on the ratio itself."""
        if self.epsilon_high is not None:
            return self.epsilon_high
        return _CISPO_CAP if self.loss_type == "cispo" else self.epsilon
