"""A pipeline YAML in, its stages and gates out: keys at the top are handed down, and every reference must hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.config.check import build
from posttrain.config.check_gates import check_gates, check_reward_models
from posttrain.config.draft import PipelineDraft, StageDraft
from posttrain.config.foreign import foreign_names, translate
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.load import LoadedPipeline, check_stage, marked_kind, provenance, set_key
from posttrain.config.migrate import migrate
from posttrain.config.pipeline import ConfiguredStage, PipelineKeys
from posttrain.config.resolved import PIPELINE_DECIDES
from posttrain.config.schema import did_you_mean, keys_of
from posttrain.config.settings import Override, Problems, Settings, parse_overrides, read_settings, take_project
from posttrain.config.stages import TrainKeys
from posttrain.config.yaml_lines import KeyPath

_OWN = frozenset(keys_of(PipelineKeys))
_HANDED_DOWN = (frozenset(keys_of(TrainKeys)) - _OWN) | {"seed"}


def load_pipeline(path: Path, overrides: Sequence[str] = (), *, project: Path | None = None) -> LoadedPipeline:
    """Relative paths start from `project`, else from where the YAML says, else from its folder.

    Raises: ConfigError naming everything that is wrong, one line each.
    """
    path, problems, notes = Path(path), Problems(), list[str]()
    top, nulls = read_settings(path)
    folder = take_project(top, path, problems, project)
    if "stages" not in top.values:
        verb = marked_kind(top.values) or next(iter(STAGE_KINDS))
        problems.add(
            top.home, "stages", f"missing; a pipeline is a list of stages; did you mean posttrain {verb} {path}?"
        )
        problems.raise_if_any()
    notes += migrate(top, [PipelineKeys, TrainKeys], problems)
    notes += translate(top, TrainKeys, problems)
    _open_suites(top)
    _fill_registry(top)
    draft = PipelineDraft(top, _read_stages(top, nulls, problems, notes), folder, problems, notes)
    _override(draft, parse_overrides(overrides, problems))
    for stage in draft.stages:
        _build_stage(draft, stage)
    check_gates(draft)
    check_reward_models(draft)
    for stage in draft.stages:
        if "gate" in stage.settings.values:
            _build_stage(draft, stage)  # again: its gate's changes are resolved now
    keys = _build_pipeline(draft)
    problems.raise_if_any()
    assert keys is not None
    return LoadedPipeline(keys, path, folder, _provenance(keys, draft), tuple(dict.fromkeys(notes)))


def _open_suites(top: Settings) -> None:
    """`evals: {name: path}` is short for `{name: {path: path}}`."""
    suites = top.values.get("evals")
    for name, suite in suites.items() if isinstance(suites, dict) else ():
        if isinstance(suite, str):
            top.put(("evals", name), {"path": suite}, top.origin(("evals", name)))


def _fill_registry(top: Settings) -> None:
    """The default registry is a path as well, beside the YAML."""
    if isinstance(top.values.get("register"), dict):
        top.fill(("register", "registry"), "registry")


def _read_stages(top: Settings, nulls: frozenset[KeyPath], problems: Problems, notes: list[str]) -> list[StageDraft]:
    entries = top.values["stages"]
    if not isinstance(entries, list) or not entries:
        text = f"got {entries!r}, expected a list, e.g. stages: [{{sft: {{datasets: [{{path: data.jsonl}}]}}}}]"
        problems.add(top.origin(("stages",)), "stages", text)
        return []
    stages: list[StageDraft] = []
    for place, entry in enumerate(entries):
        empty = {str(path[2]): {} for path in nulls if path[:2] == ("stages", place) and len(path) == 3}
        stage = _read_stage(top, place, {**empty, **entry} if isinstance(entry, dict) else entry, problems, notes)
        if stage:
            stages.append(stage)
    return stages


def _read_stage(top: Settings, place: int, entry: Any, problems: Problems, notes: list[str]) -> StageDraft | None:
    path: KeyPath = ("stages", place)
    kinds = ", ".join(STAGE_KINDS)
    if not isinstance(entry, dict) or len(entry) != 1:
        got = f"a mapping with {', '.join(entry)}" if isinstance(entry, dict) and entry else repr(entry)
        problems.add(
            top.origin(path), top.name(path), f"got {got}, expected one of {kinds} with its keys, e.g. sft: {{…}}"
        )
        return None
    ((kind, body),) = entry.items()
    if kind not in STAGE_KINDS:
        text = f"no such stage: {kind}; expected one of {kinds}{did_you_mean(kind, STAGE_KINDS)}"
        problems.add(top.origin((*path, kind)), top.name(path), text)
        return None
    if not isinstance(body, dict):
        problems.add(top.origin((*path, kind)), top.name(path), f"got {body!r}, expected the keys of {kind}")
        return None
    top.values["stages"][place] = {kind: body}
    settings = top.below((*path, kind))
    settings.prefix = f"stages.{place + 1}."
    for key in PIPELINE_DECIDES:
        if key in settings.values:
            text = "the pipeline decides it; set it at the top (each stage starts from the one before)"
            problems.add(settings.origin((key,)), settings.name((key,)), text)
            del settings.values[key]
    draft = StageDraft(place + 1, kind, settings)
    notes += translate(settings, draft.model, problems)
    return draft


# --- overrides -----------------------------------------------------------------------------------------------------


def _override(draft: PipelineDraft, overrides: Sequence[Override]) -> None:
    """Apply `--set`: first what names all stages, then a kind, then a single stage, so that the closest wins."""
    for override in sorted(overrides, key=_reach):
        head, *rest = override.steps
        if _reach(override) == 0:
            _override_top(draft, override)
            continue
        chosen = _stages_named(draft, override)
        steps = rest if head in STAGE_KINDS else rest[1:]
        if chosen and steps and steps[0] in PIPELINE_DECIDES:
            draft.problems.add(override.origin, steps[0], f"the pipeline decides it; use --set {steps[0]}=…")
            continue
        for stage in chosen:
            if not steps:
                draft.problems.add(override.origin, ".".join(override.steps), f"name a key of the {stage.kind} stage")
                break
            set_key(stage.settings, steps, override, stage.model, draft.problems, draft.notes)


def _reach(override: Override) -> int:
    """0: the top, or every stage; 1: the stages of a kind; 2: one stage."""
    if override.steps[0] == "stages":
        return 2
    return 1 if override.steps[0] in STAGE_KINDS else 0


def _override_top(draft: PipelineDraft, override: Override) -> None:
    top, head = draft.top, override.steps[0]
    key = foreign_names(TrainKeys)[head].name if head in foreign_names(TrainKeys) else head
    model = PipelineKeys if key in _OWN else TrainKeys
    set_key(top, override.steps, override, model, draft.problems, draft.notes)
    if key in _HANDED_DOWN:
        # The command line outranks the file, so a stage's own key gives way too.
        for stage in draft.stages:
            stage.settings.values.pop(key, None)


def _stages_named(draft: PipelineDraft, override: Override) -> list[StageDraft]:
    head, *rest = override.steps
    have = ", ".join(map(str, draft.stages))
    if head != "stages":
        chosen = [stage for stage in draft.stages if stage.kind == head]
        text = f"this pipeline has no {head} stage; it has {have}"
    else:
        place = int(rest[0]) if rest and rest[0].isdigit() else 0
        chosen = [stage for stage in draft.stages if stage.place == place]
        text = f"expected stages.PLACE.KEY with a place that exists; there are {have}"
    if not chosen:
        draft.problems.add(override.origin, ".".join(override.steps), text)
    return chosen


# --- stages and the whole ------------------------------------------------------------------------------------------


def _build_stage(draft: PipelineDraft, stage: StageDraft) -> None:
    settings, top = stage.settings, draft.top
    handed = [key for key in top.values if key in _HANDED_DOWN and key not in settings.values]
    settings.take(top, handed, shared=True)
    if "base_model" in top.values:
        settings.take(top, ["base_model"], shared=True)
    else:
        settings.values["base_model"] = "missing"  # said once, for the pipeline
    stage.keys = build(stage.model, settings, stage.kind, draft.folder, draft.problems, draft.notes)
    if stage.keys is not None:
        check_stage(stage.kind, stage.keys, settings, draft.problems, draft.notes)


def _build_pipeline(draft: PipelineDraft) -> PipelineKeys | None:
    own = [key for key in draft.top.values if key not in _HANDED_DOWN or key in _OWN]
    settings = Settings({}, {}, draft.top.home)
    settings.take(draft.top, own)
    name = settings.values.get("name")
    if isinstance(name, str):
        settings.fill(("output_dir",), f"runs/{name}")
    stages = [ConfiguredStage(kind=stage.kind, keys=stage.keys) for stage in draft.stages if stage.keys is not None]
    # Where no stage is valid, the rest is still checked; what is built then is never returned.
    settings.values["stages"] = stages or [ConfiguredStage.model_construct(kind="", keys=None)]
    return build(PipelineKeys, settings, "pipeline", draft.folder, draft.problems, draft.notes)


def _provenance(keys: PipelineKeys, draft: PipelineDraft) -> dict[str, str]:
    found = provenance(keys, draft.top)
    for stage in draft.stages:
        own = provenance(stage.keys, stage.settings) if stage.keys is not None else {}
        placed = {f"stages.{stage.place}.{key}": came for key, came in own.items()}
        found |= {key: came for key, came in placed.items() if key in found}
    return found
