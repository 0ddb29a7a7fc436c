"""The pipeline: a state machine over stages, evals, gates and the registry. Started again, it goes on where it was.

Order of things: check everything that can be checked; measure the base; then for each stage train, measure, judge, and
go on, loop back or stop; at the end register and promote.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.checkpoint.lock import run_lock
from posttrain.checkpoint.store import sweep
from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.config.resolved import resolved_yaml
from posttrain.errors import PosttrainError
from posttrain.evidence import Verdict
from posttrain.files import write_atomic, write_json
from posttrain.pipeline import OnChange, lineage, selection
from posttrain.pipeline.checks import check_all
from posttrain.pipeline.data_checks import DataChecks, Suites, check_rewards_ahead
from posttrain.pipeline.escalation import PENDING_FILE, after_people, rejection_of
from posttrain.pipeline.generation import check_can_be_promoted, check_looks_left, from_version, hold_parent
from posttrain.pipeline.hub_push import check_can_be_pushed
from posttrain.pipeline.judge import Judge, is_promoted, made_by
from posttrain.pipeline.measure import Evals, MeasuredModel
from posttrain.pipeline.notify import RunNotices
from posttrain.pipeline.opening import fresh, state_to_go_on_from
from posttrain.pipeline.pins import pinned_environment, pins_of
from posttrain.pipeline.processes import (
    check_cards,
    check_engines,
    check_folder_is_shared,
    check_started_alike,
    counted_for,
    kept_rows,
)
from posttrain.pipeline.prune import refuse_pruned
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
from posttrain.pipeline.stored_data import check_can_be_stored
from posttrain.pipeline.train import Place, Stages, Watch
from posttrain.protocols import Ranks
from posttrain.recipes.run.stop import StopFlag, StoppedPolitely

__all__ = ["Outcome", "Watch", "run_pipeline"]

EXIT_PENDING = 4
"""Exit code of a run whose verdict waits for a person."""
EXIT_NOT_PROMOTED = 5
"""Exit code of a run that passed its gate and was registered, and was refused the alias."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to. `verdict` is that of the last gate and of whoever decided on it, None without a gate."""

    status: str
    reason: str
    folder: Path
    model_dir: Path | None
    verdict: Verdict | None
    promoted: bool | None = None
    """Whether the model took its alias; None where none was asked for."""

    @property
    def exit_code(self) -> int:
        if self.status == PENDING:
            return EXIT_PENDING
        if self.promoted is False:
            return EXIT_NOT_PROMOTED
        return 0 if self.verdict is None else self.verdict.exit_code


def run_pipeline(
    keys: PipelineKeys, ranks: Ranks, *, on_change: OnChange = "refuse", watch: Watch | None = None,
    project: Path | None = None,
) -> Outcome:  # fmt: skip
    """Run, or go on with, the pipeline in `keys.output_dir`; paths below `project` are stored relative to it.

    Raises: PosttrainError; StoppedPolitely after a signal.
    """
    watch = watch or Watch()
    earlier = RunState.load(Path(keys.output_dir)) if on_change != "new-run" else None
    keys, parent = from_version(keys, earlier)
    keys = counted_for(keys, ranks.world_size if earlier is None else earlier.num_processes or ranks.world_size)
    check_engines(keys, ranks.world_size)
    check_cards(keys, ranks)
    suites, data = check_all(keys), DataChecks(watch.say)
    check_can_be_stored(keys)
    check_can_be_pushed(keys)
    check_can_be_promoted(keys, earlier)
    check_looks_left(keys, earlier, suites)
    # Before the folder is made and anything is pinned: a start that is refused leaves nothing behind.
    data.check_stages(keys, suites)
    check_started_alike(ranks, keys, on_change)
    ranks.main_only(lambda: check_rewards_ahead(keys, earlier, watch.say))
    folder = Path(keys.output_dir)
    if on_change == "new-run":
        folder = fresh(folder, pins_of(keys))
        keys = keys.model_copy(update={"output_dir": str(folder)})
    place = Place(keys, folder, project, parent)
    with ExitStack() as held:
        ranks.main_only(lambda: _lock(folder, held))
        ranks.main_only(lambda: hold_parent(keys, parent, held))
        check_folder_is_shared(ranks, folder)
        return _PipelineRun(place, ranks, watch, suites, data, on_change).run()


