"""What a pipeline refers to must exist: suites, stages, the keys that a retry changes; reward models that stages train."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from posttrain.config.check import build
from posttrain.config.draft import PipelineDraft, StageDraft
from posttrain.config.foreign import translate
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.resolved import PIPELINE_DECIDES
from posttrain.config.schema import did_you_mean
from posttrain.config.settings import Settings
from posttrain.names import REWARD_MODEL, STAGE, reward_name


def check_gates(draft: PipelineDraft) -> None:
    """Check every gate; the changes of `on_fail.with` are resolved in place. Shapes are the key models' business."""
    for settings, place in _gates(draft):
        _check_suites(draft, settings)
        _check_baseline(draft, settings, place)
        _check_retry(draft, settings, place)
    _check_needs_gate(draft)
    _check_judges_policies(draft)


def check_reward_models(draft: PipelineDraft) -> None:
    """A reward, or the beginning of a critic, that is an earlier stage's model names one stage before it, which makes such a one."""
    for stage in draft.stages:
        before = [one for one in draft.stages if one.place < stage.place]
        pay = [one for one in before if not _is_policy(one)]
        value = [one for one in before if _gives_value(one)]
        specs = stage.settings.values.get("reward_funcs")
        for place, spec in enumerate(specs if isinstance(specs, list) else ()):
            _check_names_one(draft, stage, ("reward_funcs", place), spec, REWARD_MODEL + STAGE, pay)
            _check_rates_what_is_asked(draft, stage, spec, pay)
        _check_names_one(draft, stage, ("value_model",), stage.settings.values.get("value_model"), STAGE, value)


def _check_names_one(
    draft: PipelineDraft, stage: StageDraft, path: tuple[str | int, ...], spec: Any, prefix: str, made: list[StageDraft]
) -> None:  # fmt: skip
    if not isinstance(spec, str) or not spec.startswith(prefix):
        return
    if len([one for one in made if spec.removeprefix(prefix) in (one.kind, str(one.place))]) != 1:
        what = "a reward model" if path[0] == "reward_funcs" else "a reward model or a critic"
        there = ", ".join(f"{prefix}{one.place}" for one in made) or "none; put a reward_model stage before this one"
        text = f"got {spec}, expected {what} of an earlier stage: {there}"
        draft.problems.add(stage.settings.origin(path), stage.settings.name(path), text)


def _check_rates_what_is_asked(draft: PipelineDraft, stage: StageDraft, spec: Any, made: list[StageDraft]) -> None:
    """Steps are rated by a process reward model alone."""
    found = [
        one
        for one in made
        if isinstance(spec, str) and spec in (f"{REWARD_MODEL}{STAGE}{name}" for name in (one.kind, one.place))
    ]
    if len(found) != 1 or found[0].kind not in STAGE_KINDS or STAGE_KINDS[found[0].kind].keys.rates_steps:
        return
    values = stage.settings.values
    options = values.get("reward_kwargs")
    given = [
        key for key in (options if isinstance(options, dict) else ()) if reward_name(str(key)) == reward_name(spec)
    ]
    asked: list[tuple[tuple[str | int, ...], str]] = [(("reward_kwargs", key), "") for key in given]
    asked += [(("credit",), "step: ")] if values.get("credit") == "step" else []
    for path, got in asked:
        text = f"{got}{spec} rates whole answers, no steps; name a process_reward_model stage, or take it away"
        draft.problems.add(stage.settings.origin(path), stage.settings.name(path), text)


def _gives_value(stage: StageDraft) -> bool:
    """Whether a critic can begin with it: what rates steps has another head."""
    kind = STAGE_KINDS.get(stage.kind)
    return kind is not None and (kind.has_critic or (kind.keys.is_reward_model and not kind.keys.rates_steps))


def _is_policy(stage: StageDraft) -> bool:
    return stage.kind in STAGE_KINDS and not STAGE_KINDS[stage.kind].keys.is_reward_model


def _check_judges_policies(draft: PipelineDraft) -> None:
    """A reward model answers no suite, so no gate judges it and it takes no alias."""
    text = "judges a reward model, which answers no suite; let a stage that trains a policy follow, or take it away"
    for stage in draft.stages:
        settings = stage.settings
        if "gate" in settings.values and not _is_policy(stage):
            draft.problems.add(settings.origin(("gate",)), settings.name(("gate",)), text)
    if "gate" in draft.top.values and draft.stages and not _is_policy(draft.stages[-1]):
        draft.problems.add(draft.top.origin(("gate",)), "gate", text)


