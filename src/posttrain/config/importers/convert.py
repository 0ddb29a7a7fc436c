"""From another tool's file to a YAML that our loader takes: the whole way, or a refusal that names every key."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from posttrain.config.importers.fates import Kind, raise_if_refused
from posttrain.config.importers.launchers import LAUNCHERS, convert_launcher, launcher_of, launcher_yaml
from posttrain.config.importers.read import YAML_SUFFIXES, read_foreign
from posttrain.config.importers.write import notes, to_yaml
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.load import load_stage
from posttrain.config.yaml_lines import read_yaml
from posttrain.errors import ConfigError
from posttrain.files import write_atomic


@dataclass(frozen=True, slots=True)
class Imported:
    """The YAML's text, the stage it is for, and what its reader should look at."""

    text: str
    kind: Kind
    keys: dict[str, Any]
    notes: tuple[str, ...]
    whole: bool = True
    """Whether it is a stage by itself, or a part to be put into one."""


def import_file(path: Path, out: Path | None, tool: str | None = None, stage: str | None = None) -> Imported:
    """Convert the file and write it to `out`, if there is one. Raises: ConfigError naming each key that is refused."""
    if stage is not None and stage not in STAGE_KINDS:
        raise ConfigError(f"--stage {stage}: expected one of {', '.join(STAGE_KINDS)}")
    if tool in LAUNCHERS or (
        tool is None and path.suffix.lower() in YAML_SUFFIXES and launcher_of(read_yaml(path).data)
    ):
        return _import_launcher(path, out, tool)
    draft = read_foreign(path, tool).convert(cast("Kind | None", stage))
    raise_if_refused(draft, path)
    folder = (out or path).resolve().parent
    if not folder.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {folder}; make it, or write elsewhere")
    try:
        load_stage(draft.kind, None, given=draft.keys, project=folder)
    except ConfigError as error:
        theirs = "\n".join(line.removeprefix("argument: ") for line in str(error).splitlines())
        raise ConfigError(f"{path}: what it says is not a {draft.kind} configuration here:\n{theirs}") from None
    text = to_yaml(draft, path, folder)
    if out is not None:
        write_atomic(out, text)
    return Imported(text, draft.kind, dict(draft.keys), tuple(notes(draft)))


def _import_launcher(path: Path, out: Path | None, tool: str | None) -> Imported:
    """A part of a stage's YAML, and the line that starts it. Raises: ConfigError naming each key that is refused."""
    values = read_yaml(path).data
    launcher = LAUNCHERS[tool] if tool else launcher_of(values)
    assert launcher is not None, "the caller looked"
    draft = convert_launcher(launcher, values)
    raise_if_refused(draft, path)
    text = launcher_yaml(draft, path)
    if out is not None:
        write_atomic(out, text)
    return Imported(text, draft.kind, dict(draft.keys), tuple(notes(draft)), whole=False)
