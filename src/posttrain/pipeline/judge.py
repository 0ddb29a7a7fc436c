"""Gates of a pipeline: which baseline is meant, what is chosen on the dev split, and one verdict per pair of models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path

from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.errors import ConfigError, GateError
from posttrain.evidence import GateVerdict, RegistryEntry, Verdict
from posttrain.gate.aa import aa_check
from posttrain.gate.decide import decide
from posttrain.gate.folder import load_evidence, load_spec, load_verdict, save_verdict
from posttrain.gate.render import verdict_table
from posttrain.gate.selection import promising
from posttrain.gate.spec import SELECTION_SPLIT, GateSpec
from posttrain.models.provenance import model_digest
from posttrain.names import PREVIOUS
from posttrain.pipeline import selection
from posttrain.pipeline.escalation import decisions_on
from posttrain.pipeline.measure import Evals, MeasuredModel, Reports
from posttrain.pipeline.state import GateEntry, RunState, Selection, StageEntry
from posttrain.protocols import Ranks
from posttrain.registry.looks import JudgedSuite
from posttrain.registry.promotion import CHAMPION
from posttrain.registry.registry import Registry


@dataclass(frozen=True)
class Judge:
    """Chooses and judges the models of one run. All ranks call it; rank 0 decides, and what it says counts."""

    keys: PipelineKeys
    folder: Path
    evals: Evals
    ranks: Ranks
    say: Callable[[str], None]

    def after(self, index: int) -> int | str:
        """What a verdict is filed under: the stage's place, or `final`."""
        stages = self.keys.stages
        return "final" if index == len(stages) and stages[index - 1].keys.gate is None else index

    def promising(self, state: RunState, index: int, gate: GateKeys, entry: StageEntry) -> tuple[RunState, bool]:
        """Whether this stage's model is worth a verdict, by the dev split alone."""
        if self._settled(state, index, gate, entry) is not None:
            return state, True
        spec = self._spec(gate)
        ours = self.evals.measure(self._candidate(entry), spec.suites, SELECTION_SPLIT)
        theirs = self.evals.measure(self._baseline(gate, state), spec.suites, SELECTION_SPLIT)
        good, reason = promising(spec, ours, theirs, SELECTION_SPLIT)
        self.say(f"on {SELECTION_SPLIT}: {reason}: {'on to the verdict' if good else 'not good enough'}")
        return state.with_selection(
            Selection(self.after(index), entry.attempt, entry.output_digest, good, reason)
        ), good

    def verdict(self, state: RunState, index: int, gate: GateKeys, entry: StageEntry) -> tuple[RunState, Verdict]:
        """The verdict on this stage's model; one already given on the same two models is taken over."""
        settled = self._settled(state, index, gate, entry)
        if settled is not None:
            self.say(f"gate: {settled.verdict}, judged before and promoted")
            return state.with_gate(settled), Verdict(settled.verdict)
        spec, baseline = self._spec(gate), self._baseline_for(state, index, gate, entry)
        self._check_itself(gate, spec, baseline)
        state, verdict = self._round(state, index, entry, spec, baseline)
        if verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "extend":
            self.say("inconclusive: judged once more, with the reserve")
            state, verdict = self._round(state, index, entry, spec.extended, baseline)
        return state, verdict

    def _round(
        self, state: RunState, index: int, entry: StageEntry, spec: GateSpec, baseline: MeasuredModel
    ) -> tuple[RunState, Verdict]:
        candidate = self._candidate(entry)
        ours = self.evals.measure(candidate, spec.suites, spec.split)
        theirs = self.evals.measure(baseline, spec.suites, spec.split)
        places = self.folder / "evals" / candidate.name, self.folder / "evals" / baseline.name
        asked = Question(spec, self.after(index), entry.attempt, ours, theirs, places)
        state, verdict, table = self.ranks.main_only(lambda: decide_once(asked, self.keys, state, self.folder))
        self.say(table)
        return state, verdict

    def _check_itself(self, gate: GateKeys, spec: GateSpec, baseline: MeasuredModel) -> None:
        """The A/A check of the baseline. Raises: GateError if it differs from itself."""
        first = self.evals.measure(baseline, spec.suites, spec.split) if gate.aa else {}
        for number in range(1, gate.aa + 1):
            second = self.evals.again(baseline, spec.suites, spec.split, number)
            results = [aa_check(first[n], second[n], comparisons=gate.aa * len(spec.suites)) for n in spec.suites]
            for result in results:
                self.say(result.words)
            if failed := [result.words for result in results if not result.passed]:
                raise GateError("no verdict can be trusted here: " + "; ".join(failed))

    def _spec(self, gate: GateKeys) -> GateSpec:
        return selection.spec_of(self.keys, gate, self.evals.suites)

    def _candidate(self, entry: StageEntry) -> MeasuredModel:
        return made_by(entry, self.folder)

    def _baseline(self, gate: GateKeys, state: RunState) -> MeasuredModel:
        return baseline_of(gate, self.keys, state, self.folder)

    def _baseline_for(self, state: RunState, index: int, gate: GateKeys, entry: StageEntry) -> MeasuredModel:
        """The baseline; where this run's model holds the alias by now, and its verdict was moved away, the one before."""
        kind, _, alias = gate.baseline.partition(":")
        known = state.gate(self.after(index), entry.output_digest)
        holder = _holder(alias, self.keys) if kind == "alias" and known is not None else None
        if holder is None or holder.digest != entry.output_digest:
            return self._baseline(gate, state)
        before = PREVIOUS if alias == CHAMPION else f"{alias}.{PREVIOUS}"
        return self._baseline(gate.model_copy(update={"baseline": f"alias:{before}"}), state)

    def _settled(self, state: RunState, index: int, gate: GateKeys, entry: StageEntry) -> GateEntry | None:
        """The verdict by which this model was promoted: it is not judged again, against itself."""
        model = entry.output_digest
        about = (e for e in _on_disk(self.after(index), state, self.folder) if e.candidate == model)
        known = next(about, None)
        if known is None or not stands(self.folder, known):
            return None
        spec = self._spec(gate)
        if load_verdict(self.folder / known.folder).spec_digest not in (spec.digest, spec.extended.digest):
            return None
        if is_promoted(state, model):
            return known
        kind, _, alias = gate.baseline.partition(":")
        holder = _holder(alias, self.keys) if kind == "alias" else None
        # Killed after the promotion and before the note of it: the champion is the candidate.
        return known if holder is not None and holder.digest == model else None


