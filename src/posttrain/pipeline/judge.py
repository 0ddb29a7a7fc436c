"""Gates of a pipeline: which baseline is meant, and one verdict per pair of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.errors import ConfigError
from posttrain.gate.decide import decide
from posttrain.gate.folder import load_verdict, save_verdict
from posttrain.gate.render import render
from posttrain.gate.spec import GateSpec
from posttrain.models.export import model_digest
from posttrain.pipeline.state import GateEntry, RunState, StageEntry
from posttrain.registry.registry import Registry
from posttrain.types import EvalReport, GateVerdict, Verdict

Reports = Mapping[str, EvalReport]


def baseline_of(gate: GateKeys, keys: PipelineKeys, state: RunState, folder: Path) -> tuple[str, str]:
    """Name for its eval folder, and the model. Without a holder of the alias it is the base.

    Raises: ConfigError for a reference to something that is not there.
    """
    kind, _, name = gate.baseline.partition(":")
    if kind == "alias":
        return _holder(name, keys) or ("base", keys.base_model)
    if gate.baseline == "stage:base":
        return "base", keys.base_model
    if kind == "stage":
        entry = state.stage(int(name)) if name.isdigit() else None
        if entry is None:
            raise ConfigError(
                f"gate.baseline: {gate.baseline}: no such stage has run; expected stage:base or stage:1 … stage:{len(keys.stages)}"
            )
        return entry.folder.removeprefix("stages/"), str(folder / entry.folder / "model")
    return f"model-{model_digest(Path(gate.baseline))[7:19]}", gate.baseline


def _holder(alias: str, keys: PipelineKeys) -> tuple[str, str] | None:
    if keys.register_ is None:
        raise ConfigError(
            f"gate.baseline: alias:{alias} needs `register:` to say in which registry and under which name to look"
        )
    if not Path(keys.register_.registry).exists():
        return None
    registry = Registry(Path(keys.register_.registry))
    try:
        entry = registry.holder(keys.register_.name, alias)
    finally:
        registry.close()
    return None if entry is None else (f"{entry.name}-v{entry.version}", str(entry.path))


def stored_reports(folder: Path, suites: Sequence[str], split: str) -> dict[str, EvalReport]:
    return {name: EvalReport.load(folder / f"{name}-{split}") for name in suites}


def decide_once(
    gate: GateKeys, keys: PipelineKeys, state: RunState, folder: Path, after: int | str, entry: StageEntry,
    candidate: Reports, baseline: Reports, places: Mapping[str, Path],
) -> tuple[RunState, Verdict, str]:  # fmt: skip
    """Judge, or return the verdict given before on the same two models: no second look at the same items."""
    spec = GateSpec.from_keys(gate)
    used = {suite: candidate[suite] for suite in spec.suites}
    against = {suite: baseline[suite] for suite in spec.suites}
    digests = next(iter(used.values())).model_digest, next(iter(against.values())).model_digest
    known = state.gate(after, *digests)
    if known is not None and (folder / known.folder / "verdict.json").exists():
        verdict = load_verdict(folder / known.folder)
        return state, verdict.verdict, render(verdict)
    look = _look(spec, keys, used, digests)
    verdict = decide(spec, used, against, look=look)
    name = f"gates/{after}" + ("" if entry.attempt == 1 else f"-{entry.attempt}")
    folders = {
        side: {suite: place / f"{suite}-{spec.split}" for suite in spec.suites} for side, place in places.items()
    }
    save_verdict(folder / name, verdict, spec, folders["candidate"], folders["baseline"], look=look)
    record = GateEntry(after, name, verdict.verdict.value, *digests, attempt=entry.attempt)
    return replace(state, gates=(*state.gates, record)), verdict.verdict, render(verdict)


def _look(spec: GateSpec, keys: PipelineKeys, reports: Reports, digests: tuple[str, str]) -> int:
    """Which look at these items this is, by the registry's ledger; without a budget of looks it is always the first."""
    if not spec.looks or keys.register_ is None:
        return 1
    registry = Registry(Path(keys.register_.registry))
    try:
        return registry.record_look([report.suite_digest for report in reports.values()], *digests)
    finally:
        registry.close()


def last_verdict(state: RunState, folder: Path) -> GateVerdict | None:
    return load_verdict(folder / state.gates[-1].folder) if state.gates else None
