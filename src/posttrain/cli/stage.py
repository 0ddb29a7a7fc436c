"""What a YAML is for: a pipeline, or a stage that is told by its keys, else by its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from posttrain.errors import ConfigError


def kind_in(config: Path, stage: str | None, overrides: Sequence[str] = ()) -> str:
    """The kind of `config`; `stage` is what the user said that it is, or which stages of a pipeline are meant.

    Raises: ConfigError, also where a key of the YAML is wrong.
    """
    from posttrain.config.kinds import kind_reading, kinds_by_name
    from posttrain.config.load import load_stage, marked_kind
    from posttrain.config.settings import read_settings
    from posttrain.data.formats import rows_of
    from posttrain.data.opened import read_rows

    names = kinds_by_name()
    if stage is not None and stage not in names:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(names)}")
    values = read_settings(config)[0].values
    if "stages" in values:
        return "pipeline"
    if kind := stage or marked_kind(values):
        return names[kind]
    source = load_stage(kind_reading("examples"), config, overrides).keys.datasets[0]
    [(_, row), *_] = read_rows(source.model_copy(update={"limit": 1}))
    return kind_reading(rows_of(row))
