"""Rewards and scorers that are a model's opinion, by name: `model:FOLDER` and `judge:FILE.yaml`; and the digest of what they are made of.

Nothing is loaded here, and nobody is asked.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from posttrain.errors import ConfigError
from posttrain.files import digest_file, digest_json, digest_tree
from posttrain.names import JUDGE, REWARD_MODEL, STAGE

_KINDS = {"ForSequenceClassification": 1, "ForTokenClassification": 2}
"""What the architecture of a model that pays ends in → its labels; the second rates each step of an answer."""
_TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""PEFT's task of an adapter → the same."""
STEP_AGGREGATES: Mapping[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "product": math.prod,
    "last": lambda steps: steps[-1],
    "mean": lambda steps: math.fsum(steps) / len(steps),
}
"""How the scores of an answer's steps become its own. Source: min, Math-Shepherd, arXiv 2312.08935 sec. 3.4; product, arXiv 2305.20050 sec. 2.6;
last, arXiv 2408.03314 app. E."""
_ADAPTER, _HEAD, _RECORD = "adapter_config.json", "score", "posttrain.json"


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a process reward model pays for an answer: what cuts it into steps (None: what the model was trained with), what their scores become."""

    step_separator: str | None = None
    aggregate: str = "min"


def step_options(where: str, options: Mapping[str, Any]) -> StepOptions:
    """`where` is what messages begin with. Raises: ConfigError."""
    known = ("step_separator", "aggregate")
    if unknown := [option for option in options if option not in known]:
        raise ConfigError(f"{where}: {unknown[0]}: a process reward model has {' and '.join(known)}")
    separator, aggregate = options.get("step_separator"), options.get("aggregate", "min")
    if separator is not None and (not isinstance(separator, str) or not separator):
        raise ConfigError(f"{where}: step_separator: got {separator!r}, expected the text behind each step")
    if aggregate not in STEP_AGGREGATES:
        raise ConfigError(f"{where}: aggregate: got {aggregate!r}, expected one of {', '.join(STEP_AGGREGATES)}")
    return StepOptions(separator, aggregate)


def check_learned_options(
    name: str, spec: str, options: Mapping[str, Any], folder: Path | None = None, *, key: str = "reward_kwargs"
) -> None:
    """What can be known before anything is loaded; `key` is where the options were given. Raises: ConfigError."""
    if spec.startswith(JUDGE):
        raise ConfigError(f"{key}: {name!r} takes no options; a judge's stand in its file")
    source = learned_source(spec, folder)
    if isinstance(source, Path) and not rates_steps(source):
        raise ConfigError(f"{key}: {name!r} takes no options: it rates whole answers, no steps")
    step_options(f"{key}: {name}", options)


def rates_steps(folder: Path) -> bool:
    """Whether the reward model rates each step of an answer."""
    if is_reward_adapter(folder):
        return _TASKS.get(str(_json_of(folder / _ADAPTER).get("task_type"))) == "ForTokenClassification"
    return any(
        "ForTokenClassification" in str(kind) for kind in _json_of(folder / "config.json").get("architectures") or ()
    )


def split_learned(spec: str) -> tuple[str, str] | None:
    """(prefix, source) of `model:./rm` and `judge:rubric.yaml`; None for any other reward."""
    prefix = next((prefix for prefix in (REWARD_MODEL, JUDGE) if spec.startswith(prefix)), None)
    return (prefix, spec.removeprefix(prefix)) if prefix else None


def named_stage(spec: str) -> str | None:
    """Kind or place of the pipeline's stage whose reward model this is: `reward_model` of `model:stage:reward_model`."""
    prefix = REWARD_MODEL + STAGE
    return spec.removeprefix(prefix) if spec.startswith(prefix) else None


def learned_source(spec: str, folder: Path | None = None) -> Path | str:
    """The folder or the file, relative to `folder`; a hub id or a stage as it stands. Raises: ConfigError for what is not there."""
    parts = split_learned(spec)
    assert parts is not None
    prefix, source = parts
    if named_stage(spec) is not None:
        return source
    path = ((folder or Path()) / Path(source).expanduser()).resolve()
    if prefix == JUDGE:
        if not path.is_file():
            raise ConfigError(f"{spec}: no file {path}; expected judge:FILE.yaml, relative to where it is named")
        return path
    if path.is_dir():
        _check_is_a_reward_model(spec, path)
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ConfigError(f"{spec}: no folder {path}; expected model:FOLDER of a reward model, or its hub id")
    return source


def learned_digest(spec: str, folder: Path | None = None) -> str:
    """Of a reward model its folder's, of a judge its file's with that of the model that it loads. Raises: ConfigError."""
    source = learned_source(spec, folder)
    if isinstance(source, str):  # a stage's model has a digest when it is made, and is then named by its folder
        return source if named_stage(spec) is not None else f"hub:{source}"
    if source.is_dir():
        return (
            digest_json([_folder_digest(source), _base_digest(source)])
            if is_reward_adapter(source)
            else _folder_digest(source)
        )
    judge = _judged_by(source)
    local = _local_model(source, judge)
    held = _folder_digest(local) if judge.get("url") is None and local.is_dir() else None
    return digest_json([digest_file(source), held])


