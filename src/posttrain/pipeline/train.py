"""The stages of a run: each is run, or what an earlier start made of it is taken over."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

from posttrain.config.pipeline import ConfiguredStage, PipelineKeys
from posttrain.config.resolved import apply_changes, resolved_yaml
from posttrain.config.rl import RLKeys
from posttrain.config.stages import TrainKeys
from posttrain.distributed.keeper import say_synced
from posttrain.errors import ChangedInputsError
from posttrain.files import digest_json, write_atomic
from posttrain.models.continued import base_keys, is_continued
from posttrain.models.total import MergedBefore
from posttrain.pipeline.data_checks import DataChecks, Suites
from posttrain.pipeline.pins import pinned_environment, stage_inputs, training_keys, with_given, with_models_made
from posttrain.pipeline.state import DAMAGED, DONE, RUNNING, Parent, RunState, StageEntry
from posttrain.pipeline.taken_over import begin, belongs_to, damage, damaged_error, files_made, model_of
from posttrain.protocols import MetricSink, Ranks
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.measure.certify import certified_before, certify, require
from posttrain.recipes.measure.evaluate import Asking
from posttrain.recipes.run.run_folder import StageResult
from posttrain.recipes.run.stage import Stage, run_recipe
from posttrain.recipes.run.stop import StopFlag
from posttrain.registry.rows import now
from posttrain.tracking.mirror_sink import MirrorSink
from posttrain.tracking.prometheus import PrometheusSink
from posttrain.tracking.trackers import REPORT_NAME, TrackedRun, as_params

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """How a run is shown: sinks beside `metrics.jsonl`, and progress of evals."""

    sinks: Callable[[str, int], Sequence[MetricSink]] = lambda kind, total: ()
    evals: Callable[[str, int, int], None] | None = None
    say: Callable[[str], None] = log.info
    tell: Callable[[str, str, str], None] = lambda event, subject, reason: None
    """An event for whoever asked to be notified, what it is about, and why."""


@dataclass(frozen=True)
class Place:
    """Where a run is: its keys, its folder, and the project that its paths are stored relative to."""

    keys: PipelineKeys
    folder: Path
    project: Path | None = None
    parent: Parent | None = None

    def before(self, index: int) -> int:
        """The place of the stage whose model stage `index` starts from, 0 for the base: a reward model stands beside the line."""
        places = range(index - 1, 0, -1)
        return next((place for place in places if not self.keys.stages[place - 1].keys.is_reward_model), 0)

    def model_before(self, state: RunState, index: int) -> str:
        entry = state.stage(self.before(index))
        return self.keys.base_model if entry is None else str(self.folder / entry.folder / "model")

    def digest_before(self, state: RunState, index: int) -> str:
        entry = state.stage(self.before(index))
        return state.pins["base_model"] if entry is None else entry.output_digest


@dataclass
class Stages:
    """Runs the stages of one run. All ranks call it. `save` keeps a state, `before` may stop; with `rerun`, what is
    damaged is run again."""

    place: Place
    ranks: Ranks
    watch: Watch
    data: DataChecks
    stop: StopFlag
    save: Callable[[RunState], None]
    before: Callable[[str], None]
    rerun: bool
    _intact: set[str] = field(default_factory=set)

    def made(self, state: RunState, index: int, suites: Suites) -> tuple[RunState, StageEntry]:
        """The finished stage, and the state that says so. Raises: ChangedInputsError, PosttrainError."""
        stage = self.place.keys.stages[index - 1]
        keys = self._keys(state, index, stage)
        inputs = stage_inputs(stage.kind, keys, self.place.digest_before(state, index))
        entry = state.attempt(index, digest_json(inputs))
        if entry is not None and entry.status == DONE:
            if lines := self._damage(entry):
                if not self.rerun:
                    raise damaged_error(stage.kind, lines)
                self.watch.say(f"{stage.kind}: not as it was made, so it is run again: {'; '.join(lines)}")
                state, entry = state.with_stage(replace(entry, status=DAMAGED)), None
                self.save(state)
            else:
                self.watch.say(f"{stage.kind}: done before with the same inputs, not run again")
                if index == len(self.place.keys.stages):  # no checkpoint is left to go on from
                    say_synced(index)
                return self._newest(state, entry), entry
        self.before(stage.kind)
        entry = entry or self._new(state, index, stage.kind, inputs)
        folder = self.place.folder / entry.folder
        self.data.check_stage(keys, suites, folder if self.ranks.is_main else None)
        if isinstance(keys, RLKeys):
            self._certify(stage.kind, keys, folder)
        if self.ranks.is_main:
            begin(folder, inputs)
        state = self._newest(state, entry)
        base = self.place.keys.base_model
        self.watch.say(f"{stage.kind}: {base if index == 1 else Path(keys.base_model).name} → {folder}")
        done = self._finished(entry, self._recipe(state, stage.kind, keys, entry), folder)
        state = state.with_stage(done)
        self.save(state)
        return state, done

    def _keys(self, state: RunState, index: int, stage: ConfiguredStage) -> TrainKeys:
        keys = apply_changes(stage.keys, state.changes.get(str(index), {}))
        keys = keys.model_copy(update={"base_model": self.place.model_before(state, index), "seed": keys.seed})
        keys = with_given(self.place.keys, index, keys)
        before = [entry for place in range(1, index) if (entry := state.stage(place)) is not None]
        return with_models_made(keys, self.place.folder, before)

    def _merged_before(self, state: RunState, index: int) -> MergedBefore | None:
        """The stage whose merged model the adapter of stage `index` was begun on, where that is not the given base."""
        stages = self.place.keys.stages
        while (before := self.place.before(index)) and is_continued(self._keys(state, index, stages[index - 1])):
            index = before
        entry = state.stage(before)
        if entry is None:
            return None
        folder = self.place.folder / entry.folder
        total = StageResult.load(folder).adapter_total
        first = next(place for place, stage in enumerate(stages, start=1) if not stage.keys.is_reward_model)
        given = base_keys(self._keys(state, first, stages[first - 1]))
        return MergedBefore(folder, given, "" if total is None else total.refused)

    def _newest(self, state: RunState, entry: StageEntry) -> RunState:
        if entry == state.stage(entry.index):
            return state
        state = state.with_stage(entry)
        self.save(state)
        return state

    def _new(self, state: RunState, index: int, kind: str, inputs: dict[str, str]) -> StageEntry:
        """The next attempt at a stage, in a folder that holds nothing made from other inputs."""
        for attempt in count(1 + state.attempts(index)):
            folder = f"stages/{index:02d}-{kind}" + ("" if attempt == 1 else f"-{attempt}")
            if self.ranks.broadcast(belongs_to(self.place.folder / folder, inputs)):
                break
        return StageEntry(
            index, kind, attempt, folder, RUNNING, digest_json(inputs), now(), inputs=inputs,
            changed=dict(state.changes.get(str(index), {})), environment=digest_json(pinned_environment()),
        )  # fmt: skip

    def _damage(self, entry: StageEntry) -> list[str]:
        """What of a finished stage is not as it was made; each is looked at once per start, by rank 0."""
        if entry.folder in self._intact:
            return []
        lines = self.ranks.main_only(lambda: damage(self.place.folder / entry.folder, entry))
        if not lines:
            self._intact.add(entry.folder)
        return lines

    def _finished(self, entry: StageEntry, result: StageResult, folder: Path) -> StageEntry:
        """The entry of a stage that has ended. Raises: ChangedInputsError if the model it started from moved meanwhile."""
        if result.parent_digest != entry.inputs["model"]:
            raise ChangedInputsError(
                f"{entry.kind}: the model it starts from changed while it ran: {entry.inputs['model']} at the start, "
                f"{result.parent_digest} at the end; put it back, move {folder} away, and start again"
            )
        files = self.ranks.main_only(lambda: files_made(folder))
        if model_of(files) != result.model_digest:
            path = folder / "model"
            raise damaged_error(entry.kind, [f"{path} is {model_of(files)}, it was written as {result.model_digest}"])
        self._intact.add(entry.folder)
        return replace(
            entry, status=DONE, wall_s=result.wall_s, tokens=result.tokens, steps=result.steps,
            output_digest=result.model_digest, held=result.held, files=files,
        )  # fmt: skip

    def _recipe(self, state: RunState, kind: str, keys: TrainKeys, entry: StageEntry) -> StageResult:
        folder = self.place.folder / entry.folder
        if (folder / "result.json").exists():
            # Killed between the end of the stage and the note of it.
            return StageResult.load(folder)
        if self.ranks.is_main:
            write_atomic(folder / "config.yaml", resolved_yaml(keys, self.place.project, folder))

        def begun() -> Stage:
            watchers = partial(self._sinks, keys, folder, state.id)
            before = self._merged_before(state, entry.index)
            return Stage(kind, folder, keys, self.ranks, watchers, self.stop, before)

        return run_recipe(LOOPS[kind], keys, begun)

    def _sinks(self, keys: TrainKeys, folder: Path, run_id: str, kind: str, total_steps: int) -> list[MetricSink]:
        """The live view, and the mirrors that are asked for; they know a stage by its folder's name, `03-grpo-2`."""
        sinks = list(self.watch.sinks(kind, total_steps))
        stage = folder.name
        params = as_params(training_keys(keys))
        report = os.path.relpath(self.place.folder / REPORT_NAME, folder)
        tracked = TrackedRun(
            folder, self.place.keys.name, f"{run_id}/{stage}", stage, params, keys.mlflow, report, keys.log_completions
        )
        failed = partial(self._mirror_failed, stage)
        sinks += [MirrorSink(tracked, name, failed) for name in keys.trackers]
        if keys.prometheus_port is not None:
            sinks.append(PrometheusSink(keys.prometheus_port, stage=stage))
        return sinks

    def _mirror_failed(self, stage: str, tracker: str, why: str) -> None:
        self.watch.tell("mirror_failed", f"{stage}: {tracker}", f"{stage}: {tracker} has not got all of it ({why})")

    def _certify(self, kind: str, keys: RLKeys, folder: Path) -> None:
        """No RL on rewards that did not pass their check. Raises: RewardError."""
        if keys.reward_check == "off":
            self.watch.say(f"{kind}: reward_check is off: the model of this run can be trained but not promoted")
            return

        path = folder / "certificate.json"
        earlier = self.ranks.main_only(partial(certified_before, keys, path))
        asking = Asking(self.ranks, ending=partial(self.stop.ending, "the check of the rewards"))
        certificate = earlier or certify(keys, path, asking)
        self.watch.say(f"rewards: {certificate.verdict}" + (", checked before" if earlier else ""))
        require(certificate)
