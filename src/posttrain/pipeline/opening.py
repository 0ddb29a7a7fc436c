"""What a start finds in the run's folder, and whether it may go on from there. Nothing is written before all of it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path

from posttrain.config.pipeline import PipelineKeys
from posttrain.errors import ChangedInputsError
from posttrain.files import digest_json
from posttrain.pipeline import OnChange
from posttrain.pipeline.pins import changes, is_version, versions, what_moved
from posttrain.pipeline.prune import PRUNED_FILE
from posttrain.pipeline.state import DONE, Kept, RunState, StageEntry
from posttrain.registry.rows import now, user


def state_to_go_on_from(
    folder: Path, keys: PipelineKeys, pins: Mapping[str, str], on_change: OnChange, say: Callable[[str], None],
    project: Path | None = None,
) -> RunState:  # fmt: skip
    """The state of a new run, or of the run in `folder` with what `on_change` says about what moved since.

    Raises: ChangedInputsError if inputs moved and nobody said what to do; DamagedFileError.
    """
    state = RunState.load(folder)
    if state is None:
        return RunState(keys.name, pins)
    moved = {name for name in state.pins.keys() | pins.keys() if state.pins.get(name) != pins.get(name)}
    if not moved:
        return state
    used = {name for name in moved if _is_used(state, name)}
    listed = "\n".join(f"  - {line}" for line in what_moved(folder / "config.yaml", keys, state.pins, pins, project))
    if not used:
        say(f"inputs changed that nothing has used yet:\n{listed}")
        return replace(state, pins=pins)
    only_versions = all(is_version(name) for name in used)
    if on_change == "keep" and only_versions:
        say(f"kept as it was made, and recorded:\n{listed}")
        return _kept(state, pins)
    if on_change != "rerun":
        raise ChangedInputsError(f"{folder} was started with other {_refusal(only_versions, listed, on_change)}")
    say(f"inputs changed, running again what depends on them:\n{listed}")
    return replace(state, pins=pins, retries={}, changes={}, registered=None)


def _refusal(only_versions: bool, listed: str, on_change: OnChange) -> str:
    ways = "--on-change rerun runs again what depends on them; --on-change new-run leaves this run as it is"
    if only_versions:
        keep = "--on-change keep lets finished stages stay as they were made, which is recorded"
        return f"versions:\n{listed}\n{keep}; {ways}"
    why = "--on-change keep is for versions alone; " if on_change == "keep" else ""
    return f"inputs:\n{listed}\n{why}{ways}"


def _is_used(state: RunState, name: str) -> bool:
    """Whether something was made from what a pin names: a stage's own inputs are used once the stage has begun."""
    group, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return not (group == "stages" and number.isdecimal() and state.stage(int(number)) is None)


def _kept(state: RunState, pins: Mapping[str, str]) -> RunState:
    """What is finished stands for the same inputs under the versions of now, by the word of who started this."""
    lines = tuple(line for line in changes(state.pins, pins) if is_version(line.partition(":")[0]))
    word = (replace(entry, accepted=(*entry.accepted, _under_versions_of_now(entry))) for entry in state.stages)
    stages = tuple(new if new.status == DONE else old for new, old in zip(word, state.stages, strict=True))
    return replace(state, pins=pins, stages=stages, kept=(*state.kept, Kept(now(), user(), lines)))


def _under_versions_of_now(entry: StageEntry) -> str:
    own = {name: value for name, value in entry.inputs.items() if not is_version(name)}
    return digest_json(own | versions(entry.kind))


def fresh(folder: Path, pins: Mapping[str, str]) -> Path:
    """The first of `folder`, `folder-2`, `folder-3` … that holds no run, or the run with these inputs, to go on with."""
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        state = RunState.load(place)
        if state is None or not (changes(state.pins, pins) or (place / PRUNED_FILE).exists()):
            return place
    raise AssertionError("count never ends")
