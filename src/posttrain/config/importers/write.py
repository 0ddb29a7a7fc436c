"""A draft as YAML of ours, with a comment per key: where it came from, and what became of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.config.importers.fates import ImportDraft
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.paths import make_relative
from posttrain.config.schema import keys_of, show_value
from posttrain.config.yaml_lines import dump_yaml

_WIDTH = 118


def to_yaml(draft: ImportDraft, source: Path, folder: Path) -> str:
    """The YAML, to stand in `folder`: paths of files are written relative to it."""
    model = STAGE_KINDS[draft.kind].keys
    data: dict[str, Any] = {key: draft.keys[key] for key in keys_of(model) if key in draft.keys}
    make_relative(data, model, folder.resolve())
    lines = [f"# {draft.tool}'s {as_comment(source.name)}, as `posttrain {draft.kind}` reads it."]
    for key, value in data.items():
        text = dump_yaml({key: value}).rstrip("\n")
        comment = as_comment("; ".join(draft.notes[key]))
        if "\n" in text or len(text) + len(comment) + 4 > _WIDTH:
            lines += [f"# {comment}", text]
        else:
            lines.append(f"{text}  # {comment}")
    if draft.other:
        lines += ["", "# The other keys of the file:"]
        lines += [f"# {as_comment(f'{key}: {text}')}" for key, text in draft.other]
    return "\n".join(lines) + "\n"


def notes(draft: ImportDraft) -> list[str]:
    """What a reader should look at: what is changed, and the tool's defaults that are not ours."""
    changed = [f"{key}: {text}" for key, text in draft.other if text.startswith("changed")]
    assumed = [
        f"{key}: {show_value(draft.keys[key])} ({text})"
        for key, texts in draft.notes.items()
        for text in texts
        if "'s default;" in text
    ]
    return changed + assumed


def as_comment(text: str) -> str:
    """For a comment, which a line break of theirs would end: what follows it would be read as YAML."""
    return " ".join(text.splitlines())
