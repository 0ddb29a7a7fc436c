"""The pipeline: a state machine over stages, evals, gates and the registry. Started again, it goes on where it was.

Order of things: check everything that can be checked; measure the base; then for each stage train, measure, judge, and
go on, loop back or stop; at the end register and promote.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

from posttrain.checkpoint.lock import run_lock
from posttrain.checkpoint.store import sweep
from posttrain.config.pipeline import GateKeys, PipelineKeys, Stage
from posttrain.config.resolved import apply_changes, resolved_yaml
from posttrain.config.stages import GRPOKeys, TrainKeys
from posttrain.errors import ChangedInputsError, PosttrainError
from posttrain.evidence import Verdict
from posttrain.files import write_atomic, write_json
from posttrain.pipeline import lineage, selection
from posttrain.pipeline.checks import check_all
from posttrain.pipeline.data_checks import DataChecks
from posttrain.pipeline.escalation import PENDING_FILE, decision_on, wait_for_person
from posttrain.pipeline.judge import Judge, is_promoted
from posttrain.pipeline.measure import Evals
from posttrain.pipeline.pins import changes, environment, pins_of, stage_input, training_keys, what_moved
from posttrain.pipeline.state import (
    DONE,
    ERROR,
    FAILED,
    INCONCLUSIVE,
    PASSED,
    PENDING,
    RUNNING,
    STOPPED,
    RunState,
    StageEntry,
)  # fmt: skip
from posttrain.protocols import MetricSink, Topology
from posttrain.recipes.certify import certified_before, certify, require
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.run_folder import StageResult
from posttrain.recipes.stage import Stage as StageRun
from posttrain.recipes.stage import run_recipe
from posttrain.recipes.stop import StopFlag, StoppedPolitely
from posttrain.tracking.mlflow_mirror import MlflowSink
from posttrain.tracking.prometheus import PrometheusSink

log = logging.getLogger(__name__)

OnChange = Literal["refuse", "rerun", "new-run"]


@dataclass(frozen=True)
class Watch:
    """How a run is shown: sinks beside `metrics.jsonl`, and progress of evals."""

    sinks: Callable[[str, int], Sequence[MetricSink]] = lambda kind, total: ()
    evals: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = log.info


EXIT_PENDING = 4
"""Exit code of a run whose verdict waits for a person."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `verdict` is that of the last gate and of whoever decided on it, None without a gate."""

    status: str
    reason: str
    folder: Path
    model_dir: Path | None
    verdict: Verdict | None

    @property
    def exit_code(self) -> int:
        if self.status == PENDING:
            return EXIT_PENDING
        return 0 if self.verdict is None else self.verdict.exit_code


def run_pipeline(
    keys: PipelineKeys, topology: Topology, *, on_change: OnChange = "refuse", watch: Watch | None = None
) -> Outcome:
    """Run, or go on with, the pipeline in `keys.output_dir`. Raises: PosttrainError; StoppedPolitely after a signal."""
    folder = Path(keys.output_dir)
    if on_change == "new-run":
        folder = _fresh(folder, pins_of(keys))
        keys = keys.model_copy(update={"output_dir": str(folder)})
    if not topology.is_main:
        return _Run(keys, folder, topology, watch or Watch()).run(on_change)
    with run_lock(folder):
        return _Run(keys, folder, topology, watch or Watch()).run(on_change)


