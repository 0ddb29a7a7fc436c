"""A file of another tool taken in place: `posttrain sft axolotl.yaml` reads it as `posttrain import` would write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from posttrain.config.importers.fates import ImportDraft, Kind, Tool
from posttrain.config.importers.read import Foreign, tool_of
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.knob import Keys
from posttrain.config.schema import keys_of
from posttrain.config.settings import KeyOrigin, Problems, Settings
from posttrain.config.yaml_lines import KeyPath

_FOREIGN_KEYS = 3
"""So many keys that are not ours make a file another tool's; fewer are slips in a file of ours."""


def whose(values: Mapping[str, Any]) -> Tool | None:
    """The tool that a flat file is of: it has several keys that only that tool has, and none that only we have."""
    tool = tool_of(values)
    if tool is None:
        return None
    ours = {name for row in STAGE_KINDS.values() for name in (*keys_of(row.keys), *_names_read(row.keys))}
    strange = [key for key in values if not any(key in keys_of(row.keys) for row in STAGE_KINDS.values())]
    theirs_alone = [key for key in strange if tool.knows(key) and key not in ours]
    ours_alone = [key for key in values if key not in strange and not tool.knows(key)]
    return tool if len(strange) >= _FOREIGN_KEYS and theirs_alone and not ours_alone else None


def kind_of(values: Mapping[str, Any], tool: Tool) -> Kind:
    stage = tool.stage(values)
    return stage if isinstance(stage, str) else "sft"


def in_place(
    settings: Settings, nulls: Iterable[Any], kind: Kind, path: Path, problems: Problems
) -> tuple[Settings, list[str]]:
    """The settings of a file of another tool as ours, with a note per key; of any other file, as they are."""
    tool = whose(settings.values)
    if tool is None:
        return settings, []
    empty = tuple(".".join(str(step) for step in key) for key in nulls if tool.nested or len(key) == 1)
    draft = Foreign(tool, path, settings.values, {}, empty).convert()
    if draft.kind != kind and not draft.refusals:
        problems.add(settings.home, "", f"this {tool.name} file is for {draft.kind}; run posttrain {draft.kind} {path}")
    for refusal in draft.refusals:
        problems.add(settings.origin((refusal.key.partition(".")[0],)), refusal.key, f"{refusal.why}; {refusal.todo}")
    problems.raise_if_any()
    origins: dict[KeyPath, KeyOrigin] = {(ours,): _origin(settings, draft, ours) for ours in draft.keys}
    return Settings(dict(draft.keys), origins, settings.home), _notes(draft)


def _origin(settings: Settings, draft: ImportDraft, ours: str) -> KeyOrigin:
    return settings.origin((draft.came_from[ours].partition(".")[0],))


def _notes(draft: ImportDraft) -> list[str]:
    mapped = [f"{ours}: {'; '.join(texts)}" for ours, texts in draft.notes.items()]
    return mapped + [f"{key}: {text}" for key, text in draft.other]


def _names_read(model: type[Keys]) -> list[str]:
    return [other.name for info in keys_of(model).values() for other in info.also]
