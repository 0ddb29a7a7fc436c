"""What the controls of a run do to its objective, and the controllers that move them from step to step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from posttrain.config.stages import TrainKeys
from posttrain.health.controls import Controls
from posttrain.objectives.kl import AdaptiveEntropy, AdaptiveKL

Spec = TypeVar("Spec", bound=Any)


def first_controls(keys: TrainKeys) -> Controls:
    """Those of a run that begins: controllers that the keys ask for are on from the first step."""
    return Controls(kl_target=getattr(keys, "kl_target", None), entropy_target=getattr(keys, "entropy_target", None))


def steered(spec: Spec, controls: Controls) -> Spec:
    """The objective with the present beta and, where it has one, entropy bonus."""
    changes = {"beta": spec.beta * controls.beta_scale}
    if hasattr(spec, "entropy_coef"):
        changes["entropy_coef"] = spec.entropy_coef + _bonus(controls).applied
    return replace(spec, **changes)


def moved(controls: Controls, keys: TrainKeys, metrics: Mapping[str, float]) -> Controls:
    """The controls after a step with these metrics."""
    beta = getattr(keys, "beta", 0.0)
    if controls.kl_target is not None and beta and "kl" in metrics:
        controller = AdaptiveKL(beta * controls.beta_scale, controls.kl_target).update(metrics["kl"])
        # A controller that an alarm switched on never pulls less than was configured.
        lowest = 0.0 if getattr(keys, "kl_target", None) is not None else 1.0
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
