"""A YAML of `posttrain data synth` or `curate` in, frozen keys out; read as a stage's is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from posttrain.config.check import build
from posttrain.config.knob import Keys
from posttrain.config.load import set_key
from posttrain.config.settings import Problems, parse_overrides, read_settings, take_project

DataKeys = TypeVar("DataKeys", bound=Keys)


def load_data_keys(model: type[DataKeys], verb: str, path: Path, overrides: Sequence[str] = ()) -> DataKeys:
    """Raises: ConfigError naming everything that is wrong, one line each."""
    problems, notes = Problems(), list[str]()
    settings, _ = read_settings(path)
    folder = take_project(settings, path, problems)
    for override in parse_overrides(overrides, problems):
        set_key(settings, override.steps, override, model, problems, notes)
    settings.fill(("output_dir",), f"runs/{path.stem}")
    keys = build(model, settings, verb, folder, problems, notes)
    problems.raise_if_any()
    assert keys is not None
    return keys
