"""torchtune's `dataset` and `dataset_val`, and who renders the rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.config.importers.axolotl_styles import ALPACA_FORMATS
from posttrain.config.importers.fates import ImportDraft
from posttrain.config.importers.nested import part_of
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.values import ALPACA_COLUMNS

TAKE_OUT = "take it out, or change the data once"
_FILE_TYPES = ("json", "csv", "parquet", "text")
_SPLIT = re.compile(r"(\w+)(?:\[:(\d+)\])?")
_COMMON = frozenset(
    {"_component_", "source", "split", "name", "subset", "data_files", "packed", "train_on_input", "column_map"}
)
TuneEntry = Mapping[str, Any]


def read_datasets(draft: ImportDraft) -> None:
    """`dataset`, `dataset_val`, and what of their tokens is trained."""
    entries = _entries(draft, "dataset")
    if not entries:
        draft.refuse("dataset._component_", "missing: a run needs rows", "name the data")
    for section, ours in (("dataset", "datasets"), ("dataset_val", "eval_datasets")):
        read = [one for where, entry in _entries(draft, section) for one in _read(draft, entry, where)]
        if read:
            draft.put(ours, read, section)
    if draft.kind == "sft":
        _trained(draft, entries)


def _entries(draft: ImportDraft, section: str) -> list[tuple[str, TuneEntry]]:
    """Each with where it stands: one mapping, or a list of them that are read one after the other."""
    listed = draft.source.get(section)
    if isinstance(listed, list):
        return [(f"{section}.{place + 1}", entry) for place, entry in enumerate(listed)]
    entry = part_of(draft.source, section)
    return [(section, entry)] if entry else []


def _builder(entry: TuneEntry) -> str:
    return str(entry.get("_component_", "")).rpartition(".")[2]


def _read(draft: ImportDraft, entry: TuneEntry, where: str) -> list[dict[str, Any]]:
    builder = _builder(entry)
    row = _BUILDERS.get((draft.kind, builder))
    if row is None:
        known = ", ".join(name for stage, name in _BUILDERS if stage == draft.kind)
        draft.refuse(
            f"{where}._component_",
            f"{builder or 'missing'}: no data that {draft.kind} reads here",
            f"known are {known}; or write its rows into a file",
        )
        return []
    source, also, reader = row
    for key, value in entry.items():
        if key not in _COMMON | also and value is not None:
            draft.refuse(f"{where}.{key}", f"{value}: it has no counterpart here and may change the rows", TAKE_OUT)
    chosen = _split(draft, entry, where)
    chosen |= {"name": str(named)} if (named := entry.get("name") or entry.get("subset")) else {}
    return [{"path": path, **reader(draft, entry, where), **chosen} for path in _paths(draft, entry, source, where)]


def _paths(draft: ImportDraft, entry: TuneEntry, source: str, where: str) -> list[str]:
    path, files = str(entry.get("source") or source), entry.get("data_files") or []
    if not path:
        draft.refuse(f"{where}.source", "missing", "name the file or hub dataset")
        return []
    if path in _FILE_TYPES and files:
        return [local_file(draft, str(file)) for file in ([files] if isinstance(files, str) else files)]
    if files:
        draft.refuse(
            f"{where}.data_files", "files of a hub dataset by name", "name them in data_files of an entry of ours"
        )
    return [local_file(draft, path)]


def _split(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    asked = str(entry.get("split") or "train")
    match = _SPLIT.fullmatch(asked)
    if match is None:
        draft.refuse(
            f"{where}.split",
            f"{asked}: only the first so many rows of a split are taken here",
            "write it as train[:1000], or take the part out once",
        )
        return {}
    chosen: dict[str, Any] = {} if match[1] == "train" else {"split": match[1]}
    return chosen | ({"limit": int(match[2])} if match[2] else {})


def _columns(entry: TuneEntry, **ours: str) -> dict[str, str]:
    """Their names for columns → the file's, under our names for them."""
    given = entry.get("column_map") or {}
    renamed = {name: str(given.get(theirs, theirs)) for name, theirs in ours.items()}
    return {name: column for name, column in renamed.items() if name != column}


def _with(type_: str, columns: Mapping[str, str], **more: Any) -> dict[str, Any]:
    return {"type": type_, **more, **({"columns": dict(columns)} if columns else {})}


