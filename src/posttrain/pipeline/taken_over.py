"""Whether what a finished stage made is still there as it was made: a look at every byte, before it is used again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from posttrain.errors import ChangedInputsError
from posttrain.files import digest_file, digest_json, file_digests, read_record, write_json
from posttrain.models.continued import ADAPTER
from posttrain.models.total import ADAPTER_TOTAL
from posttrain.pipeline.state import StageEntry
from posttrain.recipes.run.stage import CRITIC

_MADE = ("model", ADAPTER, CRITIC, ADAPTER_TOTAL, "result.json", "certificate.json")
"""What later stages, evals, the gate and the registry read of a stage."""
_INPUTS = "inputs.json"
_MOST = 5


def files_made(stage: Path) -> dict[str, str]:
    """Digests of what a stage made, by path relative to its folder."""
    found: dict[str, str] = {}
    for name in _MADE:
        place = stage / name
        if place.is_file():
            found[name] = digest_file(place)
        found |= {f"{name}/{file}": digest for file, digest in (file_digests(place) if place.is_dir() else {}).items()}
    return found


def model_of(files: Mapping[str, str]) -> str:
    """Digest of the model folder among the files of a stage."""
    return digest_json(_inside("model", files))


def adapter_total_of(files: Mapping[str, str]) -> str:
    """Digest of the adapter for the given base among the files of a stage; empty where there is none."""
    found = _inside(ADAPTER_TOTAL, files)
    return digest_json(found) if found else ""


def _inside(folder: str, files: Mapping[str, str]) -> dict[str, str]:
    return {name.removeprefix(f"{folder}/"): d for name, d in files.items() if name.startswith(f"{folder}/")}


def damage(stage: Path, entry: StageEntry) -> list[str]:
    """What of a finished stage is not as it was made, a line each."""
    made, found = entry.files, files_made(stage)
    lines = [_line(stage / name, made.get(name), found.get(name)) for name in sorted(made.keys() | found.keys())]
    lines = [line for line in lines if line]
    if not lines and model_of(found) != entry.output_digest:
        lines = [f"{stage / 'model'} is {model_of(found)}, recorded is {entry.output_digest}"]
    more = [f"and {len(lines) - _MOST} more files"] if len(lines) > _MOST else []
    return [*lines[:_MOST], *more]


def _line(path: Path, made: str | None, found: str | None) -> str:
    if made == found:
        return ""
    if made is None:
        return f"{path} was added afterwards"
    return f"{path} is gone" if found is None else f"{path} has been changed: got {found}, made as {made}"


def damaged_error(kind: str, lines: list[str]) -> ChangedInputsError:
    listed = "\n".join(f"  - {line}" for line in lines)
    return ChangedInputsError(
        f"the finished {kind} stage is not as it was made, so it is not used again:\n{listed}\n"
        "put the files back from a copy, or start with --on-change rerun, which runs this stage again"
    )


# --- which inputs a folder was begun with --------------------------------------------------------------------------


def begin(stage: Path, inputs: Mapping[str, str]) -> None:
    """Note in the folder of a stage what it is made from, before anything is made."""
    write_json(stage / _INPUTS, dict(inputs))


def belongs_to(stage: Path, inputs: Mapping[str, str]) -> bool:
    """Whether nothing was made in this folder yet, or all of it from exactly these inputs: `pipeline.json` may be lost."""
    path = stage / _INPUTS
    if not path.exists():
        return not any((stage / name).exists() for name in (*_MADE, "checkpoints") if name != "certificate.json")
    return read_record(path, dict, f"move {stage} away, and the stage is run again") == dict(inputs)
