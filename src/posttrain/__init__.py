"""posttrain: from an open-weight base model to an evaluated, gated, registered, servable one.

`import posttrain as pt` gives a function for each kind of stage (`pt.sft`, `pt.dpo`, `pt.grpo` …), `pt.run`, `pt.evaluate`, `pt.gate` and
`pt.load_run`; nothing is loaded before one of them is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.api import (
        Metrics,
        Run,
        distill,
        dpo,
        ebft,
        evaluate,
        grpo,
        load_run,
        online_dpo,
        ppo,
        process_reward_model,
        reward_model,
        run,
        sft,
    )

    gate: Any
    """A verb and a package."""

__version__ = "0.1.0"

__all__ = [
    "Metrics",
    "Run",
    "distill",
    "dpo",
    "ebft",
    "evaluate",
    "gate",
    "grpo",
    "load_run",
    "online_dpo",
    "ppo",
    "process_reward_model",
    "reward_model",
    "run",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module("posttrain.api"), name)