def _alpaca(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    """The text of Alpaca's prompt is a user's turn there."""
    return _with(
        "alpaca",
        _columns(entry, instruction="instruction", input="input", output="output"),
        prompt_format=ALPACA_FORMATS,
    )


def _instruct(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    draft.change(f"{where}.column_map", ALPACA_COLUMNS)
    return _with("alpaca", _columns(entry, instruction="input", output="output"))


def _chat(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    style, column = entry.get("conversation_style", "sharegpt"), str(entry.get("conversation_column", "conversations"))
    if style not in ("sharegpt", "openai"):
        draft.refuse(f"{where}.conversation_style", f"{style}: not read here", "set sharegpt or openai")
    if style == "openai":
        return _with("chat", {} if column == "messages" else {"messages": column})
    return _with("sharegpt", {} if column == "conversations" else {"conversations": column})


def _slimorca(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    return _with("sharegpt", _columns(entry, conversations="conversations"))


def _text(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    if entry.get("add_eos") is False:
        draft.refuse(
            f"{where}.add_eos", "false: a text ends with the tokenizer's EOS here, and it is trained", "set it to true"
        )
    column = str(entry.get("column") or _TEXT_COLUMNS.get(_builder(entry), "text"))
    if entry.get("max_seq_len") is not None:
        draft.put("sequence_len", entry["max_seq_len"], f"{where}.max_seq_len")
    draft.change(
        f"{where}._component_",
        "a text longer than sequence_len is cut there, and packing splits none; split long texts once",
    )
    return _with("text", {} if column == "text" else {"text": column})


def _pair(draft: ImportDraft, entry: TuneEntry, where: str) -> dict[str, Any]:
    return _with("preference", _columns(entry, chosen="chosen", rejected="rejected"))


_TEXT_COLUMNS = {"wikitext_dataset": "page", "cnn_dailymail_articles_dataset": "article"}
_TEXT_KEYS = frozenset({"column", "add_eos", "split_across_pack", "max_seq_len"})
_CHAT_KEYS = frozenset({"conversation_column", "conversation_style"})
_NONE: frozenset[str] = frozenset()
_BUILDERS: dict[
    tuple[str, str], tuple[str, frozenset[str], Callable[[ImportDraft, TuneEntry, str], dict[str, Any]]]
] = {
    ("sft", "alpaca_dataset"): ("tatsu-lab/alpaca", _NONE, _alpaca),
    ("sft", "alpaca_cleaned_dataset"): ("yahma/alpaca-cleaned", _NONE, _alpaca),
    ("sft", "instruct_dataset"): ("", _NONE, _instruct),
    ("sft", "chat_dataset"): ("", _CHAT_KEYS, _chat),
    ("sft", "slimorca_dataset"): ("Open-Orca/SlimOrca-Dedup", _NONE, _slimorca),
    ("sft", "text_completion_dataset"): ("", _TEXT_KEYS, _text),
    ("sft", "wikitext_dataset"): ("EleutherAI/wikitext_document_level", _TEXT_KEYS, _text),
    ("sft", "cnn_dailymail_articles_dataset"): ("ccdv/cnn_dailymail", _TEXT_KEYS, _text),
    ("dpo", "preference_dataset"): ("", _NONE, _pair),
    ("dpo", "hh_rlhf_helpful_dataset"): ("RLHFlow/HH-RLHF-Helpful-standard", _NONE, _pair),
}
"""Stage and torchtune's builder → where its rows are if nothing is said, keys of its own, and how they are written here."""
_TRAINS_INPUT = ("alpaca_dataset", "alpaca_cleaned_dataset")


def _trained(draft: ImportDraft, entries: list[tuple[str, TuneEntry]]) -> None:
    """`train_on_input` and `packed` of every entry, which are one key each here."""
    for where, entry in entries:
        builder = _builder(entry)
        texts = builder in _TEXT_COLUMNS or builder == "text_completion_dataset"
        inputs = True if texts else entry.get("train_on_input", builder in _TRAINS_INPUT)
        if not texts:
            key = f"{where}.train_on_input"
            draft.put(
                "train_on",
                "all" if inputs else "assistant",
                key if "train_on_input" in entry else f"{where}._component_",
                "torchtune's default" if "train_on_input" not in entry else "",
            )
        draft.put(
            "packing",
            bool(entry.get("packed")),
            f"{where}.packed",
            "packing splits no row here" if entry.get("packed") else "",
        )


def read_tokenizer(draft: ImportDraft) -> None:
    """The tokenizer's class renders rows there, the tokenizer's own template here."""
    tokenizer = str(draft.source.get("tokenizer._component_", "")).rpartition(".")[2]
    if tokenizer == "llama3_tokenizer":
        draft.put(
            "chat_template",
            "llama3",
            "tokenizer._component_",
            "the plain format of that name; the end of text behind the last turn is not trained there, and left out here",
        )
    elif "vision" in tokenizer or "transform" in tokenizer:
        draft.refuse("tokenizer._component_", f"{tokenizer}: images are not trained here", "name a text-only model")
    elif tokenizer:
        draft.change(
            "tokenizer._component_",
            f"{tokenizer} renders rows there, the chat template of the model's own tokenizer here; `posttrain data` shows them, and a run stops where there is none",
        )
