"""Whether a run can go on here, or a YAML can start: its keys, its code, its packages, its place on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from posttrain.cli.findings import Diagnosis, plain_name
from posttrain.errors import ConfigError, PosttrainError
from posttrain.files import write_atomic


def check_target(target: Path, project: Path | None = None) -> Iterator[Diagnosis]:
    """A run's folder or a YAML, the paths of which start from `project` if it is given. Raises: ConfigError if it is neither."""
    if not target.exists():
        raise ConfigError(f"{target}: no such folder or file; expected the folder of a run, or a YAML")
    if target.is_dir():
        yield from check_run(target, project)
    else:
        yield _readable(target, project)


def durable(folder: Path) -> Diagnosis:
    """Whether what a run stands on holds in `folder`: a temporary file, fsync of file and folder, rename over a file."""
    place = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".posttrain-doctor-") as scratch:
            path = Path(scratch) / "first"
            write_atomic(path, "old")
            write_atomic(path, "new")
            os.replace(path, Path(scratch) / "second")
            good = (Path(scratch) / "second").read_text() == "new" and not path.exists()
    except OSError as error:
        text = f"{place}: {error.strerror or error}; move output_dir to a folder that can be written"
        return Diagnosis("crash-safe writes", "broken", text)
    text = f"fsync and rename work in {place}" if good else f"a rename in {place} is not what it says; move output_dir"
    return Diagnosis("crash-safe writes", "ok" if good else "broken", text)


def check_run(folder: Path, project: Path | None = None) -> Iterator[Diagnosis]:
    """Whether this version can read the run's configuration, and what moved since the run was made."""
    yield _readable(folder / "config.yaml", project)
    yield durable(folder)
    yield from _compared_versions(folder)
    yield from _intact(folder)
    yield from _adapters(folder)
    pins = folder / "environment.json"
    if pins.exists():
        yield from _compared_environment(pins)
    else:
        yield Diagnosis("run versions", "note", f"{pins} is not there: the run recorded no package versions")


def _intact(folder: Path) -> Iterator[Diagnosis]:
    """Every byte that a finished stage made, and every verdict: what a start would refuse to use again."""
    from posttrain.gate.folder import recompute
    from posttrain.pipeline.escalation import decisions
    from posttrain.pipeline.prune import PRUNED_FILE
    from posttrain.pipeline.state import DONE, RunState
    from posttrain.pipeline.taken_over import damage

    try:
        state = RunState.load(folder)
        made = [] if state is None else [entry for entry in state.stages if entry.status == DONE]
        if (folder / PRUNED_FILE).exists():
            yield Diagnosis("run files", "note", "pruned: the registry holds its model, and the weights here are gone")
            made = []
        for entry in made:
            if lines := damage(folder / entry.folder, entry):
                text = f"{'; '.join(lines)}; put the files back from a copy, or start with --on-change rerun"
                yield Diagnosis("run files", "broken", text)
        for path in sorted(folder.glob("gates/*/verdict.json")):
            recompute(path.parent)
        decisions(folder)
    except PosttrainError as error:
        yield Diagnosis("run files", "broken", "; ".join(str(error).splitlines()))
        return
    if made:
        yield Diagnosis("run files", "ok", f"what {len(made)} finished stage(s) made is as it was made")


def _adapters(folder: Path) -> Iterator[Diagnosis]:
    """What the newest LoRA stage left for the base that the run was given."""
    from posttrain.models.total import ADAPTER_TOTAL
    from posttrain.recipes.run.run_folder import StageResult

    for path in sorted(folder.glob("stages/*/result.json"), reverse=True):
        total = StageResult.load(path.parent).adapter_total
        if total is None:
            continue
        if total.refused:
            yield Diagnosis("run adapter", "note", f"{path.parent.name}: {total}")
        elif (place := path.parent / ADAPTER_TOTAL).is_dir():
            yield Diagnosis("run adapter", "ok", f"{place}: {total}")
        else:
            yield Diagnosis(
                "run adapter", "broken", f"{place} is gone; put it back from a copy, or start with --on-change rerun"
            )
        return


def _readable(path: Path, project: Path | None) -> Diagnosis:
    from posttrain.config.load import detect_kind, load_stage
    from posttrain.config.load_pipeline import load_pipeline

    if not path.exists():
        return Diagnosis(
            "run config", "broken", f"{path} is not there; expected the configuration the run was started with"
        )
    try:
        kind = detect_kind(path)
        loaded = load_pipeline(path, project=project) if kind == "pipeline" else load_stage(kind, path, project=project)
    except PosttrainError as error:
        return Diagnosis("run config", "broken", "; ".join(str(error).splitlines()))
    moved = [note for note in loaded.notes if "since schema" in note]
    if moved:
        return Diagnosis("run config", "note", f"{path}: a valid {kind}, read with changes: " + "; ".join(moved))
    return Diagnosis("run config", "ok", f"{path}: a valid {kind} for this version")


def _compared_versions(folder: Path) -> Iterator[Diagnosis]:
    """What computes, as the run pinned it and as it is now."""
    from posttrain.pipeline.pins import changes, is_version, versions
    from posttrain.pipeline.state import RunState

    try:
        state = RunState.load(folder)
    except PosttrainError as error:
        yield Diagnosis("run state", "broken", str(error))
        return
    if state is None:
        return
    before = {name: value for name, value in state.pins.items() if is_version(name)}
    kinds = {name.partition(".")[2] for name in before if name.startswith("numbers.")}
    moved = changes(before, {name: value for kind in kinds for name, value in versions(kind).items()})
    text = f"{'; '.join(moved)}: a start asks for --on-change" if moved else "what computes is what made the run"
    yield Diagnosis("run code", "note" if moved else "ok", text)


def _compared_environment(pins: Path) -> Iterator[Diagnosis]:
    from posttrain.files import read_record
    from posttrain.registry.manifest import environment_pins

    def recorded(record: dict[str, Any]) -> dict[str, Any]:
        compiler = {"compiler": record["compiler"]} if "compiler" in record else {}  # runs of 0.1 do not say
        return {name: record[name] for name in ("python", "machine", "cpu", "packages")} | compiler

    try:
        before, now = read_record(pins, recorded, "start the run again, which writes it anew"), environment_pins()
    except PosttrainError as error:
        yield Diagnosis("run versions", "broken", str(error))
        return
    named = [name for name in ("python", "machine", "compiler") if name in before]
    moved = [f"{name} {before[name]} → {now[name]}" for name in named if before[name] != now[name]]
    if before.get("cpu") != now["cpu"]:
        moved.append("another processor")
    moved += _moved(before.get("packages", {}), now["packages"])
    mend = "results may differ in the last bits; install the recorded versions for the same ones"
    text = f"{'; '.join(moved)}: {mend}" if moved else "as recorded"
    yield Diagnosis("run versions", "note" if moved else "ok", text)


def _moved(before: Mapping[str, str], now: Mapping[str, Any]) -> list[str]:
    """Packages of ours that changed, by name; the others as a count."""
    from packaging.requirements import Requirement

    ours = {plain_name(Requirement(text).name) for text in metadata.requires("posttrain") or ()}
    names = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    named = [f"{n} {before.get(n, 'absent')} → {now.get(n, 'absent')}" for n in names if plain_name(n) in ours]
    others = len(names) - len(named)
    return [*named, *([f"{others} other packages"] if others else [])]