def _gates(draft: PipelineDraft) -> Iterator[tuple[Settings, int]]:
    """The settings that hold a gate, with the place of the last stage before it."""
    for stage in draft.stages:
        if isinstance(stage.settings.values.get("gate"), dict):
            yield stage.settings, stage.place
    if isinstance(draft.top.values.get("gate"), dict):
        yield draft.top, max((stage.place for stage in draft.stages), default=0)


def _check_suites(draft: PipelineDraft, settings: Settings) -> None:
    suites = draft.top.values.get("evals", {})
    for role in ("guards", "primary"):
        tests = settings.values["gate"].get(role)
        for place, test in enumerate(tests if isinstance(tests, list) else ()):
            suite = test.get("suite") if isinstance(test, dict) else None
            if isinstance(suite, str) and isinstance(suites, dict) and suite not in suites:
                path = ("gate", role, place, "suite")
                have = f"; evals has {', '.join(suites)}" if suites else "; evals is empty"
                text = f"no suite {suite} in evals{did_you_mean(suite, suites) or have}"
                draft.problems.add(settings.origin(path), settings.name(path), text)


def _check_baseline(draft: PipelineDraft, settings: Settings, place: int) -> None:
    path = ("gate", "baseline")
    baseline = settings.values["gate"].get("baseline")
    if not isinstance(baseline, str) or not baseline.startswith("stage:"):
        return
    before = [stage.place for stage in draft.stages if stage.place < place and _is_policy(stage)]
    expected = [f"stage:{name}" for name in ("base", *before)]
    if baseline not in expected:
        text = f"got {baseline}, expected {', '.join(expected)} (a stage before this gate's), alias:NAME or a path"
        draft.problems.add(settings.origin(path), settings.name(path), text)


def _check_retry(draft: PipelineDraft, settings: Settings, place: int) -> None:
    on_fail = settings.values["gate"].get("on_fail")
    retry = on_fail.get("retry") if isinstance(on_fail, dict) else None
    if isinstance(retry, bool) or not (isinstance(retry, int) or retry in list(STAGE_KINDS)):
        return
    before = [stage for stage in draft.stages if stage.place <= place]
    found = [stage for stage in before if retry in (stage.kind, stage.place)]
    if len(found) == 1:
        _check_changes(draft, found[0], settings)
        return
    path = ("gate", "on_fail", "retry")
    why = f"{len(found)} stages are {retry}; name its place" if found else f"no stage {retry} before this gate"
    draft.problems.add(settings.origin(path), settings.name(path), f"{why}; there are {', '.join(map(str, before))}")


def _check_changes(draft: PipelineDraft, target: StageDraft, settings: Settings) -> None:
    """Check the changes of a retry as keys of the stage that they change."""
    on_fail: dict[str, Any] = settings.values["gate"]["on_fail"]
    if not isinstance(on_fail.get("with"), dict):
        return
    changes = settings.below(("gate", "on_fail", "with"))
    draft.notes += translate(changes, target.model, draft.problems)
    for key in (*PIPELINE_DECIDES, "gate"):
        if key in changes.values:
            draft.problems.add(changes.origin((key,)), changes.name((key,)), "a retry cannot change it")
            del changes.values[key]
    names = list(changes.values)
    if target.keys is not None:
        changes.take(target.settings, [key for key in target.settings.values if key not in names], shared=True)
        build(target.model, changes, target.kind, draft.folder, draft.problems, draft.notes)
    on_fail["with"] = {name: changes.values[name] for name in names}


def _check_needs_gate(draft: PipelineDraft) -> None:
    values, problems = draft.top.values, draft.problems
    gated = [stage for stage in draft.stages if "gate" in stage.settings.values]
    if values.get("stop_when") == "gate_passes" and not gated and "gate" not in values:
        text = "gate_passes needs a gate; add one, or remove stop_when"
        problems.add(draft.top.origin(("stop_when",)), "stop_when", text)
    at_the_end = "gate" in values or gated[-1:] == draft.stages[-1:] or values.get("stop_when") == "gate_passes"
    if "register" in values and draft.stages and not at_the_end:
        text = "nothing takes an alias without a passing verdict; add a gate at the top or in the last stage"
        problems.add(draft.top.origin(("register",)), "register", text)
