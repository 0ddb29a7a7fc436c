"""Configuration: YAML and `--set` in, frozen keys out."""

from posttrain.config.load import LoadedPipeline, LoadedStage, describe_keys, detect_kind, load_gate, load_stage
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.resolved import apply_changes, resolved_yaml

__all__ = [
    "LoadedPipeline",
    "LoadedStage",
    "apply_changes",
    "describe_keys",
    "detect_kind",
    "load_gate",
    "load_pipeline",
    "load_stage",
    "resolved_yaml",
]