def _lock(folder: Path, held: ExitStack) -> None:
    held.enter_context(run_lock(folder))


class _PipelineRun:
    def __init__(
        self, place: Place, ranks: Ranks, watch: Watch, suites: Suites, data: DataChecks, on_change: OnChange
    ) -> None:
        self.place, self.keys, self.folder = place, place.keys, place.folder
        self.notices = RunNotices(self.keys.notify if ranks.is_main else {}, self.folder, place.project, watch.say)
        self.ranks, self.watch, self.suites = ranks, replace(watch, tell=self._tell), suites
        self.on_change: OnChange = on_change
        self.state = RunState(self.keys.name, {})
        self.stop = StopFlag()
        shown = watch.evals or (lambda suite, done, total: None)
        self.evals = Evals(
            self.keys, self.folder, ranks, watch.say, shown, self._stop_if_asked, self.stop.ending, suites
        )
        self.judge = Judge(self.keys, self.folder, self.evals, ranks, watch.say)
        self.stages = Stages(
            place, ranks, self.watch, data, self.stop, self._save, self._stop_if_asked, rerun=on_change == "rerun"
        )

    def run(self) -> Outcome:
        self.state = self._opened()
        with self.stop.listening(), self.notices.open():
            try:
                self._measure(MeasuredModel("base", self.keys.base_model, self.state.pins["base_model"]))
                outcome = self._walk()
            except StoppedPolitely as stopped:
                self._save(status=STOPPED, reason=str(stopped))
                raise
            except PosttrainError as error:
                with suppress(OSError):  # a full disk is said by the error itself
                    self._save(status=ERROR, reason=str(error))
                self._tell("finished", str(error), str(error))
                raise
        return outcome

    def _opened(self) -> RunState:
        """The state to go on from, and the folder in order. Raises: ChangedInputsError, DamagedFileError."""
        self.ranks.main_only(lambda: refuse_pruned(self.folder))
        pins, main = pins_of(self.keys), self.ranks.is_main
        state = self.ranks.main_only(
            lambda: state_to_go_on_from(
                self.folder, self.keys, pins, self.on_change, self.watch.say, self.place.project
            )
        )
        world_size = self.ranks.world_size
        if line := kept_rows(self.keys, state.num_processes, world_size):
            self.watch.say(line)
        state = replace(
            state, status=RUNNING, reason="", parent=self.place.parent, id=state.id or uuid.uuid4().hex,
            num_processes=state.num_processes or world_size,
        )  # fmt: skip
        if main:
            for place in (self.folder, *self.folder.glob("*/"), *self.folder.glob("*/*/")):
                sweep(place)
            write_atomic(self.folder / "config.yaml", resolved_yaml(self.keys, self.place.project, self.folder))
            write_json(self.folder / "environment.json", pinned_environment())
            state.save(self.folder)
        return state

    # --- stages ----------------------------------------------------------------------------------------------------

    def _walk(self) -> Outcome:
        """Walk the stages; a loop-back sets the place back."""
        index, num_stages = 1, len(self.keys.stages)
        verdict: Verdict | None = None
        while index <= num_stages:
            stage = self.keys.stages[index - 1]
            self.state, entry = self.stages.made(self.state, index, self.suites)
            if entry.held:
                self._tell("held", entry.output_digest, f"{entry.folder}: health: {', '.join(entry.held)}")
            if not stage.keys.is_reward_model:
                self._measure(made_by(entry, self.folder))
            gate = selection.gate_after(self.keys, index)
            if gate is None:
                index += 1
                continue
            if rejected := self.ranks.main_only(partial(self._rejected, entry)):
                return self._finish(FAILED, rejected, index, Verdict.FAIL)
            onward, verdict = self._chosen(index, gate, entry)
            if onward is not None:
                index = onward
                continue
            assert verdict is not None, "what goes nowhere else was judged"
            said = f"the gate after {stage.kind} says {verdict.value}"
            decided = self.ranks.main_only(
                partial(after_people, self.folder, gate, self.state.gates[-1], said, self.watch.say)
            )
            verdict = decided.verdict
            if decided.waits:
                return self._finish(PENDING, decided.reason, index, verdict)
            if verdict is Verdict.PASS and self.keys.stop_when == "gate_passes":
                break
            tolerated = verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "continue" and index < num_stages
            if verdict is not Verdict.PASS and not tolerated:
                status = INCONCLUSIVE if verdict is Verdict.INCONCLUSIVE else FAILED
                return self._finish(status, decided.reason, index, verdict)
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

    def _rejected(self, entry: StageEntry) -> str:
        """By whom and why this very model was rejected, whatever it was compared with; nothing if it was not."""
        found = rejection_of(self.folder, entry.output_digest)
        if found is not None:
            (self.folder / PENDING_FILE).unlink(missing_ok=True)
        return "" if found is None else f"rejected by {found.by}: {found.reason}"

    def _measure(self, model: MeasuredModel) -> None:
        """Score a model on all suites, on the splits that no verdict is kept for where something is chosen."""
        self._stop_if_asked(f"the evals of {model.name}")
        for split, suites in selection.splits_between(self.keys, self.evals.suites).items():
            self.evals.measure(model, suites, split)

    # --- end -------------------------------------------------------------------------------------------------------

    def _promoted(self, index: int, verdict: Verdict | None) -> Outcome:
        """Register and promote what passed; what is held, or refused the alias, is registered alone."""
        if self.keys.register_ is None or verdict is not Verdict.PASS:
            return self._finish(PASSED if verdict is Verdict.PASS else DONE, "", index, verdict)
        self._stop_if_asked("the registration")
        self.state = self.ranks.main_only(lambda: self._registered(index))
        assert self.state.registered is not None, "rank 0 registered it"
        promoted = self.state.registered["alias"] is not None
        reason = "" if promoted else self.state.registered["message"]
        if not promoted:
            self._tell("held", f"registered {self.state.registered['digest']}", reason)
        return replace(self._finish(PASSED, reason, index, verdict), promoted=promoted)

    def _registered(self, index: int) -> RunState:
        known = is_promoted(self.state, self.place.digest_before(self.state, index + 1))
        if not known or not lineage.is_there(self.keys, self.state):
            self._save(registered=lineage.register_model(self.place, self.state, index))
        assert self.state.registered is not None
        self.watch.say(self.state.registered["message"])
        if self.state.registered["alias"] is not None:
            self._pushed(self.state.registered)
        return self.state

    def _pushed(self, registered: Mapping[str, Any]) -> None:
        """Push to the hub what took its alias, once. A hub that refuses costs the copy, not the run."""
        try:
            if address := lineage.push_registered(self.keys, registered):
                self.watch.say(f"pushed to {address}")
        except PosttrainError as error:
            assert self.keys.register_ is not None
            version, repo = f"{registered['name']}@{registered['version']}", self.keys.register_.hub_model_id
            self.watch.say(f"not pushed: {error}; posttrain registry push {version} --push-to-hub {repo}")
            self._tell("mirror_failed", f"{version} {repo}", f"{version} was not pushed to {repo}: {error}")

    def _finish(self, status: str, reason: str, index: int, verdict: Verdict | None) -> Outcome:
        self._save(replace(self.state, status=status, reason=reason))
        entry = self.state.stage(index)
        model = "" if entry is None else entry.output_digest
        if status == PENDING:
            self._tell("pending", f"{self.state.gates[-1].folder} {reason}", reason)
        else:
            self._tell("finished", f"{status} {model} {reason}", reason)
        return Outcome(status, reason, self.folder, self.folder / entry.folder / "model" if entry else None, verdict)

    def _tell(self, event: str, subject: str, reason: str) -> None:
        self.notices.tell(self.state, event, subject, reason)

    # --- small things ----------------------------------------------------------------------------------------------

    def _stop_if_asked(self, before: str) -> None:
        """Between two pieces of work. All ranks call it. Raises: StoppedPolitely."""
        if self.ranks.sum([float(self.stop.is_set)])[0] > 0:
            raise StoppedPolitely(f"stopped before {before}; start again to go on")

    def _save(self, state: RunState | None = None, **changes: Any) -> None:
        self.state = replace(state or self.state, **changes)
        if self.ranks.is_main:
            self.state.save(self.folder)
