"""What a run will need before it starts: memory, time, and the split between rollout and training."""

from posttrain.planner.machine import available_bytes
from posttrain.planner.memory import MemoryPlan, Workload, cannot_fit, estimate_memory, fits, shortfall
from posttrain.planner.shape import ModelShape
from posttrain.planner.steptime import DEVICES, Device, StepTime, Traffic, best_split, step_time

__all__ = [
    "DEVICES",
    "Device",
    "MemoryPlan",
    "ModelShape",
    "StepTime",
    "Traffic",
    "Workload",
    "available_bytes",
    "best_split",
    "cannot_fit",
    "estimate_memory",
    "fits",
    "shortfall",
    "step_time",
]
