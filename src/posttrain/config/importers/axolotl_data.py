"""Axolotl's `datasets`, `test_datasets` and `chat_template`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.axolotl_ebft import is_strided
from posttrain.config.importers.axolotl_pairs import PLAIN, read_own_style, read_style, styles
from posttrain.config.importers.axolotl_styles import REFUSED, STYLES, read_own
from posttrain.config.importers.fates import ImportDraft, is_off
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.templates import EOS, named_template
from posttrain.config.importers.values import streaming

_FILE_TYPES = ("json", "jsonl", "csv", "parquet", "text", "arrow")
_EVERY = ("path", "type", "split", "name", "data_files", "ds_type", "chat_template", "chat_template_jinja")
_NAMES = ("message_property_mappings", "message_field_role", "message_field_content", "roles")
_TRAINED = ("roles_to_train", "train_on_eos", "train_on_eot")
_READ: dict[str, tuple[str, ...]] = {
    "chat_template": (
        *_NAMES,
        *_TRAINED,
        "field_messages",
        "message_field_training",
        "field_tools",
        "field_thinking",
        "template_thinking_key",
    ),
    "completion": ("field",),
    "alpaca_chat": ("conversation",),
    "chat_template.default": (*_NAMES, "field_messages", "field_chosen", "field_rejected"),
    "chat_template.argilla_chat": (*_NAMES, "field_chosen", "field_rejected"),
    "stepwise_supervised": ("step_separator", "max_completion_length", "train_on_last_step_only"),
}
"""Type of an entry → the keys that Axolotl reads of it, beside those of every entry."""
_KNOWN = frozenset({*_EVERY, *(key for keys in _READ.values() for key in keys), "train_on_inputs", "text_column"})
_HARMLESS = frozenset({"trust_remote_code", "preprocess_shards", "shards_idx", "streaming"})
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_FLAGS = ("weight", "train", "trainable", "loss", "training")
_THINKING = ("reasoning_content", "reasoning", "thinking")
_TAKE_OUT = "take it out, or change the data once"


def read_datasets(draft: ImportDraft) -> None:
    """`datasets` and what decides which of their tokens are trained."""
    entries, texts = draft.source.get("datasets") or [], draft.source.get("pretraining_dataset")
    if not entries and not texts:
        draft.refuse("datasets", "missing: a run needs rows", "name the data")
        return
    if entries and texts:
        draft.refuse("datasets", "they are not read beside pretraining_dataset", "keep one of the two")
    elif texts:
        _pretraining(draft, texts)
    for key, ours in (("datasets", "datasets"), ("test_datasets", "eval_datasets")):
        read = [
            one
            for place, entry in enumerate(draft.source.get(key) or [])
            for one in _entry(draft, entry, f"{key}.{place + 1}")
        ]
        if read:
            draft.put(ours, read, key)
    if draft.kind == "sft":
        _trained(draft, entries)


def _pretraining(draft: ImportDraft, texts: Any) -> None:
    """`pretraining_dataset`: running text, streamed. Only the first of several is read there."""
    key, entries = "pretraining_dataset", texts if isinstance(texts, list) else [{"path": texts}]
    if len(entries) > 1:
        draft.refuse(key, f"{len(entries)} of them: Axolotl reads the first alone", "keep one")
    entry = entries[0] if isinstance(entries[0], Mapping) else {"path": entries[0]}
    if draft.kind != "sft":
        draft.refuse(key, f"running text in {draft.kind}", "take rl or reward_model out")
    elif entry.get("type") not in (None, "pretrain"):
        draft.refuse(f"{key}.type", f"{entry['type']}: a style of text that is not known here", "set pretrain")
    elif entry.get("skip"):
        draft.refuse(f"{key}.skip", f"{entry['skip']}: rows are read from the start here", "take it out")
    else:
        rows = {name: value for name, value in entry.items() if name not in ("type", "skip", "text_column")}
        rows |= {"type": "completion", "field": entry.get("text_column")}
        draft.put("datasets", _entry(draft, rows, key), key)
        _blocks(draft)


def _blocks(draft: ImportDraft) -> None:
    """How texts fill rows of sequence_len: packed apart from each other, joined, or one by one."""
    apart, joined = "pretrain_multipack_attn", "pretraining_sample_concatenation"
    draft.drop("overflow", "pretraining_dataset says how long texts are cut")
    if draft.asks("sample_packing"):
        note = "of a long text the parts overlap by 256 tokens there, and each ends in EOS; here no token comes twice"
        draft.put("overflow", "split", "pretraining_dataset", note)
        if draft.source.get(apart, True) is False:
            draft.put(
                "packing_strategy", "wrapped", apart, "attention goes across texts; blocks are filled to the last token"
            )
    elif draft.asks(joined):
        draft.drop("packing", "pretraining_sample_concatenation joins the texts")
        draft.put("packing", True, joined)
        draft.put(
            "packing_strategy",
            "wrapped",
            joined,
            "a text that does not fit goes on in the next block; there it begins it",
        )
    else:
        draft.put("overflow", "truncate", "pretraining_dataset", "a text is cut at sequence_len there, without an EOS")


def read_streaming(draft: ImportDraft) -> None:
    """`streaming`, which `pretraining_dataset` asks for by itself, and its keys."""
    entries, texts = draft.source.get("datasets") or [], draft.asks("pretraining_dataset")
    for key in ("pretrain_multipack_attn", "pretraining_sample_concatenation"):
        if key in draft.source and key not in draft.came_from.values():
            draft.leave(key, "it asks for what is so here" if texts else "it is read with pretraining_dataset only")
    if texts and not draft.refusals and not draft.asks("streaming"):
        draft.put("streaming", True, "pretraining_dataset")
    streaming(draft, "streaming_multipack_buffer_size", "streaming")
    if "pretrain_multipack_buffer_size" in draft.source:
        if "streaming_multipack_buffer_size" in draft.source:
            draft.leave("pretrain_multipack_buffer_size", "streaming_multipack_buffer_size says it")
        else:
            streaming(draft, "pretrain_multipack_buffer_size")
    if draft.asks("streaming") and draft.asks("sample_packing") and len(entries) > 1:
        draft.refuse("datasets", f"{len(entries)} streamed and packed: Axolotl reads the first alone", "keep one")


def _entry(draft: ImportDraft, entry: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(entry, Mapping):
        draft.refuse(where, f"{entry!r} is no mapping", "write it as {path: …, type: …}")
        return []
    for key, value in entry.items():
        if key not in _KNOWN | _HARMLESS and not is_off(value):
            draft.refuse(f"{where}.{key}", f"{value}: it has no counterpart here and may change the rows", _TAKE_OUT)
    _tell_unread(draft, entry, where)
    ours = {**_rows(draft, entry, where), **({"name": entry["name"]} if entry.get("name") else {})}
    files = entry.get("data_files")
    if files and str(entry.get("path")) not in _FILE_TYPES:
        ours["data_files"] = [files] if isinstance(files, str) else list(files)
    split = entry.get("split")
    if split and split != "train":
        ours["split"] = split
    return [{"path": path, **ours} for path in _paths(draft, entry, where)]


def _tell_unread(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> None:
    """Keys of an entry that rows of its type are read without there."""
    kind = str(entry.get("type"))
    for key in sorted(_KNOWN - {*_EVERY, *_READ.get(kind, ())}):
        if key == "conversation" and not is_off(entry.get(key)):
            draft.leave(f"{where}.{key}", "only alpaca_chat reads it; sharegpt, which did, is no more: chat_template names the format")  # fmt: skip
        elif not is_off(entry.get(key)):
            draft.leave(f"{where}.{key}", f"{kind} does not read it")
    if kind == "alpaca_chat" and entry.get("conversation") not in (None, "chat"):
        draft.refuse(f"{where}.conversation", f"{entry['conversation']}: only the style chat is read", "set chat, or write its rows as {prompt, completion}")  # fmt: skip


def _paths(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> list[str]:
    path, files = str(entry.get("path") or ""), entry.get("data_files") or []
    files = [files] if isinstance(files, str) else list(files)
    if not path and not files:
        draft.refuse(f"{where}.path", "missing", "name the file or hub dataset")
    if path in _FILE_TYPES and files:
        return [local_file(draft, str(file)) for file in files]
    return [local_file(draft, path)] if path else []


def _rows(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Format and columns of one entry."""
    kind = entry.get("type")
    if isinstance(kind, Mapping):
        return _own_prompt(draft, kind, where)
    if kind in styles(draft):
        return read_style(draft, str(kind))
    if draft.kind == "sft" and kind in STYLES:
        return STYLES[str(kind)].rows()
    if draft.kind == "sft" and kind in REFUSED:
        why, todo = REFUSED[str(kind)]
        draft.refuse(f"{where}.type", f"{kind}: {why}", todo)
        return {}
    if kind is None and draft.kind == "dpo":
        return read_style(draft, PLAIN)  # rows without a type are taken as they are
    reader = _READERS.get((draft.kind, str(kind)))
    if kind is None and draft.kind == "grpo":
        return {}
    if draft.kind == "grpo":
        why = f"{kind}: a function that makes prompts of the rows there, and none of yours is called here"
        draft.refuse(f"{where}.type", why, "write its rows to a file, with a column prompt and those that the rewards read, and take type out")  # fmt: skip
        return {}
    if reader is None:
        written = STYLES if draft.kind == "sft" else ()
        known = ", ".join((*(name for stage, name in _READERS if stage == draft.kind), *styles(draft), *written))
        draft.refuse(
            f"{where}.type",
            f"{kind}: a prompt style that is not known here",
            f"known are {known}; or write the prompts into the data (type: completion here)",
        )
        return {}
    return reader(draft, entry, where)


