"""Names and values of other tools, read as ours where they mean the same, and explained where they have no counterpart.

A plain rename is declared beside its key (`also` in the schema); here stand the names whose values differ too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from posttrain.config.datasets import DatasetKeys
from posttrain.config.importers.fates import KeyFate, Reading, read_as
from posttrain.config.importers.read import TOOLS
from posttrain.config.importers.values import OPTIMIZERS, OVERFLOW, SCHEDULES
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.knob import Keys
from posttrain.config.migrate import renamed
from posttrain.config.pipeline import GateKeys, PipelineKeys, RegisterKeys, SuiteKeys
from posttrain.config.schema import CLOSE_KEYS, KeyInfo, did_you_mean, keys_of, show_value
from posttrain.config.settings import Problems, Settings


def _one_of_roles(roles: Any) -> str:
    return {("assistant",): "assistant", ("gpt",): "assistant"}[tuple(roles) if isinstance(roles, list) else (roles,)]


CONVERTED_NAMES: dict[str, Reading] = {
    "finetuning_type": {"full": "none", "lora": "lora"},
    "use_peft": {True: "lora", False: "none"},
    "quantization_bit": {4: True},
    "lora_target_linear": {True: "all-linear"},
    "use_dft_loss": {True: "dft", False: "nll"},
    "assistant_only_loss": {True: "assistant", False: "all"},
    "train_on_inputs": {True: "all", False: "assistant"},
    "train_on_prompt": {True: "all", False: "assistant"},
    "mask_history": {True: "last", False: "assistant"},
    "roles_to_train": _one_of_roles,
    "disable_gradient_checkpointing": {True: False, False: True},
    "field_messages": lambda column: {"messages": column},
    "formatting": {"openai": "chat", "sharegpt": "sharegpt", "alpaca": "alpaca"},
    "vllm_importance_sampling_mode": {
        "token_truncate": "token_truncate",
        "token_mask": "token_mask",
        "sequence_truncate": "sequence_truncate",
        "sequence_mask": "sequence_mask",
    },
}
"""Foreign name → how its values read under our key; names that are not here are plain renames."""


def _others(readings: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for theirs, ours in readings.items() if theirs != ours}


CONVERTED_VALUES: dict[str, dict[Any, Any]] = {
    "adapter": {"full": "none"},
    "lora_target": {"all": "all-linear"},
    "overflow": _others(OVERFLOW),
    "optim": _others(OPTIMIZERS),
    "lr_scheduler_type": _others(SCHEDULES),
    "loss_type": {"kto_pair": "kto"},
    "scale_rewards": {True: "group", False: "none"},
    "type": {"chat_template": "chat", "chat_template.default": "preference", "openai": "chat"},
}
"""Our key → other tools' values for it."""

_FEW_NAMES = 12


@cache
def foreign_names(model: type[Keys]) -> dict[str, KeyInfo]:
    """Other tools' names for the keys of `model`; a name that two keys share, or that is ours, is left out."""
    keys = keys_of(model)
    owners: dict[str, list[KeyInfo]] = {}
    for info in keys.values():
        for other in info.also:
            owners.setdefault(other.name, []).append(info)
    return {name: infos[0] for name, infos in owners.items() if len(infos) == 1 and name not in keys}


