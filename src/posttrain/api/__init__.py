"""The Python door: what the command does, as functions of Python values.

```python
import posttrain as pt

run = pt.sft("sft.yaml", max_steps=20)
run = pt.grpo(base_model="./base", datasets=rows, reward_funcs=[my_reward], max_steps=100)
run.metrics[-1]["reward"], run.model, run.load(), run.report
```

Keys, their checks and their errors are those of the YAML.
"""

from types import ModuleType
from typing import Any

import posttrain.gate as gate_package
from posttrain.api.run import Metrics, Run, load_run
from posttrain.api.verbs import (
    distill,
    dpo,
    ebft,
    evaluate,
    grpo,
    judge,
    online_dpo,
    ppo,
    process_reward_model,
    reward_model,
    sft,
)
from posttrain.api.verbs import run_pipeline as run

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


class _CallableGate(ModuleType):
    """The package `posttrain.gate`, which is also a verb: Python binds the name to the package once that is imported."""

    __call__ = staticmethod(judge)


gate: Any = gate_package
gate.__class__ = _CallableGate
