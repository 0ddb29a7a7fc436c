"""A YAML file and `--set` overrides in, frozen keys out, with the provenance of every key.

`load_pipeline` is in `load_pipeline.py`; here are single stages and gate specs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.check import build
from posttrain.config.effects import without_effect
from posttrain.config.foreign import foreign_names, translate
from posttrain.config.importers.flat import in_place, kind_of, whose
from posttrain.config.judge import JudgeKeys
from posttrain.config.kinds import STAGE_KINDS, StageKind, stage_kind
from posttrain.config.knob import Keys
from posttrain.config.migrate import migrate
from posttrain.config.pipeline import ConfiguredStage, GateKeys, PipelineKeys, in_pipeline
from posttrain.config.ppo import PPOKeys
from posttrain.config.resolved import leaves
from posttrain.config.rl import PRESETS, RLKeys
from posttrain.config.schema import did_you_mean, keys_of
from posttrain.config.settings import (
    KeyOrigin,
    Override,
    Problems,
    Settings,
    apply_override,
    dotted,
    parse_overrides,
    read_settings,
    take_project,
)
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.config.yaml_lines import KeyPath
from posttrain.names import REWARD_MODEL, STAGE, name_of, reward_name, reward_names


@dataclass(frozen=True, slots=True)
class LoadedStage:
    """A single stage as it will run. `provenance` says of every key `default`, `file:line` or `--set`."""

    kind: str
    keys: TrainKeys
    path: Path
    project: Path
    provenance: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadedPipeline:
    """A pipeline as it will run; the keys of stage 2 stand under `stages.2.`."""

    keys: PipelineKeys
    path: Path
    project: Path
    provenance: dict[str, str]
    notes: tuple[str, ...] = ()


def load_stage(
    kind: str, path: Path | None, overrides: Sequence[str] = (), given: Mapping[str, Any] | None = None,
    *, project: Path | None = None,
) -> LoadedStage:  # fmt: skip
    """From a YAML, from Python values (`given`, which stand above the YAML), or both.

    Raises: ConfigError naming everything that is wrong, one line each.
    """
    problems, notes = Problems(), list[str]()
    nothing = Settings({}, {}, KeyOrigin("argument", "argument"))
    settings, nulls = read_settings(Path(path)) if path is not None else (nothing, frozenset())
    path = Path(path) if path is not None else Path(f"{kind}.yaml")
    folder = take_project(settings, path, problems, project)
    settings, said = in_place(settings, nulls, kind, path, problems)
    notes += said
    for name, value in (given or {}).items():
        settings.put((name,), value, KeyOrigin("argument", "argument"))
    model = stage_kind(kind).keys
    if "stages" in settings.values:
        problems.add(settings.origin(("stages",)), "stages", f"this is a pipeline; run it with `posttrain run {path}`")
        problems.raise_if_any()
    notes += migrate(settings, [model], problems)
    notes += translate(settings, model, problems)
    for override in parse_overrides(overrides, problems):
        steps = _steps_in_stage(kind, override, problems)
        if steps:
            set_key(settings, steps, override, model, problems, notes)
    settings.fill(("output_dir",), f"runs/{path.stem}")
    marked = marked_kind(settings.values, kind) or (next(iter(STAGE_KINDS)) if stage_kind(kind).rewarded else kind)
    keys = build(model, settings, kind, folder, problems, notes)
    if keys is not None:
        check_stage(kind, keys, settings, problems, notes)
        _check_alone(keys, settings, problems)
    if problems.found and marked != kind:
        problems.add(KeyOrigin(str(path), path.name), "", f"if this is meant as {marked}: posttrain {marked} {path}")
    problems.raise_if_any()
    assert keys is not None
    return LoadedStage(kind, keys, path, folder, provenance(keys, settings), tuple(notes))


def _check_alone(keys: Keys, settings: Settings, problems: Problems) -> None:
    """A stage by itself has no earlier one that could be named."""
    named = [
        (("reward_funcs", place), spec, REWARD_MODEL + STAGE)
        for place, spec in enumerate(keys.reward_funcs if isinstance(keys, RLKeys) else ())
    ]
    named += [(("value_model",), keys.value_model or "", STAGE)] if isinstance(keys, PPOKeys) else []
    for path, spec, prefix in named:
        if spec.startswith(prefix):
            text = f"got {spec}, which names an earlier stage of the same pipeline; here expected {prefix.removesuffix(STAGE)}FOLDER"
            problems.add(settings.origin(path), settings.name(path), text)


def load_model_keys(path: Path) -> ModelKeys:
    """How the stage whose keys stand in `path` loaded its model, whatever became of its data. Raises: ConfigError."""
    problems, (settings, _) = Problems(), read_settings(Path(path))
    folder = take_project(settings, Path(path), problems)
    migrate(settings, [TrainKeys], problems)
    settings.values = {name: value for name, value in settings.values.items() if name in keys_of(ModelKeys)}
    keys = build(ModelKeys, settings, "stage", folder, problems, [])
    problems.raise_if_any()
    assert keys is not None
    return keys


def as_pipeline(loaded: LoadedStage) -> PipelineKeys:
    """A single stage as the pipeline that runs it."""
    keys = in_pipeline(loaded.kind).model_validate(loaded.keys.model_dump(by_alias=True))
    return PipelineKeys(
        name=name_of(loaded.path.stem), base_model=keys.base_model, stages=[ConfiguredStage(kind=loaded.kind, keys=keys)],
        output_dir=keys.output_dir, seed=keys.seed,
    )  # fmt: skip


def load_gate(given: Path | Mapping[str, Any]) -> GateKeys:
    """A gate spec: its keys at the top of a file, under `gate` of a pipeline, or as Python values. Raises: ConfigError."""
    problems = Problems()
    if isinstance(given, Mapping):
        path, settings = Path("gate.yaml"), Settings(dict(given), {}, KeyOrigin("argument", "argument"))
    else:
        path, (settings, _) = given, read_settings(given)
    folder = take_project(settings, path, problems)
    migrate(settings, [PipelineKeys if "gate" in settings.values else GateKeys], problems)
    if isinstance(settings.values.get("gate"), dict):
        settings = settings.below(("gate",))
    elif "stages" in settings.values:
        problems.add(settings.home, "gate", "missing; this pipeline has no gate at its top")
        problems.raise_if_any()
    keys = build(GateKeys, settings, "gate", folder, problems, [])
    problems.raise_if_any()
    assert keys is not None
    return keys


def load_judge(path: Path) -> JudgeKeys:
    """The keys of a judge, in a file of their own. Raises: ConfigError."""
    problems, (settings, _) = Problems(), read_settings(Path(path))
    keys = build(JudgeKeys, settings, "judge", Path(path).parent, problems, [])
    problems.raise_if_any()
    assert keys is not None
    return keys


def detect_kind(path: Path) -> str:
    """What a YAML is for: a pipeline has `stages`; else the kind that takes most of its keys and reads most of its data.

    Among equals the first in the table.
    """
    values = read_settings(Path(path))[0].values
    if "stages" in values:
        return "pipeline"
    tool = whose(values)
    return kind_of(values, tool) if tool else marked_kind(values) or next(iter(STAGE_KINDS))


def marked_kind(values: Mapping[str, Any], asked: str | None = None) -> str | None:
    """The kind that takes most of these keys and types of data, among equals one that needs no other key, then the one asked for, then the first.

    None where all could be meant.
    """
    names, sources = set(values), values.get("datasets")
    names |= (
        {f"type {entry.get('type')}" for entry in sources if isinstance(entry, dict)}
        if isinstance(sources, list)
        else set()
    )
    taken = {name: names & _marks(row) for name, row in STAGE_KINDS.items()}
    if all(marks == set.intersection(*taken.values()) for marks in taken.values()):
        return None
    return max(taken, key=lambda name: (len(taken[name]), _required(STAGE_KINDS[name]) <= set(values), name == asked))


def _required(row: StageKind) -> set[str]:
    return {name for name, info in keys_of(row.keys).items() if info.required}


def _marks(row: StageKind) -> set[str]:
    return {*keys_of(row.keys), *foreign_names(row.keys), *(f"type {name}" for name in row.types)}


def describe_keys(loaded: LoadedStage | LoadedPipeline) -> list[tuple[str, Any, str]]:
    """Every key with its value and where it came from, defaults included, in the order of the schema."""
    values = ((dotted(path), value) for path, value in leaves(loaded.keys))
    return [(key, value, loaded.provenance[key]) for key, value in values]


def provenance(keys: Keys, settings: Settings) -> dict[str, str]:
    return {dotted(path): _came_from(path, value, settings) for path, value in leaves(keys)}


def _came_from(path: KeyPath, value: Any, settings: Settings) -> str:
    if settings.has(path) and any(path[:length] in settings.origins for length in range(1, len(path) + 1)):
        return settings.origin(path).short
    if path == ("load_in_4bit",) and value:
        return settings.origin(("adapter",)).short  # implied by `adapter: qlora`
    if (preset := settings.values.get("preset")) in PRESETS and _holds(PRESETS[preset], path):
        return f"preset {preset}"
    return "default"


def _holds(values: Any, path: KeyPath) -> bool:
    for step in path:
        if not isinstance(values, dict) or step not in values:
            return False
        values = values[step]
    return True


def _steps_in_stage(kind: str, override: Override, problems: Problems) -> Sequence[str]:
    """The steps below the stage; `grpo.learning_rate` is `learning_rate` for a grpo stage."""
    head, *rest = override.steps
    if head not in STAGE_KINDS or head in keys_of(STAGE_KINDS[kind].keys):
        return override.steps
    if head != kind or not rest:
        text = f"this is {kind}, not {head}" if head != kind else f"name a key of the {kind} stage"
        problems.add(override.origin, head, text)
        return ()
    return rest


def set_key(
    settings: Settings,
    steps: Sequence[str],
    override: Override,
    model: type[Keys],
    problems: Problems,
    notes: list[str],
) -> None:
    """Apply one override to the keys of `model`, other tools' names included."""
    if len(steps) == 1 and steps[0] in foreign_names(model):
        alone = Settings({steps[0]: override.value}, {(steps[0],): override.origin}, override.origin)
        notes += translate(alone, model, problems)
        for key, value in alone.values.items():
            settings.put((key,), value, override.origin)
        return
    apply_override(settings, steps, override, problems)


