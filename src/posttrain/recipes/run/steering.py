"""What the controls of a run do to its objective, and the controllers that move them from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from posttrain.config.rl import PolicyGradientKeys, RLKeys
from posttrain.config.stages import TrainKeys
from posttrain.health.controls import Controls
from posttrain.objectives.kl import AdaptiveEntropy, AdaptiveKL
from posttrain.objectives.preference import PreferenceSpec
from posttrain.objectives.spec import PolicySpec

SteeredSpec = TypeVar("SteeredSpec", PreferenceSpec, PolicySpec)


def first_controls(keys: TrainKeys) -> Controls:
    """Those of a run that begins: controllers that the keys ask for are on from the first step."""
    if not isinstance(keys, RLKeys):
        return Controls()
    entropy_target = keys.entropy_target if isinstance(keys, PolicyGradientKeys) else None
    return Controls(kl_target=keys.kl_target, entropy_target=entropy_target)


def steered(spec: SteeredSpec, controls: Controls) -> SteeredSpec:
    """The objective with the present beta and, where it has one, entropy bonus."""
    beta = spec.beta * controls.beta_scale
    if isinstance(spec, PolicySpec):
        return replace(spec, beta=beta, entropy_coef=spec.entropy_coef + _bonus(controls).applied)
    return replace(spec, beta=beta)


def moved(controls: Controls, keys: TrainKeys, metrics: Mapping[str, float]) -> Controls:
    """The controls after a step with these metrics."""
    beta = keys.pull
    if controls.kl_target is not None and beta and "kl" in metrics:
        controller = AdaptiveKL(beta * controls.beta_scale, controls.kl_target).update(metrics["kl"])
        # A controller that an alarm switched on never pulls less than was configured.
        lowest = 0.0 if first_controls(keys).kl_target is not None else 1.0
        controls = replace(controls, beta_scale=max(lowest, controller.beta / beta))
    if controls.entropy_target is not None and "entropy" in metrics:
        controller = _bonus(controls).update(metrics["entropy"])
        entropy = controller.entropy if math.isfinite(controller.entropy) else None
        controls = replace(controls, entropy_bonus=controller.coef, entropy=entropy)
    return controls


def _bonus(controls: Controls) -> AdaptiveEntropy:
    if controls.entropy_target is None:
        return AdaptiveEntropy(0.0)
    measured = math.inf if controls.entropy is None else controls.entropy
    return AdaptiveEntropy(controls.entropy_bonus, controls.entropy_target, entropy=measured)
