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
from posttrain.config.pipeline import GateKeys, OnFailKeys, PipelineKeys, Stage, SuiteKeys
from posttrain.config.resolved import apply_changes, resolved_yaml
from posttrain.config.stages import GRPOKeys, ModelKeys, TrainKeys
from posttrain.errors import ChangedInputsError, PosttrainError
from posttrain.evals.suite import Suite
from posttrain.files import write_atomic, write_json
from posttrain.gate.spec import GateSpec
from posttrain.pipeline import judge, lineage
from posttrain.pipeline.checks import check_all, check_data
from posttrain.pipeline.pins import changes, pins_of, stage_input, training_keys
from posttrain.pipeline.state import (
    DONE,
    ERROR,
    FAILED,
    INCONCLUSIVE,
    PASSED,
    RUNNING,
    STOPPED,
    RunState,
    StageEntry,
)  # fmt: skip
from posttrain.protocols import MetricSink, Topology
from posttrain.recipes import policy, preference, sft
from posttrain.recipes.certify import certify, require
from posttrain.recipes.evaluate import evaluate, summary
from posttrain.recipes.stage import Stage as StageRun
from posttrain.recipes.stage import StageResult, StopFlag, StoppedPolitely
from posttrain.registry.manifest import environment_pins
from posttrain.tracking.mlflow_mirror import MlflowSink
from posttrain.tracking.prometheus import PrometheusSink
from posttrain.types import EvalReport, Verdict

log = logging.getLogger(__name__)

OnChange = Literal["refuse", "rerun", "new-run"]
RECIPES: dict[str, Callable[[Any, StageRun], StageResult]] = {"sft": sft.run, "dpo": preference.run, "grpo": policy.run}
"""Stage kind → the recipe that runs it."""


