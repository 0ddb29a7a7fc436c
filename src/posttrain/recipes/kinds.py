"""What runs a stage, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from posttrain.objectives.preference import PreferenceSpec
from posttrain.objectives.spec import PolicySpec
from posttrain.recipes import distill, dpo, grpo, reward_model, sft
from posttrain.recipes.run_folder import StageResult
from posttrain.recipes.stage import Stage

LOOPS: dict[str, Callable[[Any, Stage], StageResult]] = {
    "sft": sft.run,
    "dpo": dpo.run,
    "reward_model": reward_model.run,
    "grpo": grpo.run,
    "distill": distill.run,
}
"""Kind → its loop."""

OBJECTIVES: dict[str, type[PreferenceSpec | PolicySpec]] = {"dpo": PreferenceSpec, "grpo": PolicySpec}
"""Kind → what refuses combinations of keys that its loss is not defined for; a kind without a row has none to refuse."""