_NEAR_OURS: dict[str, tuple[str, str]] = {
    "dataset": ("LLaMA-Factory", "name the files themselves: datasets: [{path: ./data.jsonl}]"),
    "dataset_name": ("TRL", "write datasets: [{path: NAME}]"),
    "max_samples": ("LLaMA-Factory", "set limit inside the entry of datasets"),
    "fraction": ("TRL", "limit takes the first rows, weight sets the share in a mixture"),
    "ds_type": ("Axolotl", "the file's suffix says how it is read; type says what its rows are"),
    "field": ("Axolotl", "rename columns with columns: {text: NAME}"),
    "template": ("LLaMA-Factory", "the tokenizer's own chat template is used; chat_template takes a Jinja file"),
    "batch_size": ("Axolotl, torchtune", "it means different things; set per_device_train_batch_size and gradient_accumulation_steps"),
    "generation_batch_size": ("TRL", "set num_prompts_per_step; a batch is num_prompts_per_step × num_generations completions"),
    "fp16": ("Axolotl, LLaMA-Factory, TRL", "bf16 or fp32 only: set bf16: true or bf16: false"),
    "saves_per_epoch": ("Axolotl", "set save_steps, below 1 as a share of all steps"),
    "evals_per_epoch": ("Axolotl", "set eval_steps, below 1 as a share of all steps"),
    "entropy_coef_delta": ("TRL", "entropy_target steers the entropy bonus"),
    "entropy_coef_max": ("TRL", "entropy_target steers the entropy bonus"),
    "entropy_coef_min": ("TRL", "entropy_target steers the entropy bonus"),
    "hub_revision": ("TRL", "nothing is pushed; revision is that of the base model that is read"),
    "hub_model_id": ("Axolotl, LLaMA-Factory, TRL", "a pipeline pushes what it registered: register: {hub_model_id: OWNER/NAME}"),
    "push_to_hub": ("LLaMA-Factory, TRL", "a pipeline pushes what it registered: register: {hub_model_id: OWNER/NAME}"),
    "logging_first_step": ("LLaMA-Factory, TRL", "set logging_steps: 1 to log every step"),
    "logging_strategy": ("LLaMA-Factory, TRL", "logging_steps counts steps; leave it out"),
    "num_generations_eval": ("TRL", "RL is validated on eval_suite; num_samples of a suite says how many answers each item gets"),
    "eos_token": ("TRL", "a turn ends with the token that the chat template writes; special_tokens: {eos_token: …} names another for plain texts"),
    "oft_target": ("LLaMA-Factory", "adapters are LoRA; set lora_target"),
    "lora_target_parameters": ("TRL", "name the parameters in lora_target"),
    "vllm_importance_sampling_clip_min": ("TRL", "weights are only capped; set importance_sampling_cap"),
}  # fmt: skip
"""Names that are near ours and mean something else, or that are written in another way here: whose they are, and what to do."""


def _no_counterpart() -> dict[str, tuple[str, str]]:
    ours = {
        name
        for model in (*(kind.keys for kind in STAGE_KINDS.values()), DatasetKeys)
        for name in (*keys_of(model), *foreign_names(model))
    }
    found: dict[str, tuple[str, str]] = {}
    for tool in TOOLS.values():
        for key, row in tool.rows.items():
            if key not in ours:
                tools = f"{found[key][0]}, {tool.name}" if key in found else tool.name
                found[key] = (tools, found[key][1] if key in found else _advice(row))
    return found | _NEAR_OURS


def _advice(row: KeyFate) -> str:
    if row.fate == "mapped":
        return f"set {row.to}"
    return f"{row.why}; {row.todo if row.fate == 'refused' else 'leave it out'}"


NO_COUNTERPART = _no_counterpart()
"""Other tools' keys that are read under no name of ours: whose they are, and what to do instead. From the importers' tables."""


def translate(settings: Settings, model: type[Keys], problems: Problems) -> list[str]:
    """Read other tools' names and values as ours, in place; returns a note for each."""
    notes: list[str] = []
    for name, info in foreign_names(model).items():
        if name in settings.values:
            notes += _translate_name(settings, name, info, problems)
    for key in keys_of(model):
        if key in settings.values:
            notes += _translate_value(settings, key, keys_of(model)[key], problems)
    return notes