@dataclass(frozen=True)
class Watch:
    """How a run is shown: sinks beside `metrics.jsonl`, and progress of evals."""

    sinks: Callable[[str, int], Sequence[MetricSink]] = lambda kind, total: ()
    evals: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = log.info


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `verdict` is that of the last gate, None without one."""

    status: str
    reason: str
    folder: Path
    model_dir: Path | None
    verdict: Verdict | None


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
        self.suites: dict[str, tuple[Suite, SuiteKeys]] = {}
        self.state = RunState(keys.name, {})
        self.stop = StopFlag()
        self.announced: set[tuple[str, str]] = set()

    def run(self, on_change: OnChange) -> Outcome:
        self.suites = check_all(self.keys)
        self.state = self._opened(on_change)
        with self.stop.listening():
            try:
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
        elif moved := changes(state.pins, pins):
            listed = "\n".join(f"  - {line}" for line in moved)
            if on_change == "refuse":
                raise ChangedInputsError(
                    f"{self.folder} was started with other inputs:\n{listed}\n"
                    "--on-change rerun runs again what depends on them; --on-change new-run leaves this run as it is"
                )
            self.watch.say(f"inputs changed, running again what depends on them:\n{listed}")
            state = replace(state, pins=pins, retries={}, changes={}, registered=None)
        state = replace(state, status=RUNNING, reason="")
        if self.topology.is_main:
            write_atomic(self.folder / "config.yaml", resolved_yaml(self.keys))
            write_json(self.folder / "environment.json", environment_pins())
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
            gate = self._gate_after(index)
            if gate is None:
                index += 1
                continue
            verdict = self._judge(index, gate, entry)
            if verdict is Verdict.PASS and self.keys.stop_when == "gate_passes":
                break
            back = self._loop_back(index, gate, verdict)
            if back is not None:
                index = back
                continue
            last = index == num_stages
            tolerated = verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "continue"
            if verdict is not Verdict.PASS and not (not last and (tolerated or self._only_probing(index))):
                status = INCONCLUSIVE if verdict is Verdict.INCONCLUSIVE else FAILED
                return self._finish(status, f"the gate after {stage.kind} says {verdict.value}", index, verdict)
            index += 1
        return self._promoted(min(index, num_stages), verdict)

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
        check_data(keys, {name: suite for name, (suite, _) in self.suites.items()}, self.watch.say)
        if isinstance(keys, GRPOKeys):
            self._certify(keys)
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
        run = StageRun(kind, folder, keys, self.topology, watchers=partial(self._sinks, keys), stop=self.stop)
        try:
            return RECIPES[kind](keys, run)
        finally:
            run.close()

    def _sinks(self, keys: TrainKeys, kind: str, total_steps: int) -> list[MetricSink]:
        """The live view, and the mirrors that are asked for."""
        sinks = list(self.watch.sinks(kind, total_steps))
        if keys.mlflow is not None:
            run_key = f"{self.folder.resolve()}/{kind}"
            sinks.append(MlflowSink(keys.mlflow, self.keys.name, run_key, params=training_keys(keys)))
        if keys.prometheus_port is not None:
            sinks.append(PrometheusSink(keys.prometheus_port, stage=kind))
        return sinks

    def _certify(self, keys: GRPOKeys) -> None:
        """No RL on rewards that did not pass their check. Raises: RewardError."""
        if keys.reward_check == "off":
            self.watch.say("grpo: reward_check is off: the model of this run can be trained but not promoted")
            return
        if self.topology.is_main:
            certificate = certify(keys, self.folder / "certificate.json")
            self.watch.say(f"rewards: {certificate.verdict}")
            require(certificate)
        self.topology.barrier()

    # --- evals and gates -------------------------------------------------------------------------------------------

    def _measure(self, name: str, model: str, gate: GateKeys | None = None) -> dict[str, EvalReport]:
        """Score a model on the suites and the split of `gate`; without one on all suites, for the last gate."""
        self._stop_if_asked(f"the evals of {name}")
        names = list(self.suites) if gate is None else list(GateSpec.from_keys(gate).suites)
        split = self._split if gate is None else gate.split
        if not names:
            return {}
        if self.topology.is_main:
            suites = [self.suites[suite] for suite in names]
            folder = self.folder / "evals" / name
            reports = evaluate(self._model_keys(model), suites, split, folder, self._shown)
            if (name, split) not in self.announced:
                self.watch.say(f"evals of {name}: {summary(reports)}")
            self.announced.add((name, split))
        self.topology.barrier()
        return judge.stored_reports(self.folder / "evals" / name, names, split)

    def _judge(self, index: int, gate: GateKeys, entry: StageEntry) -> Verdict:
        """The verdict on this stage's model; one already given on the same two models is taken over."""
        after: int | str = (
            "final" if index == len(self.keys.stages) and self.keys.stages[index - 1].keys.gate is None else index
        )
        settled = judge.settled(gate, self.keys, self.state, self.folder, after, entry.output_digest)
        if settled is not None:
            self._save(self.state.with_gate(settled))
            self.watch.say(f"gate: {settled.verdict}, judged before and promoted")
            return Verdict(settled.verdict)
        candidate_name = entry.folder.removeprefix("stages/")
        candidate = self._measure(candidate_name, str(self.folder / entry.folder / "model"), gate)
        baseline_name, baseline_model = judge.baseline_of(gate, self.keys, self.state, self.folder)
        baseline = self._measure(baseline_name, baseline_model, gate)
        verdict = Verdict.INVALID  # what rank 0 says counts
        if self.topology.is_main:
            places = {
                "candidate": self.folder / "evals" / candidate_name,
                "baseline": self.folder / "evals" / baseline_name,
            }
            state, verdict, table = judge.decide_once(
                gate, self.keys, self.state, self.folder, after, entry.attempt, candidate, baseline, places
            )
            self._save(state)
            self.watch.say(table)
        self.state = self.topology.broadcast(self.state)
        return self.topology.broadcast(verdict)

    def _gate_after(self, index: int) -> GateKeys | None:
        own = self.keys.stages[index - 1].keys.gate
        if own is not None:
            return own
        last = index == len(self.keys.stages)
        return self.keys.gate if last or self.keys.stop_when == "gate_passes" else None

    def _only_probing(self, index: int) -> bool:
        """Under `gate_passes` a failed verdict before the last stage only means that the next stage is needed."""
        return self.keys.stop_when == "gate_passes" and self.keys.stages[index - 1].keys.gate is None

    def _loop_back(self, index: int, gate: GateKeys, verdict: Verdict) -> int | None:
        """The stage to go back to, with its changed keys noted, or None."""
        rule = gate.on_fail
        if (
            verdict is not Verdict.FAIL
            or not isinstance(rule, OnFailKeys)
            or (self._only_probing(index) and index < len(self.keys.stages))
        ):
            return None
        used = self.state.retries.get(str(index), 0)
        if used >= rule.times:
            return None
        place = rule.retry if isinstance(rule.retry, int) else [s.kind for s in self.keys.stages].index(rule.retry) + 1
        self.watch.say(
            f"gate failed: back to stage {place} ({self.keys.stages[place - 1].kind}), attempt {used + 2}, with {rule.with_ or 'another seed'}"
        )
        changed = dict(rule.with_)
        if used or not changed:
            # With the same keys and the same seed a retry would only give the same model again.
            changed.setdefault("seed", self.keys.stages[place - 1].keys.seed + used + 1)
        state = replace(
            self.state,
            retries={**self.state.retries, str(index): used + 1},
            changes={**self.state.changes, str(place): changed},
        )
        self._save(state)
        return place

    # --- end -------------------------------------------------------------------------------------------------------

    def _promoted(self, index: int, verdict: Verdict | None) -> Outcome:
        """Register and promote what passed; a held run is registered but not promoted."""
        if self.keys.register_ is not None and verdict is Verdict.PASS and self.topology.is_main:
            if not judge.is_promoted(self.state, self._digest_before(index + 1)):
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

    @property
    def _split(self) -> str:
        return self.keys.gate.split if self.keys.gate is not None else "gate"

    def _model_before(self, index: int) -> str:
        entry = self.state.stage(index - 1)
        return self.keys.base_model if entry is None else str(self.folder / entry.folder / "model")

    def _digest_before(self, index: int) -> str:
        entry = self.state.stage(index - 1)
        return self.state.pins["base_model"] if entry is None else entry.output_digest

    def _model_keys(self, model: str) -> ModelKeys:
        first = self.keys.stages[0].keys
        return ModelKeys(
            base_model=model,
            trust_remote_code=first.trust_remote_code,
            chat_template=first.chat_template,
            bf16=first.bf16,
            device=first.device,
        )

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
