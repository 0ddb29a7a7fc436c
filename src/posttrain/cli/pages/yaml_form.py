"""A form over the schema: each key with what `posttrain explain` says of it, and the YAML that the filled-in keys are."""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from posttrain.cli.agent_folder import ServedFolder
from posttrain.config.explain import groups
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.load import load_stage
from posttrain.config.load_pipeline import load_pipeline
from posttrain.config.schema import KeyInfo, arms, group_in, keys_of
from posttrain.config.yaml_lines import dump_yaml, parse_value, read_yaml
from posttrain.errors import ConfigError, PosttrainError
from posttrain.files import write_atomic

FORM_KINDS = (*STAGE_KINDS, "pipeline")
_USUAL = (
    "base_model", "datasets", "reward_funcs", "teachers", "name", "stages", "evals", "gate", "register", "output_dir", "adapter",
    "learning_rate", "num_train_epochs", "max_steps", "sequence_len", "micro_batch_size", "gradient_accumulation_steps", "seed", "loss_type", "beta",
)  # fmt: skip
"""Keys that stand open; the others are below them, by name."""


@dataclass(frozen=True, slots=True)
class KeyField:
    """A key in the form. `choices` are all that it takes, where these can be listed; `is_long` is written as YAML over several lines."""

    info: KeyInfo
    value: str
    choices: tuple[str, ...]
    is_long: bool

    @property
    def also(self) -> str:
        return ", ".join(map(str, self.info.also))


@dataclass(frozen=True, slots=True)
class DraftedYaml:
    """What was filled in, as text, and what is wrong with it."""

    text: str
    problem: str


def key_fields(kind: str, given: Mapping[str, str]) -> tuple[list[KeyField], list[KeyField]]:
    """The keys of a kind: those that most runs set, and the rest. Raises: ConfigError for no such kind."""
    infos = _keys(kind)
    usual = [name for name in _USUAL if name in infos] + [
        name for name in infos if infos[name].required and name not in _USUAL
    ]
    rest = [name for name in infos if name not in usual]
    return [_field(infos[name], given) for name in usual], [_field(infos[name], given) for name in rest]


def _keys(kind: str) -> dict[str, KeyInfo]:
    if kind not in FORM_KINDS:
        raise ConfigError(f"got no kind {kind!r}; expected one of {', '.join(FORM_KINDS)}")
    return keys_of(groups()[kind])


def _field(info: KeyInfo, given: Mapping[str, str]) -> KeyField:
    found = arms(info.annotation)
    choices: tuple[str, ...] = ()
    if len(found) == 1 and get_origin(found[0]) is Literal:
        choices = tuple(map(str, get_args(found[0])))
    elif found == (bool,):
        choices = ("true", "false")
    is_long = group_in(info.annotation) is not None or any(get_origin(arm) in (list, dict) for arm in found)
    return KeyField(info, given.get(info.name, ""), choices, is_long)


def draft_yaml(kind: str, given: Mapping[str, str], place: ServedFolder, target: str) -> DraftedYaml:
    """The YAML of what was filled in, and what its command would say of it at `target`. Raises: ConfigError for a place outside."""
    infos, values, wrong = _keys(kind), dict[str, Any](), list[str]()
    for name, text in given.items():
        if name in infos and text.strip():
            try:
                values[name] = _value(name, text)
            except ConfigError as error:
                wrong.append(str(error))
    path = target_path(place, target)
    text = _text(kind, values, infos)
    problem = "\n".join(wrong) or _problem(kind, text, path)
    return DraftedYaml(text, problem)


def _value(name: str, text: str) -> Any:
    """As it stands in a YAML: a scalar, `[…]`, `{…}`, or lines of their own. Raises: ConfigError."""
    if "\n" not in text.strip() and not text.lstrip().startswith("- "):
        try:
            return parse_value(text)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    with tempfile.TemporaryDirectory(prefix="posttrain-ui-") as folder:
        lines = Path(folder) / name
        lines.write_text(f"{name}:\n{textwrap.indent(text, '  ')}\n", encoding="utf-8")
        try:
            return read_yaml(lines).data[name]
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(lines), name)) from error


def target_path(place: ServedFolder, target: str) -> Path:
    """Raises: ConfigError for a file outside of the folder, or one that is no YAML."""
    path = place.inside(target)
    if path.suffix not in (".yaml", ".yml") or not path.parent.is_dir():
        raise ConfigError(f"{target}: expected the path of a .yaml file in a folder that is there")
    return path


def write_draft(draft: DraftedYaml, path: Path) -> None:
    """Raises: ConfigError for one with a problem, or where a file is already."""
    if draft.problem:
        raise ConfigError(draft.problem)
    if path.exists():
        raise ConfigError(f"{path.name} is there already; give another name: nothing is written over")
    write_atomic(path, draft.text)


def _text(kind: str, values: Mapping[str, Any], infos: Mapping[str, KeyInfo]) -> str:
    lines = [f"# {'posttrain run' if kind == 'pipeline' else f'posttrain {kind}'}"]
    for name, value in values.items():
        lines += ["", f"# {' '.join(infos[name].meaning.split())}"]
        lines.append(dump_yaml({name: value}).rstrip())
    return "\n".join(lines) + "\n"


def _problem(kind: str, text: str, path: Path) -> str:
    """What the loader says, of the lines of this text."""
    with tempfile.TemporaryDirectory(prefix="posttrain-ui-") as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        try:
            if kind == "pipeline":
                load_pipeline(copy, project=path.parent)
            else:
                load_stage(kind, copy, project=path.parent)
        except PosttrainError as error:
            return str(error).replace(str(copy), path.name)
    return ""
