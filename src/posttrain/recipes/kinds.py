"""Stage kind → the loop that runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from posttrain.recipes import dpo, grpo, sft
from posttrain.recipes.run_folder import StageResult
from posttrain.recipes.stage import Stage

LOOPS: Mapping[str, Callable[[Any, Stage], StageResult]] = {"sft": sft.run, "dpo": dpo.run, "grpo": grpo.run}
