"""What a run depends on, by name: base weights, data, rewards, suites, keys, and the versions and numbers that compute.

A change is noticed and named. The text of the source is no pin: see `posttrain.numerics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import posttrain
from posttrain.config.datasets import DatasetKeys
from posttrain.config.episodes import EpisodeKeys
from posttrain.config.kinds import stage_kind
from posttrain.config.migrate import drift
from posttrain.config.pipeline import PipelineKeys
from posttrain.config.ppo import PPOKeys
from posttrain.config.resolved import SCHEMA, to_data
from posttrain.config.rl import RLKeys, SamplingKeys
from posttrain.config.stages import TrainKeys
from posttrain.config.starting import OF_THE_GIVEN
from posttrain.errors import ConfigError
from posttrain.evals.suite import suite_file_digest
from posttrain.files import digest_file, digest_json, digest_start
from posttrain.grading.learned import named_stage
from posttrain.grading.source import specs_digest
from posttrain.models.provenance import source_digest
from posttrain.names import PREFIXES, REWARD_MODEL, STAGE
from posttrain.numerics import changes_between, installed_version, revision
from posttrain.pipeline.state import StageEntry
from posttrain.recipes.run.stage import CRITIC
from posttrain.registry.manifest import MODEL, environment_pins
from posttrain.rewards.resolve import reward_digest

_HOW_IT_IS_WATCHED = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "save_keep_every",
    "output_dir",
    "base_model",
    "report_to",
    "log_completions",
    "mlflow",
    "prometheus_port",
    "ddp_timeout",
    "lint",
    "advice_off",
    "dataset_num_proc",
}
"""Keys that cannot change a stage's weights."""
MADE_BY_STAGES = {"rewards": "reward_funcs", "value_model": "value_model"}
"""Pin → key that may name what an earlier stage of the same pipeline makes; then its digest is known when that is done."""
_OF_A_TOKENIZER = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_VERSION, _SCHEMA, _NUMBERS, _PACKAGE = "posttrain", "schema", "numbers.", "package."
_PACKAGES = ("torch", "transformers", "tokenizers", "jinja2", "peft", "bitsandbytes")
"""Those that render, tokenise and compute."""


def pins_of(keys: PipelineKeys) -> dict[str, str]:
    """Name → digest, version or revision of everything the run takes in."""
    pins = {"base_model": source_digest(keys.base_model)}
    for number, stage in enumerate(keys.stages, start=1):
        place = f"stages.{number}.{stage.kind}"
        pins |= versions(stage.kind)
        pins[f"{place}.keys"] = digest_json(training_keys(stage.keys))
        pins |= {f"{place}.{name}": digest for name, digest in data_pins(stage.keys).items()}
    for name, suite in keys.evals.items():
        pins[f"evals.{name}"] = digest_json(
            [_by_name(suite.model_dump(mode="json")), suite_file_digest(Path(suite.path))]
        )
    if keys.gate is not None:
        pins["gate"] = digest_json(_by_name(to_data(keys.gate)))
    return pins


def versions(kind: str) -> dict[str, str]:
    """What computes a stage of this kind: versions of posttrain, its keys and packages, and the revision of its numbers."""
    packages = {f"{_PACKAGE}{name}": version for name in _PACKAGES if (version := installed_version(name))}
    return {_VERSION: posttrain.__version__, _SCHEMA: str(SCHEMA), f"{_NUMBERS}{kind}": revision(kind), **packages}


def is_version(name: str) -> bool:
    """Whether a pin is about what computes, not about what the user gave."""
    return name in (_VERSION, _SCHEMA) or name.startswith((_NUMBERS, _PACKAGE))


def training_keys(keys: TrainKeys) -> dict[str, Any]:
    """The keys that decide what a stage computes; files by name, for their contents have digests of their own."""
    data = {name: value for name, value in to_data(keys).items() if name not in {*_HOW_IT_IS_WATCHED, "gate"}}
    return _by_name(data)


