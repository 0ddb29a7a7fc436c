"""One run of a recipe, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft  # noqa: F401  (once, here, not in the process of every run with an adapter)

from posttrain.config.kinds import STAGE_KINDS
from posttrain.distributed.ranks import join_ranks
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage


def train(kind: str, folder: Path, values: dict[str, Any]) -> StageResult:
    # What is measured is when a rule sees a fault, not whether the run recovers from it.
    keys = STAGE_KINDS[kind].keys.model_validate({"health_rollbacks": 0, **values})
    with join_ranks() as ranks:
        stage = Stage(kind, folder, keys, ranks)
        try:
            return LOOPS[kind](keys, stage)
        finally:
            stage.close()
