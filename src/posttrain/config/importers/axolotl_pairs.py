"""Axolotl's prompt styles of preferences: answers that are text, behind a prompt that the style writes as text.

TRL tokenises such a row as it stands: the tokenizer's BOS goes first and its EOS last, as with rows of text here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.axolotl_styles import fields_of, in_columns, named_in
from posttrain.config.importers.fates import ImportDraft

_CHATML = (
    "<|im_start|>system\n{system}<|im_end|>\n",
    "<|im_start|>user\n{%s}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>",
)
_HEADERS = (
    "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n{%s}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)  # fmt: skip
_TEXTS = {"chatml": _CHATML, "llama3": _HEADERS}
"""First part of a style's name → a system message, a question, the end of an answer."""
_QUESTIONS: Mapping[str, Mapping[str, str]] = {
    "preference": {"icr": "input", "intel": "question", "prompt_pairs": "prompt"},
    "kto": {"argilla": "instruction", "intel": "question", "prompt_pairs": "prompt", "ultra": "prompt"},
}
"""Form of the rows here → second part of a style's name → the column of its question."""
PLAIN = "passthrough"
"""Rows that are taken as they are."""


def _form(draft: ImportDraft) -> str:
    return "kto" if draft.source.get("rl") == "kto" else "preference"


def styles(draft: ImportDraft) -> tuple[str, ...]:
    """Those that are read, for the method of the file."""
    if draft.kind != "dpo":
        return ()
    return (*(f"{first}.{second}" for first in _TEXTS for second in _QUESTIONS[_form(draft)]), PLAIN)


def read_style(draft: ImportDraft, style: str) -> dict[str, Any]:
    """Form and prompt of the rows of one of the `styles`."""
    form = _form(draft)
    if style == PLAIN:
        return {"type": form}
    first, _, second = style.partition(".")
    system, question, end = _TEXTS[first]
    asked = question % _QUESTIONS[form][second]
    return {"type": form, "prompt_format": [system + asked, asked], "completion_suffix": end}


def read_own_style(draft: ImportDraft, style: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A style that the file itself gives: fields, and formats of the prompt and of the answers."""
    form = _form(draft)
    answers = ("completion",) if form == "kto" else ("chosen", "rejected")
    rest = (*answers, *(("label",) if form == "kto" else ()))
    plain = {name: name for name in ("prompt", "system", *rest)}
    known = frozenset((*(f"field_{name}" for name in plain), *(f"{name}_format" for name in ("prompt", *answers))))
    fields = fields_of(draft, style, where, plain, known)
    suffixes = {_suffix(str(style.get(f"{name}_format") or f"{{{name}}}"), name) for name in answers}
    suffix = suffixes.pop()
    if suffixes or suffix is None:
        formats = " and ".join(f"{name}_format" for name in answers)
        draft.refuse(f"{where}.type", f"{formats}: answers end alike here, and nothing stands before them",
                     "write {" + "} and {".join(answers) + "} with the same end")  # fmt: skip
        return {}
    text, key = str(style.get("prompt_format") or "{prompt}"), f"{where}.type.prompt_format"
    asked = {"prompt": fields["prompt"]}
    formats = [in_columns(draft, key, text, {**asked, "system": fields["system"]})]
    if "system" in named_in(text):
        formats.append(in_columns(draft, key, text, asked, {"system": ""}))
    renamed = {name: fields[name] for name in rest if fields[name] != name}
    ours = {"type": form, "prompt_format": formats, "completion_suffix": suffix, "columns": renamed}
    return {key: value for key, value in ours.items() if value}


def _suffix(text: str, name: str) -> str | None:
    """What stands behind `{name}`; None where something stands before it, or in other braces."""
    before, found, behind = text.partition("{" + name + "}")
    return behind if found and not before and not {"{", "}"} & set(behind) else None