def check_stage(kind: str, keys: TrainKeys, settings: Settings, problems: Problems, notes: list[str]) -> None:
    """What no single key can say: options of rewards that are not used, keys without effect, rows of another stage."""
    was_set = {path[0] for path in settings.origins if len(path) == 1}
    notes += [
        settings.prefix.rstrip(".") + ": " * bool(settings.prefix) + note
        for note in without_effect(keys, was_set.__contains__)
    ]
    _check_types(kind, keys, settings, problems)
    if isinstance(keys, RLKeys):
        names = reward_names(keys.reward_funcs)
        for name in keys.reward_kwargs:
            if reward_name(name) not in names:
                path = ("reward_kwargs", name)
                text = f"no such entry in reward_funcs{did_you_mean(name, names)}"
                problems.add(settings.origin(path), settings.name(path), text)


def _check_types(kind: str, keys: TrainKeys, settings: Settings, problems: Problems) -> None:
    types = stage_kind(kind).types
    for group, sources in (("datasets", keys.datasets), ("eval_datasets", keys.eval_datasets)):
        for place, source in enumerate(sources):
            if source.type not in ("auto", *types):
                path = (group, place, "type")
                text = f"{source.type} is not for {kind}, which takes {' or '.join(types)}"
                problems.add(settings.origin(path), settings.name(path), text)
