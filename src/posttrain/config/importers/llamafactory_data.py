"""LLaMA-Factory's `dataset`: names, looked up in `dataset_info.json`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.importers.fates import ImportDraft, names
from posttrain.config.kinds import STAGE_KINDS

_INFO = "dataset_info.json"
_TAGS = {"role_tag": ("role", "from"), "content_tag": ("content", "value")}
_ROLE_TAGS = {
    "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt", "model"), "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call",), "system_tag": ("system",),
}  # fmt: skip
_ONLINE = "ONLINE"
"""The `dataset_dir` under which names are datasets of the hub, in alpaca columns."""
_MEDIA = ("images", "videos", "audios")
_ALPACA = {"instruction": "prompt", "input": "query", "system": "system", "tools": "tools"}
"""Our column → theirs, of what stands before an answer."""
_CHANGE = "change the data once, or its entry in dataset_info.json"


def read_datasets(draft: ImportDraft) -> None:
    """`dataset` and `eval_dataset` with what chooses and mixes them."""
    wanted = names(draft.source.get("dataset") or [])
    if not wanted:
        draft.refuse("dataset", "missing: a run needs rows", "name the data")
        return
    info = _info(draft)
    if info is None:
        return
    folder, entries = info
    mixed = _weights(draft, wanted)
    for key, ours, chosen in (
        ("dataset", "datasets", wanted),
        ("eval_dataset", "eval_datasets", names(draft.source.get("eval_dataset") or [])),
    ):
        read = [entry for name in chosen for entry in _entry(draft, key, name, folder, entries)]
        if read and len(mixed) == len(read) and key == "dataset":
            read = [{**entry, "weight": weight} for entry, weight in zip(read, mixed, strict=True)]
        if read:
            draft.put(ours, read, key, f"as {_INFO} describes them")
    if "eval_on_each_dataset" in draft.source:
        apart = draft.asks("eval_on_each_dataset") and "eval_datasets" in draft.keys
        draft.leave(
            "eval_on_each_dataset", "each has its eval_name" if apart else "there is one set of validation rows"
        )


def _weights(draft: ImportDraft, wanted: list[str]) -> list[float]:
    strategy, shares = draft.source.get("mix_strategy", "concat"), draft.source.get("interleave_probs")
    if strategy == "concat":
        for key in ("mix_strategy", "interleave_probs"):
            if key in draft.source:
                draft.leave(key, "the rows of all data are taken once")
        return []
    if shares is None:
        draft.refuse(
            "mix_strategy",
            f"{strategy} without interleave_probs stops with the shortest or longest data",
            "set concat, or interleave_probs",
        )
        return []
    draft.change("mix_strategy", "interleave_probs are the weights of a mixture, which takes as many rows as there are")
    draft.leave("interleave_probs", "they are the weights of datasets")
    return [float(share) for share in names(shares)][: len(wanted)]


def has_tools(draft: ImportDraft) -> bool:
    """Whether rows of a dataset that is named have a column of tools."""
    _, entries = _find_info(draft) or (None, {})
    chosen = [entries.get(name) for key in ("dataset", "eval_dataset") for name in names(draft.source.get(key) or [])]
    return any(isinstance(entry, Mapping) and (entry.get("columns") or {}).get("tools") for entry in chosen)


def _find_info(draft: ImportDraft) -> tuple[Path, Mapping[str, Any]] | None:
    asked = str(draft.source.get("dataset_dir") or "data")
    if asked == _ONLINE:
        chosen = [name for key in ("dataset", "eval_dataset") for name in names(draft.source.get(key) or [])]
        return Path(), {name: {"hf_hub_url": name} for name in chosen}
    for folder in (place / asked for home in draft.home for place in (home, *home.parents)):
        if os.path.isfile(folder / _INFO):
            return folder, json.loads((folder / _INFO).read_text(encoding="utf-8"))
    return None


def _info(draft: ImportDraft) -> tuple[Path, Mapping[str, Any]] | None:
    found = _find_info(draft)
    if found:
        if "dataset_dir" in draft.source:
            draft.leave("dataset_dir", "datasets name the files themselves")
        return found
    asked = str(draft.source.get("dataset_dir") or "data")
    draft.refuse(
        "dataset", f"{draft.source['dataset']}: names in {asked}/{_INFO}, which was not found beside this file or above it",
        "import where LLaMA-Factory is started, or set dataset_dir to the folder that has it",
    )  # fmt: skip
    return None


def _entry(draft: ImportDraft, key: str, name: str, folder: Path, entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    entry = entries.get(name)
    if not isinstance(entry, Mapping):
        draft.refuse(key, f"{name} is not in {folder / _INFO}", "name one that is, or add it")
        return []
    where = f"{key} {name}"
    columns = entry.get("columns") or {}
    if any(columns.get(media) for media in _MEDIA):
        draft.refuse(where, "it has images, video or audio, which are not trained here", "name text-only data")
        return []
    path = _path(draft, where, entry, folder)
    rows = _rows(draft, where, entry, columns)
    if path is None or rows is None:
        return []
    chosen = {"split": entry["split"]} if entry.get("split", "train") != "train" else {}
    chosen |= {"name": entry["subset"]} if entry.get("subset") else {}
    if draft.asks("default_system") and draft.source.get("stage") != "pt":
        chosen["default_system"] = str(draft.source["default_system"])
    limit = draft.source.get("max_samples")
    if limit:
        chosen["limit"] = int(limit)
    if key == "eval_dataset" and draft.asks("eval_on_each_dataset"):
        chosen["eval_name"] = re.sub(r"[^A-Za-z0-9_-]", "_", name)
        if chosen["eval_name"] != name:
            draft.change(where, f"it is the set {chosen['eval_name']} here, which is part of a metric's name")
    if entry.get("num_samples") is not None:
        draft.refuse(where, "num_samples draws rows at random", "set max_samples, which takes the first rows")
    return [{"path": path, **rows, **chosen}]


def _path(draft: ImportDraft, where: str, entry: Mapping[str, Any], folder: Path) -> str | None:
    if entry.get("folder"):
        draft.refuse(
            where, f"folder {entry['folder']}: one folder of a hub dataset is not taken apart", "name its files"
        )
        return None
    for elsewhere in ("hf_hub_url", "cloud_file_name"):
        if entry.get(elsewhere):
            return str(entry[elsewhere])
    file = entry.get("file_name")
    if file is None:
        draft.refuse(where, "it is neither a file nor a dataset of the hub", "give it file_name or hf_hub_url")
        return None
    if os.path.isdir(folder / file):
        draft.refuse(where, f"{file} is a folder", "name the files one by one")
        return None
    return str((folder / file).resolve())


def _rows(
    draft: ImportDraft, where: str, entry: Mapping[str, Any], columns: Mapping[str, Any]
) -> dict[str, Any] | None:
    formatting, ranking = entry.get("formatting", "alpaca"), bool(entry.get("ranking"))
    if formatting not in ("alpaca", "sharegpt", "openai"):
        draft.refuse(where, f"formatting {formatting} is not read here", _CHANGE)
        return None
    _check_tags(draft, where, entry.get("tags") or {})
    if draft.source.get("stage") == "kto":
        return _labelled(draft, where, formatting, columns)
    if draft.source.get("stage") == "pt":
        return _running_text(draft, where, formatting, columns)
    if ranking != STAGE_KINDS[draft.kind].pairs:
        what = "preferences" if ranking else "no preferences"
        draft.refuse(where, f"it holds {what} and the stage is {draft.kind}", "name other data, or another stage")
        return None
    if formatting == "alpaca":
        return _alpaca(draft, where, ranking, columns)
    renamed = {"conversations": columns.get("messages") or "conversations"}
    if ranking:
        renamed = {**renamed, **_renames(columns, {"chosen": "chosen", "rejected": "rejected", "tools": "tools"})}
        return _with("preference", {ours: theirs for ours, theirs in renamed.items() if ours != theirs})
    renamed |= _renames(columns, {"system": "system", "tools": "tools"})
    return _with("sharegpt", {ours: theirs for ours, theirs in renamed.items() if ours != theirs})


def _running_text(draft: ImportDraft, where: str, formatting: str, columns: Mapping[str, Any]) -> dict[str, Any] | None:
    """The prompt alone is read in pre-training, whatever the entry's other columns say."""
    if formatting != "alpaca" or not columns.get("prompt") or columns.get("query"):
        draft.refuse(
            where,
            "running text is one column here, which the entry does not name alone",
            "give it columns: {prompt: NAME}",
        )
        return None
    return _with("text", {} if columns["prompt"] == "text" else {"text": str(columns["prompt"])})