class _Run:
    def __init__(self, keys: PipelineKeys, folder: Path, topology: Topology, watch: Watch) -> None:
        self.keys, self.folder, self.topology, self.watch = keys, folder, topology, watch
        self.state = RunState(keys.name, {})
        self.stop = StopFlag()
        self.evals = Evals(keys, folder, topology, watch.say, self._shown, self._stop_if_asked)
        self.judge = Judge(keys, folder, self.evals, topology, watch.say)
        self.data = DataChecks(watch.say)

    def run(self, on_change: OnChange) -> Outcome:
        self.evals.suites = check_all(self.keys)
        self.state = self._opened(on_change)
        with self.stop.listening():
            try:
                self.data.check_stages(self.keys, self.evals.suites)
                self._measure("base", self.keys.base_model)
                outcome = self._stages()
            except StoppedPolitely as stopped:
                self._save(status=STOPPED, reason=str(stopped))
                raise
            except PosttrainError as error:
                with suppress(OSError):  # a full disk is said by the error itself
                    self._save(status=ERROR, reason=str(error))
                raise
        return outcome

    # --- start -----------------------------------------------------------------------------------------------------

    def _opened(self, on_change: OnChange) -> RunState:
        """The state to go on from. Raises: ChangedInputsError if inputs moved and nobody said what to do."""
        pins = pins_of(self.keys)
        state = self.topology.broadcast(RunState.load(self.folder) if self.topology.is_main else None)
        if state is None:
            state = RunState(self.keys.name, pins)
        elif changes(state.pins, pins):
            listed = "\n".join(f"  - {line}" for line in what_moved(self.folder, self.keys, state.pins, pins))
            if on_change == "refuse":
                raise ChangedInputsError(
                    f"{self.folder} was started with other inputs:\n{listed}\n"
                    "--on-change rerun runs again what depends on them; --on-change new-run leaves this run as it is"
                )
            self.watch.say(f"inputs changed, running again what depends on them:\n{listed}")
            state = replace(state, pins=pins, retries={}, changes={}, registered=None)
        state = replace(state, status=RUNNING, reason="")
        if self.topology.is_main:
            for place in (self.folder, *self.folder.glob("*/"), *self.folder.glob("*/*/")):
                sweep(place)
            write_atomic(self.folder / "config.yaml", resolved_yaml(self.keys))
            write_json(self.folder / "environment.json", environment())
            state.save(self.folder)
        return state

    # --- stages ----------------------------------------------------------------------------------------------------

    def _stages(self) -> Outcome:
        """Walk the stages; a loop-back sets the place back."""
        index, num_stages = 1, len(self.keys.stages)
        verdict: Verdict | None = None
        while index <= num_stages:
            stage = self.keys.stages[index - 1]
            entry = self._train(index, stage)
            model = self.folder / entry.folder / "model"
            self._measure(entry.folder.removeprefix("stages/"), str(model))
            gate = selection.gate_after(self.keys, index)
            if gate is None:
                index += 1
                continue
            onward, verdict = self._chosen(index, gate, entry)
            if onward is not None:
                index = onward
                continue
            assert verdict is not None, "what goes nowhere else was judged"
            verdict, reason = self._decided(gate, verdict, f"the gate after {stage.kind} says {verdict.value}")
            if verdict is Verdict.PASS and self.keys.stop_when == "gate_passes":
                break
            tolerated = verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "continue" and index < num_stages
            if verdict is not Verdict.PASS and not tolerated:
                pending = verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "escalate"
                status = PENDING if pending else INCONCLUSIVE if verdict is Verdict.INCONCLUSIVE else FAILED
                return self._finish(status, reason, index, verdict)
            index += 1
        return self._promoted(min(index, num_stages), verdict)

    def _chosen(self, index: int, gate: GateKeys, entry: StageEntry) -> tuple[int | None, Verdict | None]:
        """The stage to go to instead, or the verdict on this one's model. All ranks call it.

        Candidates are chosen on the dev split, and one verdict is made; without such a split each has a verdict, at its
        share of alpha.
        """
        apart = selection.chooses(self.keys, gate) and not selection.without_dev(gate, self.evals.suites)
        if apart:
            state, good = self.judge.promising(self.state, index, gate, entry)
            self._save(state)
            onward = None if good else self._onward(index, gate, failed=True)
            if onward is not None:
                return onward, None
        state, verdict = self.judge.verdict(self.state, index, gate, entry)
        self._save(state)
        if apart or verdict is Verdict.PASS:
            return None, verdict
        return self._onward(index, gate, failed=verdict is Verdict.FAIL), verdict

    def _onward(self, index: int, gate: GateKeys, *, failed: bool) -> int | None:
        """Where a model that is not good enough leads: to the next stage, back to an earlier one, or nowhere."""
        if selection.is_probing(self.keys, index):
            return index + 1
        back = selection.loop_back(self.keys, self.state, index, gate) if failed else None
        if back is None:
            return None
        state, place = back
        changed = state.changes[str(place)]
        stage = f"stage {place} ({self.keys.stages[place - 1].kind})"
        self.watch.say(f"not good enough: back to {stage}, attempt {state.retries[str(index)] + 1}, with {changed}")
        self._save(state)
        return place

    def _decided(self, gate: GateKeys, verdict: Verdict, reason: str) -> tuple[Verdict, str]:
        """The verdict with what a person decided on it; where one is asked and has not, that is left in a file."""
        if self.topology.is_main:
            (self.folder / PENDING_FILE).unlink(missing_ok=True)
            if verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "escalate":
                last = self.state.gates[-1]
                decision = decision_on(self.folder, last)
                if decision is None:
                    wait_for_person(self.folder, last)
                    reason = f"{reason}: waits for a person: posttrain gate decide {self.folder} --accept|--reject"
                else:
                    verdict = Verdict.PASS if decision.accepted else Verdict.FAIL
                    reason = f"{'accepted' if decision.accepted else 'rejected'} by {decision.by}: {decision.reason}"
                    self.watch.say(f"gate: INCONCLUSIVE, {reason}")
        return self.topology.broadcast((verdict, reason))

    def _measure(self, name: str, model: str) -> None:
        """Score a model on all suites, on the splits that no verdict is kept for where something is chosen."""
        self._stop_if_asked(f"the evals of {name}")
        for split, suites in selection.splits_between(self.keys, self.evals.suites).items():
            self.evals.measure(name, model, suites, split)

    def _train(self, index: int, stage: Stage) -> StageEntry:
        """Run a stage, or take over its finished result. All ranks call it."""
        parent = self._model_before(index)
        keys = apply_changes(stage.keys, self.state.changes.get(str(index), {}))
        keys = keys.model_copy(update={"base_model": parent, "seed": keys.seed})
        input_digest = stage_input(keys, self._digest_before(index))
        entry = self.state.attempt(index, input_digest)
        if entry is not None:
            if entry != self.state.stage(index):
                self._save(self.state.with_stage(entry))
            if entry.status == DONE:
                self.watch.say(f"{stage.kind}: done before with the same inputs, not run again")
                return entry
        else:
            attempt = 1 + self.state.attempts(index)
            folder = f"stages/{index:02d}-{stage.kind}" + ("" if attempt == 1 else f"-{attempt}")
            entry = StageEntry(
                index,
                stage.kind,
                attempt,
                folder,
                RUNNING,
                input_digest,
                _now(),
                changed=dict(self.state.changes.get(str(index), {})),
            )
            self._save(self.state.with_stage(entry))
        self._stop_if_asked(stage.kind)
        beside = self.folder / entry.folder if self.topology.is_main else None
        self.data.check_stage(keys, self.evals.suites, beside)
        if isinstance(keys, GRPOKeys):
            self._certify(keys, self.folder / entry.folder)
        self.watch.say(f"{stage.kind}: {Path(parent).name if index > 1 else parent} → {self.folder / entry.folder}")
        result = self._recipe(stage.kind, keys, self.folder / entry.folder)
        done = replace(
            entry, status=DONE, wall_s=result.wall_s, tokens=result.tokens, steps=result.steps,
            output_digest=result.model_digest, held=result.held,
        )  # fmt: skip
        self._save(self.state.with_stage(done))
        return done

    def _recipe(self, kind: str, keys: TrainKeys, folder: Path) -> StageResult:
        if (folder / "result.json").exists():
            # Killed between the end of the stage and the note of it.
            return StageResult.load(folder)
        if self.topology.is_main:
            write_atomic(folder / "config.yaml", resolved_yaml(keys))

        def begun() -> StageRun:
            return StageRun(kind, folder, keys, self.topology, watchers=partial(self._sinks, keys), stop=self.stop)

        return run_recipe(LOOPS[kind], keys, begun)

    def _sinks(self, keys: TrainKeys, kind: str, total_steps: int) -> list[MetricSink]:
        """The live view, and the mirrors that are asked for."""
        sinks = list(self.watch.sinks(kind, total_steps))
        if keys.mlflow is not None:
            run_key = f"{self.folder.resolve()}/{kind}"
            sinks.append(MlflowSink(keys.mlflow, self.keys.name, run_key, params=training_keys(keys)))
        if keys.prometheus_port is not None:
            sinks.append(PrometheusSink(keys.prometheus_port, stage=kind))
        return sinks

    def _certify(self, keys: GRPOKeys, folder: Path) -> None:
        """No RL on rewards that did not pass their check. Raises: RewardError."""
        if keys.reward_check == "off":
            self.watch.say("grpo: reward_check is off: the model of this run can be trained but not promoted")
            return
        if self.topology.is_main:
            path = folder / "certificate.json"
            earlier = certified_before(keys, path)
            certificate = earlier or certify(keys, path)
            self.watch.say(f"rewards: {certificate.verdict}" + (", checked before" if earlier else ""))
            require(certificate)
        self.topology.barrier()

    # --- end -------------------------------------------------------------------------------------------------------

    def _promoted(self, index: int, verdict: Verdict | None) -> Outcome:
        """Register and promote what passed; a held run is registered but not promoted."""
        if self.keys.register_ is not None and verdict is Verdict.PASS and self.topology.is_main:
            if not is_promoted(self.state, self._digest_before(index + 1)):
                self._save(registered=lineage.register(self.keys, self.state, self.folder, index))
            assert self.state.registered is not None
            self.watch.say(self.state.registered["message"])
        self.state = self.topology.broadcast(self.state)
        return self._finish(PASSED if verdict is Verdict.PASS else DONE, "", index, verdict)

    def _finish(self, status: str, reason: str, index: int, verdict: Verdict | None) -> Outcome:
        self._save(replace(self.state, status=status, reason=reason))
        entry = self.state.stage(index)
        return Outcome(status, reason, self.folder, self.folder / entry.folder / "model" if entry else None, verdict)

    # --- small things ----------------------------------------------------------------------------------------------

    def _stop_if_asked(self, before: str) -> None:
        """Between two pieces of work. All ranks call it. Raises: StoppedPolitely."""
        if self.topology.sum([float(self.stop.is_set)])[0] > 0:
            raise StoppedPolitely(f"stopped before {before}; start again to go on")

    def _shown(self, suite: str, done: int, total: int) -> None:
        """Progress of an eval. Alone, a process need not finish it: it is measured again whole."""
        if self.watch.evals is not None:
            self.watch.evals(suite, done, total)
        if self.topology.world_size == 1:
            self._stop_if_asked(f"the end of suite {suite}")

    def _model_before(self, index: int) -> str:
        entry = self.state.stage(index - 1)
        return self.keys.base_model if entry is None else str(self.folder / entry.folder / "model")

    def _digest_before(self, index: int) -> str:
        entry = self.state.stage(index - 1)
        return self.state.pins["base_model"] if entry is None else entry.output_digest

    def _save(self, state: RunState | None = None, **changes: Any) -> None:
        self.state = replace(state or self.state, **changes)
        if self.topology.is_main:
            self.state.save(self.folder)


def _fresh(folder: Path, pins: Mapping[str, str]) -> Path:
    """The first of `folder`, `folder-2`, `folder-3` … that holds no run, or the run with these inputs, to go on with."""
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        state = RunState.load(place)
        if state is None or not changes(state.pins, pins):
            return place
    raise AssertionError("count never ends")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
