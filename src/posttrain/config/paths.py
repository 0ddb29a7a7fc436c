"""Paths in a configuration: relative to the YAML, and there before any work starts."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from posttrain.config.curate import CurateKeys, QualityKeys
from posttrain.config.datasets import DatasetKeys
from posttrain.config.episodes import EpisodeKeys
from posttrain.config.instruct import InstructKeys
from posttrain.config.judge import JudgeKeys
from posttrain.config.knob import Keys
from posttrain.config.pipeline import GateKeys, PipelineKeys, RegisterKeys, SuiteKeys
from posttrain.config.places import is_uri, looks_local, resolve_path
from posttrain.config.ppo import PPOKeys
from posttrain.config.rl import RLKeys
from posttrain.config.schema import annotation_below, did_you_mean, did_you_mean_or_one_of, group_in, keys_of
from posttrain.config.settings import Problems, Settings
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.config.starting import StartKeys
from posttrain.config.synth import SynthKeys
from posttrain.config.teachers import OF_THE_POLICY, TeacherKeys
from posttrain.config.yaml_lines import KeyPath
from posttrain.errors import ConfigError
from posttrain.names import JUDGE, LM_EVAL, PREFIXES, REWARD_MODEL, STAGE
from posttrain.uris import SECRET_IN_URI, holds_secret


class _PathError(ValueError):
    """What is wrong with one path."""


def _existing_or_hub(path: str, folder: Path) -> str:
    if not path.strip():
        raise _PathError("got an empty path, expected a file, a folder or a hub id")
    resolved = resolve_path(path, folder)
    return _existing(path, folder) if looks_local(path) else resolved


def _data(path: str, folder: Path) -> str:
    if is_uri(path):
        if holds_secret(path):
            raise _PathError(SECRET_IN_URI)
        return path
    return _existing_or_hub(path, folder)


def _existing(path: str, folder: Path) -> str:
    local = (folder / os.path.expanduser(path)).resolve() if path.strip() else None
    if local is None:
        raise _PathError("got an empty path, expected a file")
    if os.path.exists(local):
        return str(local)
    raise _PathError(f"{path} does not exist{_where_else(path, local, folder)}")


TEMPLATES = Path(__file__).with_name("templates")
"""Chat templates that have a name here: `llama3` is `llama3.jinja` in it."""


def _template(path: str, folder: Path) -> str:
    """A Jinja file, or a template by name."""
    if not path.isidentifier() or os.path.exists(folder / path):
        return _existing(path, folder)
    known = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
    if path in known:
        return str(TEMPLATES / f"{path}.jinja")
    near = [name for name in known if name.endswith(f"_{path}")]
    hint = f"; did you mean {' or '.join(near)}?" if near else did_you_mean_or_one_of(path, known)
    raise _PathError(f"{path} is no file in {folder.resolve()}, and the name of no template{hint}")


def _where_else(path: str, local: Path, folder: Path) -> str:
    if not local.parent.is_dir():
        return f": there is no folder {local.parent}"
    names = sorted(entry.name for entry in local.parent.iterdir() if not entry.name.startswith("."))
    close = did_you_mean(local.name, names)
    if close:
        return f" in {local.parent}{close}"
    if os.path.exists(Path.cwd() / path):
        return f" in {folder.resolve()}; it exists in the current folder, but paths are relative to the YAML"
    return f" in {local.parent}" + (f", which has {', '.join(names[:5])}" if names else ", which is empty")


def _suite(path: str, folder: Path) -> str:
    """A file, or a task of lm-eval by name or by its YAML."""
    if not path.startswith(LM_EVAL):
        return _existing(path, folder)
    task, query, options = path.removeprefix(LM_EVAL).partition("?")
    found = _existing(task, folder) if task.endswith((".yaml", ".yml")) or looks_local(task) else task
    return f"{LM_EVAL}{found}{query}{options}"


def _reward(entry: str, folder: Path) -> str:
    if entry.startswith(JUDGE):
        return JUDGE + _existing(entry.removeprefix(JUDGE), folder)
    if entry.startswith(REWARD_MODEL + STAGE):
        return entry
    if entry.startswith(REWARD_MODEL):
        return REWARD_MODEL + _reward_model(entry.removeprefix(REWARD_MODEL), folder)
    file, colon, function = entry.rpartition(":")
    if not re.search(r"\.py$", file if colon else entry):
        return entry
    if not colon or not function.isidentifier():
        raise _PathError(f"got {entry}, expected file.py:function, e.g. {file or entry}:correct")
    return f"{_existing(file, folder)}:{function}"


def reward_place(entry: str, folder: Path) -> str:
    """An entry of `reward_funcs` that was typed in `folder`, with whole paths. Raises: ConfigError."""
    try:
        return _reward(entry, folder)
    except _PathError as error:
        raise ConfigError(str(error)) from None


def _reward_model(path: str, folder: Path) -> str:
    try:
        return _existing_or_hub(path, folder)
    except _PathError as error:
        raise _PathError(
            f"{error}; a reward model must be there when the run starts, so train it in a run of its own first (`posttrain reward_model`), or in an "
            "earlier stage of the pipeline and name that: model:stage:reward_model"
        ) from None


def _value_model(path: str, folder: Path) -> str:
    try:
        return path if path.startswith(STAGE) else _existing_or_hub(path, folder)
    except _PathError as error:
        raise _PathError(
            f"{error}; one that an earlier stage of the pipeline trains is named by it: stage:reward_model"
        ) from None


def _environment(entry: str, folder: Path) -> str:
    """`file.py:Class`, or `file.py:function,function`; or the address of a server."""
    if entry.startswith("openenv:"):
        return entry
    if entry.startswith("verifiers:"):
        return _command(entry, folder)
    file, _, names = entry.rpartition(":")
    if not file.endswith(".py") or not all(name.isidentifier() for name in names.split(",")):
        raise _PathError(
            f"got {entry}, expected file.py:NAME, e.g. {entry if entry.endswith('.py') else 'my_env.py'}:Env"
        )
    return f"{_existing(file, folder)}:{names}"


def _tools(entry: str, folder: Path) -> str:
    """The same, or the command line of an MCP server, whose words that are files here are made whole."""
    if not entry.startswith("mcp:"):
        return _environment(entry, folder)
    return _command(entry, folder)


def _command(entry: str, folder: Path) -> str:
    """`mcp:` or `verifiers:` and a command line, whose words that are files here are made whole."""
    prefix, _, line = entry.partition(":")
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise _PathError(f"got {entry}, which is no command line: {error}") from None
    return f"{prefix}:" + shlex.join(_whole(word, folder) for word in words)


def _whole(word: str, folder: Path) -> str:
    """A link stays one: a Python of a virtual environment is known by where the link lies."""
    is_file = (Path(word).suffix != "" or "/" in word) and os.path.isfile(folder / word)
    return os.path.abspath(folder / word) if is_file else word


def _output(path: str, folder: Path) -> str:
    return str((folder / os.path.expanduser(path)).resolve()) if path else path


def _baseline(reference: str, folder: Path) -> str:
    return reference if reference.startswith(("alias:", "stage:")) else _existing_or_hub(reference, folder)


def _teacher(model: str, folder: Path) -> str:
    return model if model in OF_THE_POLICY else _existing_or_hub(model, folder)


PATH_RULES: tuple[tuple[type[Keys], str, Callable[[str, Path], str]], ...] = (
    (StartKeys, "base_model", _existing_or_hub),
    (StartKeys, "tokenizer_name_or_path", _existing_or_hub),
    (StartKeys, "adapter_name_or_path", _existing),
    (ModelKeys, "chat_template", _template),
    (DatasetKeys, "path", _data),
    (TrainKeys, "output_dir", _output),
    (TrainKeys, "eval_suite", _existing),
    (RLKeys, "reward_funcs", _reward),
    (PPOKeys, "value_model", _value_model),
    (EpisodeKeys, "env", _environment),
    (EpisodeKeys, "tools", _tools),
    (TeacherKeys, "model", _teacher),
    (TeacherKeys, "adapter", _existing),
    (JudgeKeys, "cache", _output),
    (InstructKeys, "model", _existing_or_hub),
    (InstructKeys, "output_dir", _output),
    (InstructKeys, "decontaminate", _suite),
    (CurateKeys, "output_dir", _output),
    (CurateKeys, "decontaminate", _suite),
    (QualityKeys, "scorer", _reward),
    (SynthKeys, "base_model", _existing_or_hub),
    (SynthKeys, "chat_template", _template),
    (SynthKeys, "output_dir", _output),
    (SynthKeys, "reward_funcs", _reward),
    (SynthKeys, "decontaminate", _suite),
    (PipelineKeys, "base_model", _existing_or_hub),
    (PipelineKeys, "output_dir", _output),
    (SuiteKeys, "path", _suite),
    (GateKeys, "baseline", _baseline),
    (RegisterKeys, "registry", _output),
)
"""Which keys are paths, and how each is read."""


def resolve_paths(settings: Settings, model: type[Keys], folder: Path, problems: Problems) -> None:
    """Make the paths in `settings` absolute, in place."""
    for path, value, rule in list(_paths_in(settings.values, model, ())):
        try:
            resolved = rule(value, folder)
        except _PathError as error:
            problems.add(settings.origin(path), settings.name(path), str(error))
            continue
        holder: Any = settings.values
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = resolved


def make_relative(values: dict[str, Any], model: type[Keys], project: Path) -> None:
    """Write the paths in `values` that lie below `project` relative to it, in place: `./data/sft.jsonl`."""
    below = f"{project}/"
    for path, given, _ in list(_paths_in(values, model, ())):
        holder: Any = values
        for step in path[:-1]:
            holder = holder[step]
        prefix = next((prefix for prefix in PREFIXES if given.startswith(prefix)), "")
        value = given.removeprefix(prefix)
        if Path(value).parent == TEMPLATES:
            holder[path[-1]] = Path(value).stem
        elif f"{value}/" == below:
            holder[path[-1]] = f"{prefix}."
        elif value.startswith(below):
            holder[path[-1]] = f"{prefix}./{value.removeprefix(below)}"


def _paths_in(value: Any, annotation: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str, Callable[[str, Path], str]]]:
    group = group_in(annotation)
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from _paths_in(item, annotation_below(annotation, place), (*path, place))
    elif isinstance(value, dict):
        for key, item in value.items():
            rule = _rule(group, key) if group else None
            if rule is None:
                yield from _paths_in(item, annotation_below(annotation, key), (*path, key))
                continue
            entries = enumerate(item) if isinstance(item, list) else [(None, item)]
            for place, entry in entries:
                if isinstance(entry, str):
                    yield (*path, key) if place is None else (*path, key, place), entry, rule


def _rule(group: type[Keys], key: str) -> Callable[[str, Path], str] | None:
    if key not in keys_of(group):
        return None
    return next((rule for owner, name, rule in PATH_RULES if name == key and issubclass(group, owner)), None)
