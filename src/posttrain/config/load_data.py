"""A YAML of `posttrain data synth` or `curate` in, frozen keys out; read as a stage's is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from posttrain.config.check import build
from posttrain.config.curate import CurateKeys
from posttrain.config.instruct import InstructKeys
from posttrain.config.load import set_key
from posttrain.config.places import is_uri
from posttrain.config.settings import Problems, parse_overrides, read_settings, take_project
from posttrain.config.synth import LEFT, ROWS, SynthKeys
from posttrain.errors import ConfigError

DataKeys = TypeVar("DataKeys", SynthKeys, CurateKeys, InstructKeys)


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
    _check_output(path, keys)
    return keys


def _check_output(config: Path, keys: SynthKeys | CurateKeys | InstructKeys) -> None:
    """Raises: ConfigError where what is written would take the place of what is read."""
    written = {Path(keys.output_dir, name).resolve(): name for name in (ROWS, LEFT)}
    for source in keys.datasets:
        if not is_uri(source.path) and (name := written.get(Path(source.path).resolve())):
            raise ConfigError(
                f"{config}: output_dir: {keys.output_dir} would write {name} over {source.path}, which is read; "
                "set another output_dir"
            )