def _chat(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    field = entry.get("field_messages") or "messages"
    _check_messages(draft, entry, where)
    columns = {} if field == "messages" else {"messages": field}
    tools = entry.get("field_tools")
    if tools and tools != "tools":
        columns["tools"] = tools
    return {"type": "chat", **({"columns": columns} if columns else {})}


def _check_messages(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> None:
    """Names inside a message that our reader knows; others are refused."""
    mapped = dict(entry.get("message_property_mappings") or {})
    mapped.setdefault("role", entry.get("message_field_role") or "role")
    mapped.setdefault("content", entry.get("message_field_content") or "content")
    known = {"role": ("role", "from"), "content": ("content", "value"), "tool_calls": ("tool_calls",), "name": ("name",),
             "tool_call_id": ("tool_call_id",), "reasoning_content": _THINKING, "weight": _FLAGS}  # fmt: skip
    for ours, theirs in mapped.items():
        if theirs not in known.get(ours, ()):
            draft.refuse(f"{where}.message_property_mappings", f"{ours}: {theirs} is no name that is read inside a message",
                         f"rename it in the data to {known.get(ours, (ours,))[0]}")  # fmt: skip
    for key in ("field_thinking", "template_thinking_key"):
        thinking = entry.get(key)
        if thinking and thinking not in _THINKING:
            draft.refuse(f"{where}.{key}", f"{thinking}: not read as thinking here", "rename it to reasoning_content")
        elif thinking:
            draft.leave(
                f"{where}.{key}",
                f"{thinking} is read as thinking, and given to the template under the name that it reads",
            )
    flag = entry.get("message_field_training")
    if flag and flag not in _FLAGS[:-1]:
        draft.refuse(f"{where}.message_field_training", f"{flag}: not read as a flag here", "rename it to train")
    for ours, written in (entry.get("roles") or {}).items():
        odd = [name for name in written if _ROLES.get(name) != _ROLES.get(ours, ours)]
        if odd:
            draft.refuse(f"{where}.roles", f"{odd[0]} as {ours}: no role that is known here", "rename it in the data")


def _text(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    field = entry.get("field") or "text"
    others = [other for other in draft.source.get("datasets") or [] if not _is_text(other)]
    if others:
        draft.change(
            f"{where}.type",
            "completion: beside conversations a text longer than sequence_len is no row of its own parts; split long texts once",
        )
    elif draft.keys.get("overflow") != "split" and not draft.asks("pretraining_dataset"):
        draft.drop("overflow", "texts are split, so none is too long")
        draft.put("overflow", "split", f"{where}.type", "completion: parts of a long text are rows there too")
    return {"type": "text", **({} if field == "text" else {"columns": {"text": field}})}


def _is_text(entry: Any) -> bool:
    return isinstance(entry, Mapping) and entry.get("type") == "completion"


def _pair(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    columns = {"prompt": entry.get("field_messages") or "messages"}
    for ours in ("chosen", "rejected"):
        field = entry.get(f"field_{ours}") or ours
        if field != ours:
            columns[ours] = field
    _check_messages(draft, entry, where)
    return {"type": "preference", "columns": columns}


def _whole_pairs(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    columns = {ours: str(entry[f"field_{ours}"]) for ours in ("chosen", "rejected") if entry.get(f"field_{ours}")}
    _check_messages(draft, entry, where)
    return {"type": "preference", **({"columns": columns} if columns else {})}


def _scored_texts(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    return {"type": "alpaca_preference", "columns": {"instruction": "input"}}


_STEPS = {"step_separator": "\n", "max_completion_length": None, "train_on_last_step_only": False}
"""What an entry says of its steps, and what it means where it is silent."""


def _steps(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """How steps are written is one thing for the stage here."""
    measured = where.startswith("test_datasets")
    for key, default in _STEPS.items():
        value = default if entry.get(key) is None else entry[key]
        if measured and key == "train_on_last_step_only":
            if value:
                draft.refuse(f"{where}.{key}", "true: a validation is over all steps here", "take it out")
        elif value is not None or key in draft.keys:
            draft.put(key, value, f"{where}.{key}")
    return {"type": "stepwise_supervised"}


def _asked_and_solved(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    _told(draft, where)
    return {"type": "alpaca", "prompt_format": ["{input}"]}


def _input_and_output(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    _told(draft, where)
    return {"type": "completion", "prompt_format": ["{input}"], "columns": {"completion": "output"}}


def _question_texts(draft: ImportDraft, entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    draft.change(f"{where}.type", "the text is the column question; where the rows have it as text, remove columns")
    return {"type": "text", "columns": {"text": "question"}}


def _told(draft: ImportDraft, where: str) -> None:
    why = "the columns input and output are read, as by the function of this name beside Axolotl's examples; another one may do otherwise"
    draft.change(f"{where}.type", why)


_READERS: dict[tuple[str, str], Any] = {
    ("sft", "chat_template"): _chat,
    ("sft", "completion"): _text,
    ("dpo", "chat_template.default"): _pair,
    ("reward_model", "bradley_terry.chat_template"): _scored_texts,
    ("process_reward_model", "stepwise_supervised"): _steps,
    ("dpo", "chat_template.argilla_chat"): _whole_pairs,
    ("dpo", "chat_template.argilla"): _whole_pairs,
    ("ebft", "ebft_opencode.transform"): _asked_and_solved,
    ("ebft", "ebft_strided_structured.transform"): _input_and_output,
    ("ebft", "ebft_pretrain.transform"): _question_texts,
}
"""Stage and Axolotl's `type` → how its rows are written here."""


def _own_prompt(draft: ImportDraft, style: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A prompt style of the user's: of SFT, or of a preference."""
    if draft.kind == "dpo":
        return read_own_style(draft, style, where)
    if draft.kind != "sft":
        draft.refuse(f"{where}.type", f"a prompt style of one's own in {draft.kind}", "write the prompts into the data")
        return {}
    return read_own(draft, style, where)


def _trained(draft: ImportDraft, entries: list[Any]) -> None:
    """`train_on_inputs`, `roles_to_train` and `train_on_eos`, of the file and of its entries."""
    entries = [entry for entry in entries if isinstance(entry, Mapping)]
    chats = [entry.get("type") == "chat_template" for entry in entries]
    inputs = draft.source.get("train_on_inputs")
    if inputs and any(chats) and not all(chats):
        draft.refuse(
            "train_on_inputs",
            "true with conversations and texts: it is for the texts only there",
            "train them in two stages",
        )
    elif inputs and not any(chats):
        draft.put("train_on", "all", "train_on_inputs")
    elif inputs:
        draft.refuse(
            "train_on_inputs",
            "true: of conversations Axolotl then trains the texts of every turn, without the words around them",
            "take it out, or set train_on: all in a YAML of ours, which trains these words too",
        )
    elif "train_on_inputs" in draft.source:
        draft.leave("train_on_inputs", "only answers are trained here too")
    for where, holder in (("", draft.source), *_conversations(draft)):
        roles = holder.get("roles_to_train")
        if roles is not None and not roles:
            draft.refuse(
                f"{where}roles_to_train",
                "[]: which turns are trained is then told by flags in the rows",
                "set [assistant]",
            )
        elif roles is not None and set(roles) - {"assistant", "gpt", "model"}:
            draft.refuse(
                f"{where}roles_to_train",
                f"{roles}: only the assistant's turns are trained here, or all",
                "set [assistant]",
            )
        elif roles is not None:
            draft.put("train_on", "assistant", f"{where}roles_to_train")
        for key in ("train_on_eos", "train_on_eot"):
            if holder.get(key) not in (None, "turn"):
                draft.refuse(
                    f"{where}{key}",
                    f"{holder[key]}: every trained turn is trained through its end, and no other",
                    "set turn",
                )
            elif holder.get(key) is not None:
                draft.leave(f"{where}{key}", "turn: so it is here")
    eos = (draft.source.get("special_tokens") or {}).get("eos_token")
    ends_in_eos = eos is not None and eos == EOS.get(str(draft.source.get("chat_template")))
    if any(chats) and "eot_tokens" not in draft.source and not ends_in_eos:
        draft.change("eot_tokens", "it is unset: Axolotl then trains the end of a turn only where that is the tokenizer's EOS, and warns where it is not; here it is trained, whichever token it is")  # fmt: skip


def _conversations(draft: ImportDraft) -> list[tuple[str, Mapping[str, Any]]]:
    """The entries that are conversations, with their places."""
    return [
        (f"{key}.{place + 1}.", entry)
        for key in ("datasets", "test_datasets")
        for place, entry in enumerate(draft.source.get(key) or [])
        if isinstance(entry, Mapping) and entry.get("type") == "chat_template"
    ]


def read_template(draft: ImportDraft) -> None:
    """`chat_template` and `chat_template_jinja`, of the file and of its entries."""
    entries = [entry for entry in draft.source.get("datasets") or [] if isinstance(entry, Mapping)]
    given = [("", draft.source), *((f"datasets.{n + 1}.", entry) for n, entry in enumerate(entries))]
    written = [entry.get("type") in styles(draft) or isinstance(entry.get("type"), Mapping) for entry in entries]
    chat = (draft.kind != "sft" and not is_strided(draft.source)) or any(
        entry.get("type") == "chat_template" for entry in entries
    )
    chat &= not (written and all(written))
    for where, holder in given:
        name, jinja = holder.get("chat_template"), holder.get("chat_template_jinja")
        if not chat and (name or jinja):
            draft.leave(f"{where}chat_template", "no rows are conversations, so no row is rendered by it")
        elif jinja:
            _jinja(draft, f"{where}chat_template_jinja", str(jinja))
        elif name == "jinja":
            draft.refuse(f"{where}chat_template", "jinja: without chat_template_jinja", "set chat_template: FILE")
        elif name:
            named_template(draft, f"{where}chat_template", str(name))


def _jinja(draft: ImportDraft, key: str, text: str) -> None:
    if "{" in text or "\n" in text:
        draft.refuse(key, "a template written into the YAML", "save it as a Jinja file and name that")
    else:
        draft.put("chat_template", local_file(draft, text), key)
