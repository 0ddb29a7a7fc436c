"""What may go from the folder of a run whose outcome is registered: weights and checkpoints; what the run recorded stays.

Nothing is deleted before the registry has read back every byte of the version, and nothing that another run, an alias that may
still be given, or the reproduction of a version needs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from posttrain.checkpoint.lock import run_lock
from posttrain.config.kinds import stage_kind
from posttrain.config.settings import PROJECT_KEY
from posttrain.errors import DamagedFileError, PosttrainError, RegistryError
from posttrain.files import named_if_damaged, nobody_reading, read_record, write_json
from posttrain.pipeline.state import PASSED, STATE_FILE, RunState
from posttrain.registry.manifest import MODEL
from posttrain.registry.registry import Registry
from posttrain.registry.rows import now, user
from posttrain.registry.upkeep import using

PRUNED_FILE = "pruned.json"
_OF_A_STAGE = ("checkpoints", "model", "adapter", "adapter_total")


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What was deleted of a run (would be, in a dry run), with the version that holds its model; or why it is `kept` as it is."""

    run: str
    version: str = ""
    folders: tuple[str, ...] = ()
    num_bytes: int = 0
    kept: str = ""


def prune_runs(root: Path, registry: Path | None = None, *, dry_run: bool = False) -> Iterator[PruneResult]:
    """Each run in `root`, or `root` itself where it is one. Killed half-way, what is left goes the next time.

    `registry` names another than the runs' own. Raises: RegistryError if there is no run.
    """
    runs = [root] if (root / STATE_FILE).exists() else sorted(path.parent for path in root.glob(f"*/{STATE_FILE}"))
    if not runs:
        raise RegistryError(f"{root}: got no run here, expected the folder of a run or a folder with runs in it")
    beside = sorted({path.parent for run in runs for path in run.resolve().parent.glob(f"*/{STATE_FILE}")})
    for run in runs:
        try:
            with ExitStack() as held:
                held.enter_context(run_lock(run))
                if dry_run:
                    held.close()  # the run may be started while its files are looked through
                yield _pruned(run, beside, registry, dry_run)
        except PosttrainError as error:
            yield PruneResult(str(run), kept="; ".join(str(error).splitlines()))


def refuse_pruned(run: Path) -> None:
    """Raises: DamagedFileError for a run of which weights were taken out: there is nothing to go on from."""
    path = run / PRUNED_FILE
    if path.exists():
        said = read_record(path, lambda record: (record["at"], record["by"], record["version"]), f"delete {path}")
        raise DamagedFileError(
            f"{run} was pruned at {said[0]} by {said[1]}: its model is {said[2]} of the registry; `--on-change new-run` trains anew in "
            "another folder"
        )


def _pruned(run: Path, beside: list[Path], registry: Path | None, dry_run: bool) -> PruneResult:
    state, config = RunState.load(run), _config(run)
    assert state is not None, "a run has a state"
    version = _version(state)
    book = Registry(_registry_of(run, config) if registry is None else _there(registry))
    with closing(book):
        name, _, number = version.rpartition("@")
        with using(book, name, int(number)), ExitStack() as unread:
            entry = book.show(name, int(number))
            if entry.digest != (state.registered or {})["digest"]:
                raise RegistryError(f"{version} of {book.folder} is another model than this run registered")
            book.verify(name, int(number))
            _refuse_needed(run, state, beside, book)
            folders = list(_spare(run, state))
            for folder in folders:
                unread.enter_context(nobody_reading(folder))
            if dry_run:
                unread.close()
            size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
            if not dry_run and (folders or not (run / PRUNED_FILE).exists()):
                write_json(run / PRUNED_FILE, {"version": version, "at": now(), "by": user()})
                _delete(run, folders)
    return PruneResult(str(run), version, tuple(str(folder.relative_to(run)) for folder in folders), size)


def _version(state: RunState) -> str:
    """The version that this run registered. Raises: RegistryError, with what is to be done first, where that is not all of its outcome."""
    if state.registered is None:
        raise RegistryError(f"its outcome is not registered (the run is {state.status})")
    version = f"{state.registered['name']}@{state.registered['version']}"
    if state.registered["alias"] is None:
        raise RegistryError(f"{version} was refused its alias, which starting this run again may still give it")
    if state.status != PASSED:
        raise RegistryError(f"the run is {state.status}: start it again to go on")
    return version


def _config(run: Path) -> Mapping[str, Any]:
    path = run / "config.yaml"
    with named_if_damaged(path, "put a copy of it back, or start the run again, which writes it anew"):
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


def _project(run: Path, config: Mapping[str, Any]) -> Path:
    return run / str(config.get(PROJECT_KEY) or ".")


def _registry_of(run: Path, config: Mapping[str, Any]) -> Path:
    return _there((_project(run, config) / config["register"]["registry"]).resolve())


def _there(registry: Path) -> Path:
    if not (registry / "registry.sqlite").exists():
        raise RegistryError(f"its registry is not at {registry}; name its folder with --registry")
    return registry


def _refuse_needed(run: Path, state: RunState, beside: list[Path], book: Registry) -> None:
    """Raises: RegistryError naming who takes a model from this folder."""
    for other in beside:
        if other.resolve() != run.resolve() and _names(_config(other), _project(other, _config(other)), run.resolve()):
            raise RegistryError(f"the run {other} takes something from it")
    made = {entry.output_digest for entry in state.stages}
    for entry in book.entries():
        base = book.chain(entry.name, entry.version)[0].inputs[MODEL]
        if base in made and not book.store.has(base):
            raise RegistryError(
                f"{entry.name}@{entry.version} was trained from a model in it, which the registry does not hold"
            )


def _names(value: Any, project: Path, run: Path) -> bool:
    """Whether a path in a configuration lies in the folder."""
    if isinstance(value, dict):
        return any(_names(inner, project, run) for inner in value.values())
    if isinstance(value, list):
        return any(_names(inner, project, run) for inner in value)
    if not isinstance(value, str) or "/" not in value:
        return False
    return (project / value).resolve().is_relative_to(run)


def _spare(run: Path, state: RunState) -> Iterator[Path]:
    """Folders of the stages that hold weights. A reward model and a critic are registered nowhere, so they stay."""
    for entry in state.stages:
        stays = {MODEL} if stage_kind(entry.kind).keys.is_reward_model else set[str]()
        for name in _OF_A_STAGE:
            folder = run / entry.folder / name
            yield from (path for path in (folder, _hidden(folder)) if name not in stays and path.is_dir())


def _delete(run: Path, folders: list[Path]) -> None:
    for folder in folders:
        gone = folder if folder.name.startswith(".") else _hidden(folder)  # half a folder must not look like a model
        if gone != folder:
            folder.replace(gone)
        shutil.rmtree(gone)


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.gone")
