"""What a run depends on, as digests: base weights, data, rewards, suites, keys, code. A change is noticed and named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import posttrain
from posttrain.config.pipeline import PipelineKeys
from posttrain.config.resolved import to_data
from posttrain.config.stages import DatasetKeys, GRPOKeys, TrainKeys
from posttrain.files import digest_file, digest_json
from posttrain.models.export import source_digest
from posttrain.registry.manifest import code_digest
from posttrain.rewards.resolve import reward_digest

_HOW_IT_IS_WATCHED = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "output_dir",
    "base_model",
    "mlflow",
    "prometheus_port",
}
"""Keys that cannot change a stage's weights."""


def pins_of(keys: PipelineKeys) -> dict[str, str]:
    """Name → digest of everything the run takes in."""
    pins = {"base_model": source_digest(keys.base_model), "code": code_digest(Path(posttrain.__file__).parent)}
    for number, stage in enumerate(keys.stages, start=1):
        place = f"stages.{number}.{stage.kind}"
        pins[f"{place}.keys"] = digest_json(training_keys(stage.keys))
        pins |= {f"{place}.{name}": digest for name, digest in data_pins(stage.keys).items()}
    for name, suite in keys.evals.items():
        pins[f"evals.{name}"] = digest_json([suite.model_dump(mode="json"), digest_file(Path(suite.path))])
    if keys.gate is not None:
        pins["gate"] = digest_json(to_data(keys.gate))
    return pins


def training_keys(keys: TrainKeys) -> dict[str, Any]:
    """The keys that decide what a stage computes."""
    return {name: value for name, value in to_data(keys).items() if name not in {*_HOW_IT_IS_WATCHED, "gate"}}


def data_pins(keys: TrainKeys) -> dict[str, str]:
    """Digests of the files a stage reads."""
    pins: dict[str, str] = {}
    for source in (*keys.datasets, *keys.eval_datasets):
        name = f"data.{Path(source.path).name}"
        # Files of one name in several folders are told apart by their place in the list.
        pins[name if name not in pins else f"{name}#{len(pins) + 1}"] = _source(source)
    if isinstance(keys, GRPOKeys):
        pins["rewards"] = reward_digest(keys.reward_funcs, keys.reward_kwargs, keys.reward_weights)
    if keys.chat_template is not None:
        pins["chat_template"] = digest_file(Path(keys.chat_template))
    return pins


def stage_input(keys: TrainKeys, parent_digest: str) -> str:
    """Digest of all that a stage's result follows from. A finished stage with the same one is not run again."""
    code = code_digest(Path(posttrain.__file__).parent)
    return digest_json({"keys": training_keys(keys), "data": data_pins(keys), "parent": parent_digest, "code": code})


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What moved, a line each."""
    lines: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            lines.append(f"{name}: {_short(old)} → {_short(new)}")
    return lines


def _source(source: DatasetKeys) -> str:
    path = Path(source.path)
    return digest_file(path) if path.is_file() else f"hub:{source.path}/{source.name}/{source.split}"


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest.removeprefix("sha256:")[:12]