def held_models(specs: Iterable[str], base: str) -> list[str]:
    """Folders or hub ids of the models that these rewards load into this process; a judge at a server is held there.

    A reward model of an earlier stage is as large as `base`, which it is made of. Raises: ConfigError.
    """
    found: list[str] = []
    for spec in dict.fromkeys(specs):
        if not split_learned(spec):
            continue
        source = base if named_stage(spec) is not None else learned_source(spec)
        if not spec.startswith(JUDGE):
            found.append(reward_base(source) if isinstance(source, Path) and is_reward_adapter(source) else str(source))
        elif (judge := _judged_by(Path(source))).get("url") is None:
            if not isinstance(judge.get("model"), str):
                raise ConfigError(f"{source}: got no `model`; expected the keys of a judge")
            local = _local_model(Path(source), judge)
            found.append(str(local if local.is_dir() else judge.get("model")))
    return found


def _local_model(file: Path, judge: Mapping[str, Any]) -> Path:
    return (file.parent / Path(str(judge.get("model"))).expanduser()).resolve()


def _judged_by(file: Path) -> Mapping[str, Any]:
    try:
        found: Any = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: expected YAML with the keys of a judge: {error}") from None
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _check_is_a_reward_model(spec: str, folder: Path) -> None:
    """Another model would get a new head, and pay at random. Raises: ConfigError."""
    if is_reward_adapter(folder):
        return _check_is_a_reward_adapter(spec, folder)
    try:
        config: Any = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{spec}: {folder} has no config.json that can be read ({error}); expected a model folder"
        ) from None
    kinds = config.get("architectures") or ["no architecture"]
    expected = next((labels for name, labels in _KINDS.items() if any(name in kind for kind in kinds)), None)
    if expected is None:
        raise ConfigError(
            f"{spec}: {folder} is a {kinds[0]}; expected a sequence-classification model with one label, as `posttrain reward_model` "
            "leaves it in its stage's `model`, or a token-classification model with two, as `posttrain process_reward_model` does"
        )
    # transformers writes the names of labels down unless there are two of them.
    num_labels = len(config.get("id2label") or ("no", "yes"))
    if num_labels != expected:
        what = "a reward model, which has one" if expected == 1 else "a process reward model, which has two"
        raise ConfigError(f"{spec}: {folder} has {num_labels} labels; expected {what}")


def is_reward_adapter(folder: Path) -> bool:
    """Whether a reward model is an adapter beside its base."""
    return (folder / _ADAPTER).is_file()


def reward_base(adapter: Path) -> str:
    """The folder or the hub id of the model under an adapter. Raises: ConfigError where none is named, or it is gone."""
    named = _json_of(adapter / _ADAPTER).get("base_model_name_or_path")
    if not isinstance(named, str) or not named or (named.startswith((".", "/")) and not Path(named).is_dir()):
        raise ConfigError(
            f"{adapter} was trained on {named or 'a base that it does not name'}, which is not there; put the base back, or name the "
            "merged model (`posttrain merge`, a stage's `model`)"
        )
    return named


def _base_digest(adapter: Path) -> str:
    """As our record has it, which is held when it is loaded; of another's adapter its base's."""
    recorded = _json_of(adapter / _RECORD).get("base_digest") if (adapter / _RECORD).is_file() else None
    if isinstance(recorded, str):
        return recorded
    base = reward_base(adapter)
    return _folder_digest(Path(base)) if Path(base).is_dir() else f"hub:{base}"


def _check_is_a_reward_adapter(spec: str, adapter: Path) -> None:
    """Raises: ConfigError."""
    config = _json_of(adapter / _ADAPTER)
    task, saved = config.get("task_type"), cast("list[str]", config.get("modules_to_save") or [])
    if task not in _TASKS or _HEAD not in saved:
        raise ConfigError(
            f"{spec}: {adapter} is an adapter with task_type {task} that saves {', '.join(map(str, saved)) or 'no module'} whole; expected "
            f"SEQ_CLS with its head `{_HEAD}`, as `posttrain reward_model` with an adapter leaves it in its stage's `adapter`, or TOKEN_CLS of "
            "`posttrain process_reward_model`"
        )
    reward_base(adapter)


def _json_of(path: Path) -> Mapping[str, Any]:
    """Raises: ConfigError."""
    try:
        found: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _digest_of(folder, tuple((str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files))


@functools.lru_cache(maxsize=32)
def _digest_of(folder: Path, state: tuple[tuple[str, int, int], ...]) -> str:
    """Gigabytes are read once, while size and time of every file stay."""
    return digest_tree(folder)
