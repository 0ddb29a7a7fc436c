"""A pipeline YAML in, its stages and gates out: keys at the top are handed down, and every reference must hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from posttrain.config.check import build
from posttrain.config.foreign import foreign_names, translate
from posttrain.config.load import LoadedPipeline, check_stage, provenance, set_key
from posttrain.config.pipeline import STAGE_IN_PIPELINE, GateKeys, OnFailKeys, PipelineKeys, Stage, StageKind
from posttrain.config.resolved import PIPELINE_DECIDES
from posttrain.config.schema import did_you_mean, keys_of
from posttrain.config.settings import Override, Problems, Settings, parse_overrides, read_settings
from posttrain.config.stages import TrainKeys
from posttrain.config.yaml_lines import KeyPath

_OWN = frozenset(keys_of(PipelineKeys))
_HANDED_DOWN = (frozenset(keys_of(TrainKeys)) - _OWN) | {"seed"}


@dataclass(slots=True)
class _StageDraft:
    """A stage on its way: its own settings, then with what the pipeline hands down, then its keys."""

    kind: StageKind
    settings: Settings
    keys: Any = None

    @property
    def model(self) -> type[TrainKeys]:
        return STAGE_IN_PIPELINE[self.kind]


@dataclass(slots=True)
class _Draft:
    """A pipeline on its way."""

    top: Settings
    stages: list[_StageDraft]
    folder: Path
    problems: Problems
    notes: list[str]


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> LoadedPipeline:
    """Raises: ConfigError naming everything that is wrong, one line each."""
    path, problems, notes = Path(path), Problems(), list[str]()
    top, nulls = read_settings(path)
    if "stages" not in top.values:
        advice = "a pipeline is a list of stages; a single stage runs with `posttrain sft`, `dpo` or `grpo`"
        problems.add(top.home, "stages", f"missing; {advice}")
        problems.raise_if_any()
    notes += translate(top, TrainKeys, problems)
    _open_suites(top)
    draft = _Draft(top, _read_stages(top, nulls, problems, notes), path.parent, problems, notes)
    _override(draft, parse_overrides(overrides, problems))
    for stage in draft.stages:
        _build_stage(draft, stage)
    keys = _build_pipeline(draft)
    if keys is not None:
        keys = _check_gates(draft, keys)
    problems.raise_if_any()
    assert keys is not None
    return LoadedPipeline(keys, path, _provenance(keys, draft), tuple(dict.fromkeys(notes)))


def _open_suites(top: Settings) -> None:
    """`evals: {name: path}` is short for `{name: {path: path}}`."""
    suites = top.values.get("evals")
    for name, suite in suites.items() if isinstance(suites, dict) else ():
        if isinstance(suite, str):
            top.put(("evals", name), {"path": suite}, top.origin(("evals", name)))


def _read_stages(top: Settings, nulls: frozenset[KeyPath], problems: Problems, notes: list[str]) -> list[_StageDraft]:
    entries = top.values["stages"]
    if not isinstance(entries, list) or not entries:
        text = f"got {entries!r}, expected a list, e.g. stages: [{{sft: {{datasets: [{{path: data.jsonl}}]}}}}]"
        problems.add(top.origin(("stages",)), "stages", text)
        return []
    stages: list[_StageDraft] = []
    for place, entry in enumerate(entries):
        empty = {str(path[2]): {} for path in nulls if path[:2] == ("stages", place) and len(path) == 3}
        stage = _read_stage(top, place, {**empty, **entry} if isinstance(entry, dict) else entry, problems, notes)
        if stage:
            stages.append(stage)
    return stages


def _read_stage(top: Settings, place: int, entry: Any, problems: Problems, notes: list[str]) -> _StageDraft | None:
    path: KeyPath = ("stages", place)
    kinds = ", ".join(STAGE_IN_PIPELINE)
    if not isinstance(entry, dict) or len(entry) != 1:
        got = f"a mapping with {', '.join(entry)}" if isinstance(entry, dict) and entry else repr(entry)
        problems.add(
            top.origin(path), top.name(path), f"got {got}, expected one of {kinds} with its keys, e.g. sft: {{…}}"
        )
        return None
    ((kind, body),) = entry.items()
    if kind not in STAGE_IN_PIPELINE:
        text = f"no such stage: {kind}; expected one of {kinds}{did_you_mean(kind, STAGE_IN_PIPELINE)}"
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
    draft = _StageDraft(cast(StageKind, kind), settings)
    notes += translate(settings, draft.model, problems)
    return draft


# --- overrides -----------------------------------------------------------------------------------------------------


def _override(draft: _Draft, overrides: Sequence[Override]) -> None:
    """Apply `--set`: first what names all stages, then a kind, then a single stage, so that the closest wins."""
    for override in sorted(overrides, key=_reach):
        head, *rest = override.steps
        if _reach(override) == 0:
            _override_top(draft, override)
            continue
        chosen = _stages_named(draft, override)
        steps = rest if head in STAGE_IN_PIPELINE else rest[1:]
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
    return 1 if override.steps[0] in STAGE_IN_PIPELINE else 0


def _override_top(draft: _Draft, override: Override) -> None:
    top, head = draft.top, override.steps[0]
    key = foreign_names(TrainKeys)[head].name if head in foreign_names(TrainKeys) else head
    model = PipelineKeys if key in _OWN else TrainKeys
    set_key(top, override.steps, override, model, draft.problems, draft.notes)
    if key in _HANDED_DOWN:
        # The command line outranks the file, so a stage's own key gives way too.
        for stage in draft.stages:
            stage.settings.values.pop(key, None)


def _stages_named(draft: _Draft, override: Override) -> list[_StageDraft]:
    head, *rest = override.steps
    have = ", ".join(f"{place} {stage.kind}" for place, stage in enumerate(draft.stages, 1))
    if head != "stages":
        chosen = [stage for stage in draft.stages if stage.kind == head]
        text = f"this pipeline has no {head} stage; it has {have}"
    else:
        place = int(rest[0]) if rest and rest[0].isdigit() else 0
        chosen = draft.stages[place - 1 : place] if place else []
        text = f"expected stages.PLACE.KEY with a place that exists; there are {have}"
    if not chosen:
        draft.problems.add(override.origin, ".".join(override.steps), text)
    return chosen


# --- stages and the whole ------------------------------------------------------------------------------------------


def _build_stage(draft: _Draft, stage: _StageDraft) -> None:
    settings, top = stage.settings, draft.top
    handed = [key for key in top.values if key in _HANDED_DOWN and key not in settings.values]
    settings.take(top, handed, shared=True)
    if "base_model" in top.values:
        settings.take(top, ["base_model"], shared=True)
    else:
        settings.values["base_model"] = "missing"  # said once, for the pipeline
    stage.keys = build(stage.model, settings, stage.kind, draft.folder, draft.problems, draft.notes)
    if stage.keys is not None:
        check_stage(stage.keys, settings, draft.problems, draft.notes)


def _build_pipeline(draft: _Draft) -> PipelineKeys | None:
    own = [key for key in draft.top.values if key not in _HANDED_DOWN or key in _OWN]
    settings = Settings({}, {}, draft.top.home)
    settings.take(draft.top, own)
    name = settings.values.get("name")
    if isinstance(name, str):
        settings.values.setdefault("output_dir", f"runs/{name}")
    stand_in = Stage.model_construct(kind="sft", keys=None)
    settings.values["stages"] = [_as_stage(stage) for stage in draft.stages if stage.keys is not None] or [stand_in]
    return build(PipelineKeys, settings, "pipeline", draft.folder, draft.problems, draft.notes)


def _as_stage(stage: _StageDraft) -> Stage:
    return Stage(kind=stage.kind, keys=stage.keys)


def _provenance(keys: PipelineKeys, draft: _Draft) -> dict[str, str]:
    found = provenance(keys, draft.top)
    for place, stage in enumerate(draft.stages, 1):
        own = provenance(stage.keys, stage.settings)
        found |= {f"stages.{place}.{key}": origin for key, origin in own.items() if f"stages.{place}.{key}" in found}
    return found


# --- gates ---------------------------------------------------------------------------------------------------------


def _gates(draft: _Draft, keys: PipelineKeys) -> Iterator[tuple[GateKeys, Settings, int]]:
    """Every gate with the settings it stands in and the number of stages before it."""
    for place, stage in enumerate(draft.stages, 1):
        if stage.keys is not None and stage.keys.gate is not None:
            yield stage.keys.gate, stage.settings, place
    if keys.gate is not None:
        yield keys.gate, draft.top, len(draft.stages)


def _check_gates(draft: _Draft, keys: PipelineKeys) -> PipelineKeys:
    """`keys` with the checked and resolved changes of every `on_fail.with`."""
    has_gate = False
    resolved: dict[int, GateKeys] = {}
    for gate, settings, place in _gates(draft, keys):
        has_gate = True
        _check_suites(draft, keys, gate, settings)
        _check_baseline(draft, gate, settings, place)
        resolved[id(gate)] = _check_retry(draft, gate, settings, place)
    _check_needs_gate(draft, keys, has_gate)
    stages = [_with_gate(stage, resolved) for stage in keys.stages]
    gate = resolved[id(keys.gate)] if keys.gate is not None else None
    return keys.model_copy(update={"stages": stages, "gate": gate})


def _with_gate(stage: Stage, resolved: dict[int, GateKeys]) -> Stage:
    if stage.keys is None or stage.keys.gate is None:
        return stage
    return stage.model_copy(update={"keys": stage.keys.model_copy(update={"gate": resolved[id(stage.keys.gate)]})})


def _check_suites(draft: _Draft, keys: PipelineKeys, gate: GateKeys, settings: Settings) -> None:
    for role, tests in (("guards", gate.guards), ("primary", gate.primary)):
        for place, test in enumerate(tests):
            if test.suite not in keys.evals:
                path = ("gate", role, place, "suite")
                have = f"; evals has {', '.join(keys.evals)}" if keys.evals else "; evals is empty"
                close = did_you_mean(test.suite, keys.evals) or have
                draft.problems.add(settings.origin(path), settings.name(path), f"no suite {test.suite} in evals{close}")


def _check_baseline(draft: _Draft, gate: GateKeys, settings: Settings, place: int) -> None:
    kind, _, name = gate.baseline.partition(":")
    earlier = [str(number) for number in range(1, place)]
    if kind == "stage" and name not in ("base", *earlier):
        path = ("gate", "baseline")
        expected = ", ".join(f"stage:{other}" for other in ("base", *earlier))
        text = f"got {gate.baseline}, expected {expected} (a stage before this gate's), alias:NAME or a path"
        draft.problems.add(settings.origin(path), settings.name(path), text)


def _check_retry(draft: _Draft, gate: GateKeys, settings: Settings, place: int) -> GateKeys:
    if not isinstance(gate.on_fail, OnFailKeys):
        return gate
    path: KeyPath = ("gate", "on_fail", "retry")
    retry = gate.on_fail.retry
    before = draft.stages[:place]
    if isinstance(retry, int):
        found = before[retry - 1 : retry] if retry > 0 else []
    else:
        found = [stage for stage in before if stage.kind == retry]
    have = ", ".join(f"{number} {stage.kind}" for number, stage in enumerate(before, 1))
    if len(found) != 1:
        why = f"{len(found)} stages are {retry}; name its place" if found else f"no stage {retry} before this gate"
        draft.problems.add(settings.origin(path), settings.name(path), f"{why}; there are {have}")
        return gate
    changes = _check_changes(draft, found[0], settings) if settings.has(("gate", "on_fail", "with")) else {}
    return gate.model_copy(update={"on_fail": gate.on_fail.model_copy(update={"with_": changes})})


def _check_changes(draft: _Draft, target: _StageDraft, settings: Settings) -> dict[str, Any]:
    """The changes of a retry, checked as keys of the stage that they change."""
    changes = settings.below(("gate", "on_fail", "with"))
    draft.notes += translate(changes, target.model, draft.problems)
    for key in (*PIPELINE_DECIDES, "gate"):
        if key in changes.values:
            draft.problems.add(changes.origin((key,)), changes.name((key,)), "a retry cannot change it")
            del changes.values[key]
    if target.keys is None:
        return {}
    names = list(changes.values)
    unchanged = [key for key in target.settings.values if key not in changes.values]
    changes.take(target.settings, unchanged, shared=True)
    build(target.model, changes, target.kind, draft.folder, draft.problems, draft.notes)
    return {name: changes.values[name] for name in names}


def _check_needs_gate(draft: _Draft, keys: PipelineKeys, has_gate: bool) -> None:
    if keys.stop_when == "gate_passes" and not has_gate:
        text = "gate_passes needs a gate; add one, or remove stop_when"
        draft.problems.add(draft.top.origin(("stop_when",)), "stop_when", text)
    at_the_end = keys.gate is not None or (draft.stages and draft.stages[-1].keys and draft.stages[-1].keys.gate)
    if keys.register_ is not None and not (at_the_end or (has_gate and keys.stop_when == "gate_passes")):
        text = "nothing takes an alias without a passing verdict; add a gate at the top or in the last stage"
        draft.problems.add(draft.top.origin(("register",)), "register", text)
