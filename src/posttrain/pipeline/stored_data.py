"""The files that training reads, kept with a version (`register: { data: store }`), so that it can be trained again without its project.

A tree: a file of the project lies in it at its own path, another one below `outside/`. Where files are named by an absolute path,
`paths.json` says where each lies. The base model is not among them: it is found by its digest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.datasets import DatasetKeys
from posttrain.config.episodes import EpisodeKeys
from posttrain.config.paths import TEMPLATES
from posttrain.config.pipeline import PipelineKeys
from posttrain.config.places import looks_local
from posttrain.config.resolved import apply_changes
from posttrain.config.rl import RLKeys
from posttrain.config.stages import TrainKeys
from posttrain.errors import ChangedInputsError, ConfigError
from posttrain.evals.suite import suite_files
from posttrain.files import digest_json, digest_start, read_json, write_atomic, write_json
from posttrain.grading.source import source_of, split_spec
from posttrain.models.low_rank import CONFIG
from posttrain.names import JUDGE
from posttrain.pipeline.pins import data_pins, tokenizer_files, with_given, with_models_made
from posttrain.pipeline.state import StageEntry
from posttrain.registry.manifest import MODEL, Manifest
from posttrain.registry.registry import Registry

DATA = "data"
"""Role of the files among a version's evidence."""
_TABLE = "paths.json"
_NOT_TRAINING = ("gate", "evals", "register", "notify", "stop_when")
"""Keys that repeating the training does not need, some of which name other files."""


def check_can_be_stored(keys: PipelineKeys) -> None:
    """Refuse `data: store` where rows come from the hub or another server. Raises: ConfigError."""
    if keys.register_ is None or keys.register_.data != "store":
        return
    for stage in keys.stages:
        for source in _sources(stage.keys):
            if not Path(source.path).is_file():
                raise ConfigError(
                    f"register.data: store keeps files, and {source.path} of the {stage.kind} stage lies elsewhere: write its rows into "
                    "a file (`posttrain data` shows them), or set data: reference"
                )


def stored_files(keys: PipelineKeys, project: Path | None, run: Path, entries: Sequence[StageEntry]) -> dict[str, Path]:
    """Path in the tree → file, for what these stages read. Raises: ChangedInputsError where one is not what its stage was begun with."""
    files: dict[str, Path] = {}
    named: dict[str, str] = {}
    for stage, entry in zip(keys.stages, entries, strict=False):
        before = [other for other in entries if other.index < entry.index]
        trained = with_given(keys, entry.index, apply_changes(stage.keys, entry.changed))
        trained = with_models_made(trained, run, before)
        now = data_pins(trained)
        if entry.accepted:  # by a person, under other versions: those are part of a reward's digest
            now.pop("rewards", None)
        if moved := sorted(name for name, digest in now.items() if entry.inputs.get(name) != digest):
            raise ChangedInputsError(
                f"{', '.join(moved)} of the {entry.kind} stage changed since it began, so it cannot be stored as what was trained on; put it back "
                "and start again, or set register.data: reference"
            )
        for file in _read_by(trained):
            place = _place(file, project)
            files[place] = file
            if not _below(file, project) or str(file) in str(entry.changed):
                named[str(file)] = place
        for folder in _folders(trained):
            if not _below(folder, project):
                named[str(folder)] = _place(folder / CONFIG, project).rpartition("/")[0]
    write_json(run / _TABLE, named)
    return files | {_TABLE: run / _TABLE}


def stored_config(config: Path, data: Path, root: Path, base: Path | None) -> Path:
    """The configuration with its paths in the exported tree; `base` stands in for a base model that is not below `root` any more."""
    written: dict[str, Any] = yaml.safe_load(config.read_text(encoding="utf-8"))
    kept = {name: value for name, value in written.items() if name not in _NOT_TRAINING}
    kept["stages"] = [
        {kind: {name: value for name, value in body.items() if name != "gate"}}
        for entry in written["stages"]
        for kind, body in entry.items()
    ]
    kept = _moved(kept, _table(data))
    model = str(written["base_model"])
    if looks_local(model):
        where = (root / model).resolve()
        kept["base_model"] = str(base if base is not None and not where.is_dir() else where)
    target = data.with_name(f"{DATA}-{config.name}")
    write_atomic(target, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True))
    return target


def stored_changes(chain: Sequence[Manifest], data: Path) -> list[Manifest]:
    """The manifests with the files that loop-backs named where they lie now."""
    table = _table(data)
    return [
        replace(one, details={**one.details, "changed": _moved(one.details.get("changed", {}), table)}) for one in chain
    ]


def stored_base(book: Registry, chain: Sequence[Manifest]) -> Path | None:
    """The base model, where the registry holds it as (part of) another version."""
    digest = chain[0].inputs[MODEL]
    there = book.store.has(digest) and not book.store.missing(digest)
    return book.checkouts.ready(digest, MODEL) if there else None


def _sources(keys: TrainKeys) -> list[DatasetKeys]:
    return [*keys.datasets, *keys.eval_datasets, *(keys.ptx_datasets if isinstance(keys, RLKeys) else ())]


def _folders(keys: TrainKeys) -> list[Path]:
    """Those that are read as a whole."""
    named = (keys.tokenizer_name_or_path, keys.adapter_name_or_path)
    return [Path(folder) for folder in named if folder is not None and looks_local(folder)]


def _read_by(keys: TrainKeys) -> Iterator[Path]:
    """The files that a stage reads, beside its model."""
    yield from (Path(source.path) for source in _sources(keys))
    if keys.chat_template is not None and Path(keys.chat_template).parent != TEMPLATES:
        yield Path(keys.chat_template)
    if keys.tokenizer_name_or_path is not None and looks_local(keys.tokenizer_name_or_path):
        yield from tokenizer_files(Path(keys.tokenizer_name_or_path))
    if keys.adapter_name_or_path is not None:
        yield from (path for path in sorted(Path(keys.adapter_name_or_path).iterdir()) if path.is_file())
    if keys.eval_suite is not None:
        yield from suite_files(Path(keys.eval_suite)).values()
    played = keys.played_with if isinstance(keys, EpisodeKeys) else []
    for spec in [*(keys.reward_funcs if isinstance(keys, RLKeys) else ()), *played]:
        if spec.startswith(JUDGE):
            yield Path(spec.removeprefix(JUDGE))
        elif parts := split_spec(spec):
            file = Path(parts[0])
            yield from (file.parent / name for name in source_of(file)[0])


def _below(file: Path, project: Path | None) -> bool:
    return project is not None and file.resolve().is_relative_to(project.resolve())


def _place(file: Path, project: Path | None) -> str:
    """Files of one folder stay beside each other: some import their neighbours."""
    if project is not None and _below(file, project):
        return file.resolve().relative_to(project.resolve()).as_posix()
    return f"outside/{digest_start(digest_json(str(file.parent)))}/{file.name}"


def _table(data: Path) -> dict[str, str]:
    return {named: str(data / place) for named, place in read_json(data / _TABLE).items()}


def _moved(value: Any, table: Mapping[str, str]) -> Any:
    """The same data with every path of the table, alone or before `:function`, where it lies now."""
    if isinstance(value, dict):
        return {key: _moved(inner, table) for key, inner in value.items()}
    if isinstance(value, list):
        return [_moved(inner, table) for inner in value]
    if not isinstance(value, str):
        return value
    if value.startswith(JUDGE) and (file := value.removeprefix(JUDGE)) in table:
        return JUDGE + table[file]
    path, colon, function = value.rpartition(":")
    return table.get(value) or (f"{table[path]}:{function}" if colon and path in table else value)
