"""What health actions changed in a run so far, and the table of how each action changes it.

All of it is in every checkpoint, so a resumed run goes on with the same changes. Knows no optimizer and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from posttrain.types import Finding

LOWEST_LR_SCALE = 1 / 64
HIGHEST_BETA_SCALE = 64.0
HIGHEST_GROUP_SCALE = 4
USUAL_ENTROPY_TARGET = 0.2
"""In nats per token, as in Skywork-OR1 (arXiv 2505.22312), for a rule that has no threshold of its own."""
_SEED_STRIDE = 1_000_003


@dataclass(frozen=True, slots=True)
class Controls:
    """Factors and terms that a loop applies to its keys.

    `kl_target` and `entropy_target` switch a controller on that moves `beta_scale` and `entropy_bonus` from step to
    step; `entropy` is what the latter measured last. `skipped` are steps' worth of data that are passed over.
    """

    lr_scale: float = 1.0
    beta_scale: float = 1.0
    kl_target: float | None = None
    entropy_bonus: float = 0.0
    entropy_target: float | None = None
    entropy: float | None = None
    group_scale: int = 1
    resample: bool = False
    evaluate_next: bool = False
    skipped: int = 0
    seed_shift: int = 0
    rollbacks: int = 0

    def seed(self, seed: int) -> int:
        """The run's seed, or another one after a rollback."""
        return seed + _SEED_STRIDE * self.seed_shift

    def rolled_back(self, from_step: int, to_step: int) -> Controls:
        """For the run that goes on from `to_step`: never the same again, or it would only end the same way."""
        return replace(
            lower_learning_rate(self),
            seed_shift=self.seed_shift + 1,
            skipped=self.skipped + from_step - to_step,
            rollbacks=self.rollbacks + 1,
            evaluate_next=False,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Controls:
        """Fields that an older record does not have keep their defaults."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})


def after(controls: Controls, finding: Finding) -> Controls:
    """The controls once the finding's action is carried out."""
    change = CHANGES.get(finding.action)
    return controls if change is None else change(controls, finding)


def lower_learning_rate(controls: Controls) -> Controls:
    return replace(controls, lr_scale=max(LOWEST_LR_SCALE, controls.lr_scale / 2))


def _resample(controls: Controls) -> Controls:
    """Prompts first; if that was not enough, larger groups."""
    return _raise_group_size(controls) if controls.resample else replace(controls, resample=True)


def _raise_group_size(controls: Controls) -> Controls:
    return replace(controls, group_scale=min(HIGHEST_GROUP_SCALE, 2 * controls.group_scale))


def _raise_beta(controls: Controls, finding: Finding) -> Controls:
    """Twice as strong at once; a rule about the KL then has it steered to half of the rule's limit."""
    target = finding.evidence["limit"] / 2 if "kl" in finding.evidence else None
    return replace(
        controls,
        beta_scale=min(HIGHEST_BETA_SCALE, 2 * controls.beta_scale),
        kl_target=controls.kl_target if controls.kl_target is not None else target,
    )


def _raise_entropy(controls: Controls, finding: Finding) -> Controls:
    """From here on the bonus grows a little every step that the entropy is below the higher of the rule's thresholds."""
    if controls.entropy_target is not None:
        return controls
    return replace(controls, entropy_target=finding.evidence.get("target", USUAL_ENTROPY_TARGET))


CHANGES: dict[str, Callable[[Controls, Finding], Controls]] = {
    "evaluate": lambda controls, finding: replace(controls, evaluate_next=True),
    "resample": lambda controls, finding: _resample(controls),
    "raise_group_size": lambda controls, finding: _raise_group_size(controls),
    "lower_learning_rate": lambda controls, finding: lower_learning_rate(controls),
    "raise_beta": _raise_beta,
    "raise_entropy": _raise_entropy,
}
"""Action → what it changes; `log`, `warn`, `hold`, `skip_step`, `rollback` and `stop` change nothing from step to step."""
