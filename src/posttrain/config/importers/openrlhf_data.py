"""OpenRLHF's rows: which sets, how much of each, and in what form its scripts read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, as_float, names
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.values import ALPACA_COLUMNS

_MANY = 1_000_000
"""OpenRLHF's own default for max_samples: from here on it limits nothing."""


_MESSAGES = "prompts are lists of messages here: text, a user's turn there, is an error when rows are read; a column `prompt` beside it is read instead, so take it out of the rows"


def given(draft: ImportDraft, *spellings: str) -> tuple[str, Any]:
    """The spelling that the command has, and its value; None where it has none, and the spelling is the one of its other keys."""
    dotted = any("." in key for key in draft.source)
    likely = [key for key in spellings if ("." in key) == dotted] or spellings
    found = next((key for key in spellings if key in draft.source), likely[0])
    return found, draft.source.get(found)


def read_data(draft: ImportDraft) -> None:
    key, wanted = given(draft, "data.dataset", "dataset")
    if not wanted:
        draft.refuse(key, "missing: a run needs rows", "name the data")
        return
    form = _pairs(draft) if draft.kind != "sft" else _examples(draft)
    split = str(given(draft, "data.dataset_split", "dataset_split")[1] or "train")
    paths = [part.strip() for part in str(wanted).split(",") if part.strip()]
    entries = [_entry(draft, path, split, form) for path in paths]
    _share(draft, entries, "data.dataset_probs", "dataset_probs")
    draft.put("datasets", entries, key)
    _validation(draft, form)


def _validation(draft: ImportDraft, form: Mapping[str, Any]) -> None:
    key, held = given(draft, "eval.dataset", "eval_dataset")
    if held:
        split = str(given(draft, "eval.split", "eval_split")[1] or ("test" if draft.kind == "dpo" else "train"))
        draft.put("eval_datasets", [_entry(draft, part.strip(), split, form) for part in str(held).split(",")], key)
    elif given(draft, "eval.split", "eval_split")[1] is not None:
        draft.leave(given(draft, "eval.split", "eval_split")[0], "no data to validate on is named")


def _entry(draft: ImportDraft, path: str, split: str, form: Mapping[str, Any]) -> dict[str, Any]:
    if "@" in path:
        todo = "name the files in data_files of an entry of ours"
        draft.refuse("dataset", f"{path}: a folder inside a dataset is not chosen by `@`", todo)
    return {"path": local_file(draft, path), **form, **({} if split == "train" else {"split": split})}


def _share(draft: ImportDraft, entries: list[dict[str, Any]], *probs: str) -> None:
    """`dataset_probs` are weights; `max_samples` takes the first rows."""
    key, shares = given(draft, *probs)
    if shares is not None and len(entries) > 1:
        weights = [float(share) for share in names(str(shares))]
        for entry, weight in zip(entries, weights, strict=True):
            entry["weight"] = weight
        draft.change(key, "they are the weights of a mixture, which takes as many rows as there are")
    elif shares is not None:
        draft.leave(key, "there is one set of rows")
    key, most = given(draft, "data.max_samples", "max_samples")
    if most is not None and as_float(most) >= _MANY:
        draft.leave(key, "so many rows are no limit")
    elif most is not None and len(entries) > 1:
        draft.refuse(key, f"{most} of several sets of rows taken together", "write the rows that you want to a file")
    elif most is not None:
        entries[0]["limit"] = int(as_float(most))
        draft.leave(key, "it is the limit of the entry of datasets")