def _translate_name(settings: Settings, name: str, info: KeyInfo, problems: Problems) -> list[str]:
    origin, value = settings.origin((name,)), settings.values[name]
    owner = f"is {_whose(name, info)} for {info.name}"
    if info.name in settings.values:
        other = settings.origin((info.name,)).where
        problems.add(origin, settings.name((name,)), f"{owner}, which is set too ({other}); keep {info.name}")
        settings.put((name,), None, origin)  # it has been said what is wrong with it
        return []
    reading = CONVERTED_NAMES.get(name)
    try:
        ours = value if reading is None else read_as(reading, value)
    except (KeyError, TypeError):
        text = f"{owner}; its value {show_value(value)} has no counterpart; set {info.name}: {info.type}"
        problems.add(origin, settings.name((name,)), text)
        settings.put((name,), None, origin)
        return []
    settings.rename(name, info.name, ours)
    value_text = "" if reading is None else f": {show_value(ours)}"
    return [f"{name} is {_whose(name, info)}; read as {info.name}{value_text}"]


def _translate_value(settings: Settings, key: str, info: KeyInfo, problems: Problems) -> list[str]:
    value = settings.values[key]
    if key == "lora_target" and isinstance(value, str) and re.fullmatch(r"\w+(\s*,\s*\w+)+", value):
        ours: Any = [part.strip() for part in value.split(",")]
    elif not isinstance(value, str | bool) or value not in CONVERTED_VALUES.get(key, {}):
        return []
    else:
        ours = CONVERTED_VALUES[key][value]
    if key == "loss_type" and "kto" not in info.type:
        return []
    settings.values[key] = ours
    return [f"{settings.name((key,))}: {show_value(value)} is read as {show_value(ours)}"]


def _whose(name: str, info: KeyInfo) -> str:
    tools = next((other.tools for other in info.also if other.name == name), ())
    return f"{_possessive(tools)} name" if tools else "another name"


def _possessive(tools: Sequence[str]) -> str:
    return " and ".join(f"{tool}'s" for tool in tools)


_HOLDERS: dict[str, type[Keys]] = {
    "an entry of datasets": DatasetKeys,
    "gate": GateKeys,
    "register": RegisterKeys,
    "an entry of evals": SuiteKeys,
}


def unknown_key(key: str, kind: str, models: Sequence[type[Keys]]) -> str:
    """Why `key` is not a key here. `kind` is the stage kind, `pipeline` or the group's name; `models` what it takes."""
    names = [name for model in models for name in keys_of(model)]
    if change := renamed(key, models):
        return change
    if kind in STAGE_KINDS or kind == "pipeline":
        elsewhere = _elsewhere(key, kind)
        if elsewhere:
            return elsewhere
    if key in NO_COUNTERPART:
        tools, advice = NO_COUNTERPART[key]
        return f"{key} is {_possessive(tools.split(', '))} key and has no counterpart here; {advice}"
    close = did_you_mean(key, names, cutoff=CLOSE_KEYS)
    if not close and len(names) <= _FEW_NAMES:
        return "unknown key; valid: " + ", ".join(names)
    return "unknown key" + (close or "; `posttrain explain` lists the keys")


def _elsewhere(key: str, kind: str) -> str:
    """Where `key` would be valid."""
    stages = [stage for stage, row in STAGE_KINDS.items() if stage != kind and _takes(row.keys, key)]
    if stages:
        here = f"this is {kind}" if kind in STAGE_KINDS else f"put it inside the {stages[0]} stage"
        return f"{key} is a {' and '.join(filter(None, (', '.join(stages[:-1]), stages[-1])))} key; {here}"
    if kind != "pipeline" and key in keys_of(PipelineKeys):
        return f"{key} is a pipeline key; it stands at the top of a YAML for `posttrain run`"
    holders = [holder for holder, group in _HOLDERS.items() if _takes(group, key)]
    holders = [holder for holder in holders if kind == "pipeline" or "datasets" in holder]
    return f"unknown key; it belongs inside {' or '.join(holders)}" if holders else ""


def _takes(model: type[Keys], key: str) -> bool:
    return key in keys_of(model) or key in foreign_names(model)