def _by_name(value: Any) -> Any:
    """The same data with the last part of every absolute path: a project folder may be moved."""
    if isinstance(value, dict):
        return {key: _by_name(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_by_name(inner) for inner in value]
    prefix = next((prefix for prefix in PREFIXES if isinstance(value, str) and value.startswith(prefix)), "")
    is_path = isinstance(value, str) and value.removeprefix(prefix).startswith("/")
    return value.rpartition("/")[2] if is_path else value


def data_pins(keys: TrainKeys) -> dict[str, str]:
    """Digests of the files a stage reads."""
    pins: dict[str, str] = {}
    for source in (*keys.datasets, *keys.eval_datasets, *(keys.ptx_datasets if isinstance(keys, RLKeys) else ())):
        name = f"data.{Path(source.path).name}"
        # Files of one name in several folders are told apart by their place in the list.
        pins[name if name not in pins else f"{name}#{len(pins) + 1}"] = _source(source)
    if isinstance(keys, RLKeys):
        pins["rewards"] = reward_digest(keys.reward_funcs, keys.reward_kwargs, keys.reward_weights)
    if isinstance(keys, PPOKeys) and keys.value_model is not None:
        of_a_stage = keys.value_model.startswith(STAGE)  # it has a digest when it is made
        pins["value_model"] = keys.value_model if of_a_stage else source_digest(keys.value_model)
    if isinstance(keys, EpisodeKeys) and keys.plays:
        pins["episodes"] = specs_digest(keys.played_with)
    for number, teacher in enumerate(keys.teachers if isinstance(keys, SamplingKeys) else ()):
        if not teacher.is_the_policy:
            at = teacher.url
            pins[f"teachers.{number}"] = source_digest(teacher.model) if at is None else f"{at} {teacher.model}"
        if teacher.adapter is not None:
            pins[f"teachers.{number}.adapter"] = source_digest(teacher.adapter)
    if keys.eval_suite is not None:
        pins["eval_suite"] = suite_file_digest(Path(keys.eval_suite))
    if keys.tokenizer_name_or_path is not None:
        pins["tokenizer"] = _tokenizer(keys.tokenizer_name_or_path)
    if keys.adapter_name_or_path is not None:
        pins["adapter"] = source_digest(keys.adapter_name_or_path)
    if keys.chat_template is not None:
        pins["chat_template"] = digest_file(Path(keys.chat_template))
    return pins


def with_given(keys: PipelineKeys, index: int, stage: TrainKeys) -> TrainKeys:
    """The keys of a stage (`index` counts from 1) with what the pipeline is given, or without it where the stage starts from an earlier one's model."""
    starts = all(before.keys.is_reward_model for before in keys.stages[: index - 1])
    first = keys.stages[0].keys
    return stage.model_copy(update={name: getattr(first, name) if starts else None for name in OF_THE_GIVEN})


def with_models_made(keys: TrainKeys, run: Path, before: Sequence[StageEntry]) -> TrainKeys:
    """The keys with the folders of the reward models and critics that earlier stages made. Raises: ConfigError where one names none of them."""
    made: dict[str, Any] = {}
    if isinstance(keys, RLKeys) and any(map(named_stage, keys.reward_funcs)):
        keys = keys.with_rewards(
            [
                spec
                if (name := named_stage(spec)) is None
                else f"{REWARD_MODEL}{_made('reward_funcs', spec, name, run, before)}"
                for spec in keys.reward_funcs
            ]
        )
    if isinstance(keys, PPOKeys) and (value := keys.value_model) is not None and value.startswith(STAGE):
        made["value_model"] = str(_made("value_model", value, value.removeprefix(STAGE), run, before))
    return keys.model_copy(update=made)


def _made(key: str, spec: str, name: str, run: Path, before: Sequence[StageEntry]) -> Path:
    left: list[tuple[StageEntry, str]] = []
    for entry in before:
        kind = stage_kind(entry.kind)
        if kind.keys.is_reward_model:
            left.append((entry, MODEL))
        elif kind.has_critic and key == "value_model":
            left.append((entry, CRITIC))
    found = [(entry, folder) for entry, folder in left if name in (entry.kind, str(entry.index))]
    if len(found) != 1:
        there = ", ".join(f"{entry.index} {entry.kind}" for entry in before) or "none"
        raise ConfigError(
            f"{key}: {spec} names no reward model or critic of an earlier stage; before this one are: {there}"
        )
    entry, folder = found[0]
    return run / entry.folder / folder


def stage_inputs(kind: str, keys: TrainKeys, parent_digest: str) -> dict[str, str]:
    """All that a stage's result follows from, as it is on disk at this moment.

    A finished stage whose inputs have the same digest is not run again.
    """
    return {MODEL: parent_digest, "keys": digest_json(training_keys(keys)), **data_pins(keys), **versions(kind)}


def pinned_environment() -> dict[str, Any]:
    """What bitwise repetition depends on beside the inputs."""
    return environment_pins() | {"threads": torch.get_num_threads()}


def what_moved(
    config: Path, keys: PipelineKeys, before: Mapping[str, str], now: Mapping[str, str], project: Path | None = None
) -> list[str]:
    """What moved since `config` was written, a line each; keys by name and value, not by their digest."""
    moved = changes(before, now)
    try:
        named = [line for line in drift(config, keys, project=project) if not _only_watched(line)]
    except ConfigError:
        named = []
    if not named:
        return moved
    by_digest = ("gate", *(name for name in before.keys() | now.keys() if name.endswith(".keys")))
    return [line for line in moved if line.partition(":")[0] not in by_digest] + named


def _only_watched(line: str) -> bool:
    """Whether a line of `drift` is about a key that cannot change weights, or about `base_model`, which has a pin."""
    return line.partition(":")[0].rpartition(".")[2] in _HOW_IT_IS_WATCHED


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What moved, a line each."""
    lines: list[str] = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            lines.append(f"{name}: {_short(old)} → {_short(new)}{_could_differ(name, old, new)}")
    return lines


def _could_differ(name: str, old: str | None, new: str | None) -> str:
    """What another version may compute otherwise, as the end of its line."""
    if name.startswith(_NUMBERS):
        kind = name.removeprefix(_NUMBERS)
        return f" (other numbers in {kind}: {changes_between(kind, old, new) or 'this version does not know which'})"
    if name.startswith(_PACKAGE):
        return " (may round, render or tokenise otherwise)"
    return (
        " (the lines on numbers say what it computes otherwise; none: nothing that is known)"
        if name == _VERSION
        else ""
    )


def tokenizer_files(folder: Path) -> list[Path]:
    """Its files, where weights may lie beside them."""
    return sorted(path for path in folder.iterdir() if path.suffix in _OF_A_TOKENIZER and path.is_file())


def _tokenizer(source: str) -> str:
    folder = Path(source)
    if not folder.is_dir():
        return f"hub:{source}"
    return digest_json({path.name: digest_file(path) for path in tokenizer_files(folder)})


def _source(source: DatasetKeys) -> str:
    path = Path(source.path)
    return digest_file(path) if path.is_file() else f"hub:{source.path}/{source.name}/{source.split}"


def _short(digest: str | None) -> str:
    return "absent" if digest is None else digest_start(digest)
