"""What a YAML is for: a pipeline, or a stage that is told by its keys, else by its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.config.load import Kind


def kind_in(config: Path, stage: str | None, overrides: Sequence[str] = ()) -> Kind | Literal["pipeline"]:
    """The kind of `config`; `stage` is what the user said that it is, or which stages of a pipeline are meant.

    Raises: ConfigError, also where a key of the YAML is wrong.
    """
    from posttrain.config.load import STAGES, load_stage, marked_kind
    from posttrain.config.settings import read_settings
    from posttrain.data.formats import stage_of
    from posttrain.data.sources import read_rows

    if stage is not None and stage not in STAGES:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(STAGES)}")
    values = read_settings(config)[0].values
    if "stages" in values:
        return "pipeline"
    if kind := stage or marked_kind(values):
        return STAGES[kind]
    source = load_stage("sft", config, overrides).keys.datasets[0]
    [(_, row), *_] = read_rows(source.model_copy(update={"limit": 1}))
    return STAGES[stage_of(row)]
