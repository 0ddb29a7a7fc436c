"""Gates of a pipeline: which baseline is meant, and one verdict per pair of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.errors import ConfigError
from posttrain.gate.decide import decide
from posttrain.gate.folder import load_verdict, save_verdict
from posttrain.gate.render import render
from posttrain.gate.spec import GateSpec
from posttrain.models.export import model_digest
from posttrain.pipeline.state import GateEntry, RunState
from posttrain.registry.registry import Registry
from posttrain.types import EvalReport, GateVerdict, RegistryEntry, Verdict

Reports = Mapping[str, EvalReport]


def baseline_of(gate: GateKeys, keys: PipelineKeys, state: RunState, folder: Path) -> tuple[str, str]:
    """Name for its eval folder, and the model. Without a holder of the alias it is the base.

    Raises: ConfigError for a reference to something that is not there.
    """
    kind, _, name = gate.baseline.partition(":")
    if kind == "alias":
        holder = _holder(name, keys)
        return ("base", keys.base_model) if holder is None else (f"{holder.name}-v{holder.version}", str(holder.path))
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


def _holder(alias: str, keys: PipelineKeys) -> RegistryEntry | None:
    assert keys.register_ is not None, "checked before the run"
    if not Path(keys.register_.registry).exists():
        return None
    registry = Registry(Path(keys.register_.registry))
    try:
        return registry.holder(keys.register_.name, alias)
    finally:
        registry.close()


def settled(
    gate: GateKeys, keys: PipelineKeys, state: RunState, folder: Path, after: int | str, model: str
) -> GateEntry | None:
    """The verdict by which the model with digest `model` was promoted: it is not judged again, against itself."""
    known = state.gate(after, model)
    if known is None or known.verdict != Verdict.PASS.value:
        return None
    if load_verdict(folder / known.folder).spec_digest != GateSpec.from_keys(gate).digest:
        return None
    if is_promoted(state, model):
        return known
    kind, _, alias = gate.baseline.partition(":")
    holder = _holder(alias, keys) if kind == "alias" else None
    # Killed after the promotion and before the note of it: the champion is the candidate.
    return known if holder is not None and holder.digest == model else None


def is_promoted(state: RunState, model: str) -> bool:
    """Whether this run has given its alias to the model with this digest."""
    record = state.registered
    return record is not None and record["digest"] == model and record["alias"] is not None


def stored_reports(folder: Path, suites: Sequence[str], split: str) -> dict[str, EvalReport]:
    return {name: EvalReport.load(folder / f"{name}-{split}") for name in suites}


def decide_once(
    gate: GateKeys, keys: PipelineKeys, state: RunState, folder: Path, after: int | str, attempt: int,
    candidate: Reports, baseline: Reports, places: Mapping[str, Path],
) -> tuple[RunState, Verdict, str]:  # fmt: skip
    """Judge, or return the verdict given before on the same two models: no second look at the same items."""
    spec = GateSpec.from_keys(gate)
    used = {suite: candidate[suite] for suite in spec.suites}
    against = {suite: baseline[suite] for suite in spec.suites}
    digests = next(iter(used.values())).model_digest, next(iter(against.values())).model_digest
    known = state.gate(after, *digests)
    if known is not None:
        verdict = load_verdict(folder / known.folder)
        if _still_holds(verdict, spec, used, against):
            return state.with_gate(known), verdict.verdict, render(verdict)
    look = _look(spec, keys, used, digests)
    verdict = decide(spec, used, against, look=look)
    number = 1 + sum(entry.after == after for entry in state.gates)
    name = f"gates/{after}" + ("" if number == 1 else f"-{number}")
    folders = {
        side: {suite: place / f"{suite}-{spec.split}" for suite in spec.suites} for side, place in places.items()
    }
    save_verdict(folder / name, verdict, spec, folders["candidate"], folders["baseline"], look=look)
    record = GateEntry(after, name, verdict.verdict.value, *digests, attempt=attempt)
    return state.with_gate(record), verdict.verdict, render(verdict)


def _still_holds(verdict: GateVerdict, spec: GateSpec, candidate: Reports, baseline: Reports) -> bool:
    """Whether a verdict answers the same question on the same items."""
    digests = {suite: (candidate[suite].digest, baseline[suite].digest) for suite in spec.suites}
    return verdict.spec_digest == spec.digest and dict(verdict.report_digests) == digests


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