def _alpaca(draft: ImportDraft, where: str, ranking: bool, columns: Mapping[str, Any]) -> dict[str, Any] | None:
    if ranking:
        renamed = _renames(columns, {**_ALPACA, "history": "history", "chosen": "chosen", "rejected": "rejected"})
        return _with("alpaca_preference", {ours: theirs for ours, theirs in renamed.items() if ours != theirs})
    if columns.get("history"):
        draft.refuse(
            where,
            "turns of `history` are trained there, and not here",
            "write the rows as conversations (formatting: sharegpt)",
        )
    renamed = _renames(columns, {**_ALPACA, "output": "response"})
    return _with("alpaca", {ours: theirs for ours, theirs in renamed.items() if ours != theirs})


def _labelled(draft: ImportDraft, where: str, formatting: str, columns: Mapping[str, Any]) -> dict[str, Any] | None:
    if not columns.get("kto_tag"):
        draft.refuse(where, "stage: kto, and no column says which answers are good", "give it columns: {kto_tag: NAME}")
        return None
    if formatting == "alpaca":
        renamed = _renames(columns, {**_ALPACA, "output": "response", "history": "history", "label": "kto_tag"})
        return _with("alpaca_kto", {ours: theirs for ours, theirs in renamed.items() if ours != theirs})
    renamed = {"messages": columns.get("messages") or "conversations"}
    renamed |= _renames(columns, {"label": "kto_tag", "tools": "tools"})
    return _with("kto", {ours: theirs for ours, theirs in renamed.items() if ours != theirs})


def _renames(columns: Mapping[str, Any], ours: Mapping[str, str]) -> dict[str, str]:
    return {name: str(columns[theirs]) for name, theirs in ours.items() if columns.get(theirs)}


def _with(kind: str, columns: dict[str, str]) -> dict[str, Any]:
    return {"type": kind, **({"columns": columns} if columns else {})}


def _check_tags(draft: ImportDraft, where: str, tags: Mapping[str, Any]) -> None:
    for tag, value in tags.items():
        if value not in (_TAGS | _ROLE_TAGS).get(tag, (value,)):
            draft.refuse(where, f"{tag} {value} is no name that is read inside a message here", _CHANGE)