@dataclass(frozen=True)
class Question:
    """Two models on the items of one gate. `places`: their eval folders, candidate first."""

    spec: GateSpec
    after: int | str
    attempt: int
    candidate: Reports
    baseline: Reports
    places: tuple[Path, Path]

    @property
    def digests(self) -> tuple[str, str]:
        suite = self.spec.suites[0]
        return self.candidate[suite].model_digest, self.baseline[suite].model_digest

    def is_answered_by(self, verdict: GateVerdict) -> bool:
        """Whether a verdict answers the same question on the same items."""
        digests = {suite: (self.candidate[suite].digest, self.baseline[suite].digest) for suite in self.spec.suites}
        return verdict.spec_digest == self.spec.digest and dict(verdict.report_digests) == digests


def baseline_of(gate: GateKeys, keys: PipelineKeys, state: RunState, folder: Path) -> MeasuredModel:
    """The model that a gate's `baseline` names. Without a holder of the alias it is the base.

    Raises: ConfigError for a reference to something that is not there.
    """
    kind, _, name = gate.baseline.partition(":")
    base = MeasuredModel("base", keys.base_model, state.pins["base_model"])
    if kind == "alias":
        holder = _holder(name, keys)
        return (
            base
            if holder is None
            else MeasuredModel(f"{holder.name}-v{holder.version}", str(holder.path), holder.digest)
        )
    if gate.baseline == "stage:base":
        return base
    if kind == "stage":
        entry = state.stage(int(name)) if name.isdigit() else None
        if entry is None:
            raise ConfigError(
                f"gate.baseline: {gate.baseline}: no such stage has run; expected stage:base or stage:1 … stage:{len(keys.stages)}"
            )
        return made_by(entry, folder)
    digest = model_digest(Path(gate.baseline))
    return MeasuredModel(f"model-{digest[7:19]}", gate.baseline, digest)


def made_by(entry: StageEntry, folder: Path) -> MeasuredModel:
    """The model of a finished stage."""
    return MeasuredModel(
        entry.folder.removeprefix("stages/"), str(folder / entry.folder / "model"), entry.output_digest
    )


def _holder(alias: str, keys: PipelineKeys) -> RegistryEntry | None:
    assert keys.register_ is not None, "checked before the run"
    if not Path(keys.register_.registry).exists():
        return None
    registry = Registry(Path(keys.register_.registry))
    try:
        return registry.holder(keys.register_.name, alias)
    finally:
        registry.close()


def is_promoted(state: RunState, model: str) -> bool:
    """Whether this run has given its alias to the model with this digest."""
    record = state.registered
    return record is not None and record["digest"] == model and record["alias"] is not None


