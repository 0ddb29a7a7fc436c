"""verl's rows: the files, and what its trainers read of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, names
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.trl import SCRIPT
from posttrain.config.importers.values import ALPACA_COLUMNS

_END = "the answer ends with the template's end of turn; there with the tokenizer's EOS, which base models may have as another token"


def settle(draft: ImportDraft, ours: str, value: Any, key: str, note: str = "") -> None:
    """Our key from theirs, or from its default where the file is silent."""
    if key in draft.source:
        draft.put(ours, value, key, note)
    else:
        draft.assume(ours, value)


def examples_of(draft: ImportDraft) -> dict[str, Any]:
    """The form of SFT's rows: conversations, or a question and its answer, which may lie inside a column."""
    new, several = draft.source.get(SCRIPT) == "sft_trainer", "data.multiturn.enable"
    if new or draft.asks(several):
        if several in draft.source:
            draft.leave(several, "rows are conversations")
        found = {}
        for ours, keys in (("messages", ("data.multiturn.messages_key", "data.messages_key")), ("tools", ("data.multiturn.tools_key", "data.tools_key"))):  # fmt: skip
            theirs = next((draft.source[key] for key in keys if key in draft.source), ours)
            found |= {ours: str(theirs)} if theirs != ours else {}
        draft.put("train_on", "assistant", several if several in draft.source else SCRIPT)
        return {"type": "chat", **({"columns": found} if found else {})}
    if several in draft.source:
        draft.leave(several, "rows are questions with answers")
    draft.change("data.prompt_key", ALPACA_COLUMNS)
    draft.change("data.response_key", _END)
    columns = {
        "instruction": _path(draft, "data.prompt_key", "data.prompt_dict_keys", "question"),
        "output": _path(draft, "data.response_key", "data.response_dict_keys", "answer"),
    }
    return {"type": "alpaca", "columns": columns}


def _path(draft: ImportDraft, key: str, inner: str, default: str) -> str:
    given = draft.source.get(key, default)
    outer = given[0] if isinstance(given, list) else given
    return ".".join([str(outer), *names(draft.source.get(inner) or [])])


def read_files(draft: ImportDraft, entry: Mapping[str, Any]) -> None:
    """`data.train_files` and `data.val_files`, each a file or several, as sources of that form."""
    for key, ours in (("data.train_files", "datasets"), ("data.val_files", "eval_datasets")):
        given = draft.source.get(key)
        files = given if isinstance(given, list) else [given] if given else []
        if files:
            draft.put(ours, [{"path": local_file(draft, str(file)), **entry} for file in files], key)
        elif ours == "datasets":
            draft.refuse(key, "missing: a run needs rows", "name the data")
    for key in ("data.train_max_samples", "data.max_samples"):
        number = draft.number(key)
        if number is not None and number > 0:
            draft.refuse(key, f"{number:g}: rows are drawn at random", "write the rows that you want to a file")
        elif number is not None:
            draft.leave(key, "all rows are taken")
