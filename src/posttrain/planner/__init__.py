"""What a run will need before it starts: memory, time, and the split between rollout and training."""

from posttrain.planner.fit import cannot_fit, fits, shortfall
from posttrain.planner.machine import available_bytes
from posttrain.planner.memory import MemoryPlan, estimate_memory
from posttrain.planner.parts import DEVICES, Cluster, Device, parse_cluster
from posttrain.planner.shape import ModelShape
from posttrain.planner.steptime import Loop, StepTime, Traffic, Work, best_split, step_time
from posttrain.planner.workload import Workload

__all__ = [
    "DEVICES",
    "Cluster",
    "Device",
    "Loop",
    "MemoryPlan",
    "ModelShape",
    "StepTime",
    "Traffic",
    "Work",
    "Workload",
    "available_bytes",
    "best_split",
    "cannot_fit",
    "estimate_memory",
    "fits",
    "parse_cluster",
    "shortfall",
    "step_time",
]