def stands(folder: Path, gate: GateEntry) -> bool:
    """Whether a model may go on: its verdict is PASS, or a person accepted it."""
    if gate.verdict == Verdict.PASS.value:
        return True
    return any(decision.accepted for decision in decisions_on(folder, gate))


def decide_once(asked: Question, keys: PipelineKeys, state: RunState, folder: Path) -> tuple[RunState, Verdict, str]:
    """Judge, or return the verdict given before on the same two models: no second look at the same items."""
    for known in _given(asked, state, folder):
        verdict = load_verdict(folder / known.folder)
        if asked.is_answered_by(verdict):
            return state.with_gate(known), verdict.verdict, verdict_table(verdict)
    spec, look = asked.spec, _look(asked, keys, state, folder)
    verdict = decide(spec, asked.candidate, asked.baseline, look=look)
    name = next(name for name in _names(asked.after) if not (folder / name).exists())
    ours, theirs = ({suite: place / f"{suite}-{spec.split}" for suite in spec.suites} for place in asked.places)
    save_verdict(folder / name, verdict, spec, ours, theirs, look=look)
    record = GateEntry(asked.after, name, verdict.verdict.value, *asked.digests, attempt=asked.attempt)
    said = [verdict_table(verdict), *_looks_in_words(spec, look), *_renewals(asked, keys)]
    return state.with_gate(record), verdict.verdict, "\n".join(said)


def _names(after: int | str) -> Iterator[str]:
    """Folders of the verdicts after one stage: `gates/final`, `gates/final-2`, …"""
    return (f"gates/{after}" + ("" if number == 1 else f"-{number}") for number in count(1))


def _on_disk(after: int | str, state: RunState, folder: Path) -> Iterator[GateEntry]:
    """The verdicts after a stage, newest first; then those that the state does not know, written just before a kill."""
    noted = [entry for entry in reversed(state.gates) if (folder / entry.folder).exists()]
    yield from (entry for entry in noted if entry.after == after)
    present = takewhile(lambda name: (folder / name).exists(), _names(after))
    for name in sorted(set(present) - {entry.folder for entry in noted}, reverse=True):
        verdict = load_verdict(folder / name)
        yield GateEntry(
            after, name, verdict.verdict.value, verdict.candidate_digest, verdict.baseline_digest, attempt=1
        )


def _given(asked: Question, state: RunState, folder: Path) -> Iterator[GateEntry]:
    """Verdicts on these two models, newest first."""
    known = _on_disk(asked.after, state, folder)
    return (
        replace(e, attempt=asked.attempt) if e not in state.gates else e
        for e in known
        if (e.candidate, e.baseline) == asked.digests
    )


def _look(asked: Question, keys: PipelineKeys, state: RunState, folder: Path) -> int:
    """Which look at these items this is: by the registry's ledger, which outlives runs, else by this run's verdicts.

    The second round of a look is not another look: alpha was divided between the two.
    """
    pairs: set[tuple[str, str]] = set()
    for entry in state.gates:
        if not (folder / entry.folder).exists():
            continue  # moved away because it was damaged
        verdict = load_verdict(folder / entry.folder)
        look = load_evidence(folder / entry.folder)["look"]
        pair = (entry.candidate, entry.baseline)
        first_round = load_spec(folder / entry.folder).extended.digest == asked.spec.digest
        if first_round and (entry.after, *pair) == (asked.after, *asked.digests):
            return look
        if verdict.spec_digest == asked.spec.digest and pair != asked.digests:
            pairs.add(pair)
    if keys.register_ is None:
        return 1 + len(pairs)
    registry = Registry(Path(keys.register_.registry))
    try:
        return registry.record_look([JudgedSuite.of(report) for report in asked.candidate.values()], *asked.digests)
    finally:
        registry.close()


def _looks_in_words(spec: GateSpec, look: int) -> list[str]:
    if look == 1:
        return []
    if spec.looks or spec.spend:
        return [f"look {look} at these items, alpha {spec.alpha_at(look):.3g} is its share"]
    return [f"look {look} at these items, at full alpha like each before: set gate.looks to spend alpha over them"]


def _renewals(asked: Question, keys: PipelineKeys) -> list[str]:
    if keys.register_ is None:
        return []
    registry = Registry(Path(keys.register_.registry))
    try:
        return registry.renewals(map(JudgedSuite.of, asked.candidate.values()))
    finally:
        registry.close()


def last_verdict(state: RunState, folder: Path) -> GateVerdict | None:
    return load_verdict(folder / state.gates[-1].folder) if state.gates else None
