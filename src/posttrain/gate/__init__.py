"""Statistics and verdict: two sets of eval reports in, PASS / FAIL / INCONCLUSIVE / INVALID out.

Knows nothing of models: a verdict follows from stored items alone.
"""

from posttrain.gate.decide import decide, plan_lines
from posttrain.gate.folder import load_reports, load_verdict, recompute, save_verdict, verdict_from_json
from posttrain.gate.render import verdict_table
from posttrain.gate.spec import GateSpec, Guard, Primary

__all__ = [
    "GateSpec",
    "Guard",
    "Primary",
    "decide",
    "load_reports",
    "load_verdict",
    "plan_lines",
    "recompute",
    "save_verdict",
    "verdict_from_json",
    "verdict_table",
]
