"""What runs a stage, by its kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from posttrain.objectives.preference import PreferenceSpec
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import spec_from
from posttrain.recipes import distill, dpo, ebft, grpo, online_dpo, ppo, process_reward_model, reward_model, sft
from posttrain.recipes.critic import ppo_objective
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage
from posttrain.recipes.sampled_pairs import pair_objective

LOOPS: dict[str, Callable[[Any, Stage], StageResult]] = {
    "sft": sft.run,
    "dpo": dpo.run,
    "reward_model": reward_model.run,
    "process_reward_model": process_reward_model.run,
    "grpo": grpo.run,
    "ppo": ppo.run,
    "online_dpo": online_dpo.run,
    "distill": distill.run,
    "ebft": ebft.run,
}
"""Kind → its loop."""

OBJECTIVES: dict[str, Callable[[Any], object]] = {
    "dpo": partial(spec_from, PreferenceSpec),
    "grpo": partial(spec_from, PolicySpec),
    "ppo": ppo_objective,
    "online_dpo": pair_objective,
}
"""Kind → what refuses combinations of keys that its loss is not defined for; a kind without a row has none to refuse."""