def _examples(draft: ImportDraft) -> dict[str, Any]:
    """Rows of SFT: text to go on with, a conversation, or a prompt and its answer."""
    inputs = str(given(draft, "data.input_key", "input_key")[1] or "input")
    outputs = given(draft, "data.output_key", "output_key")[1]
    template_key, template = given(draft, "data.input_template", "input_template")
    turns_key, turns = given(draft, "data.multiturn", "multiturn")
    if draft.asks("model.pretrain_mode_enable") or draft.asks("pretrain_mode"):
        if outputs is not None:
            todo = "write both texts into one column, and take it out"
            draft.refuse("output_key", f"{outputs}: with pretrain_mode it follows the text of {inputs}", todo)
        return {"type": "text", **({} if inputs == "text" else {"columns": {"text": inputs}})}
    if draft.asks("data.apply_chat_template") or draft.asks("apply_chat_template"):
        if template is not None:
            draft.leave(template_key, "the chat template writes the prompt")
        if outputs is None:
            draft.put(
                "train_on",
                "assistant" if turns else "last",
                turns_key,
                "" if turns else "the last answer of a conversation there",
            )
            return {"type": "chat", **({} if inputs == "messages" else {"columns": {"messages": inputs}})}
        if turns:
            draft.refuse(
                turns_key, "true: with output_key an answer is put behind a conversation", "write it into the rows"
            )
        draft.change("input_key", ALPACA_COLUMNS)
        columns = {"instruction": inputs, "output": str(outputs)}
        return {"type": "alpaca", "columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs}}
    if outputs is None:
        draft.refuse(
            "output_key",
            "missing: without it and without a chat template the text has no answer",
            "set it, or pretrain_mode",
        )
        return {}
    written = str("User: {}\nAssistant: " if template is None else template or "{}")
    around = [part.replace("{", "{{").replace("}", "}}") for part in written.split("{}", 1)]
    if len(around) == 1:
        draft.refuse(template_key, f"{written}: the prompt has no place in it", "write {} where it stands")
        return {}
    return {
        "type": "completion",
        "prompt_format": [f"{around[0]}{{{inputs}}}{around[1]}"],
        "columns": {"completion": str(outputs)},
    }


def _pairs(draft: ImportDraft) -> dict[str, Any]:
    """Rows of preferences."""
    key, template = given(draft, "data.input_template", "input_template")
    if template and not (draft.asks("data.apply_chat_template") or draft.asks("apply_chat_template")):
        draft.refuse(key, "words around the prompt of a pair", "write them into the rows")
    columns = {
        "prompt": given(draft, "data.prompt_key", "prompt_key")[1],
        "chosen": given(draft, "data.chosen_key", "chosen_key")[1],
        "rejected": given(draft, "data.rejected_key", "rejected_key")[1],
    }
    renamed = {ours: str(theirs) for ours, theirs in columns.items() if theirs and theirs != ours}
    return {"type": "preference", **({"columns": renamed} if renamed else {})}


def read_prompts(draft: ImportDraft) -> None:
    """Rows of RL: conversations that end with a question, and what rewards are told beside them."""
    key, wanted = given(draft, "data.prompt_dataset", "prompt_data")
    if not wanted:
        draft.refuse(key, "missing: a run needs prompts", "name the data")
        return
    rendered = given(draft, "data.apply_chat_template", "apply_chat_template")
    if not rendered[1]:
        draft.refuse(rendered[0], "off: text that no template renders begins with the tokenizer's BOS here, and without it there", "set it, or write a YAML of ours")  # fmt: skip
    template_key = given(draft, "data.input_template", "input_template")[0]
    if template_key in draft.source:
        draft.leave(template_key, "the chat template writes the prompt")
    input_key, column = given(draft, "data.input_key", "input_key")
    draft.change(input_key, _MESSAGES)
    label_key, label = given(draft, "data.label_key", "label_key")
    columns = {"messages": str(column or "input"), **({"labels": str(label)} if label else {})}
    form = {"type": "prompt", "columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs}}
    if label_key in draft.source:
        draft.leave(label_key, "rewards are given the column as `labels`")
    split = str(given(draft, "data.prompt_split", "prompt_split")[1] or "train")
    entries = [_entry(draft, part.strip(), split, form) for part in str(wanted).split(",") if part.strip()]
    _share(draft, entries, "data.prompt_probs", "prompt_data_probs")
    draft.put("datasets", entries, key)
    _validation(draft, form)
