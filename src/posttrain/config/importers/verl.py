"""verl's hydra command lines (`python -m verl.trainer.main_ppo key=value`) and YAML: what its keys come to together.

Its defaults are those of its releases from 0.4 on; older ones put a KL into the reward unasked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, Kind, Refusal, Tool, as_float, flag, names
from posttrain.config.importers.nested import part_of
from posttrain.config.importers.sharded import STRATEGIES, count_shards_together, tokens_over
from posttrain.config.importers.trl import SCRIPT
from posttrain.config.importers.values import adapter_defaults, trackers
from posttrain.config.importers.verl_data import examples_of, read_files, settle
from posttrain.config.importers.verl_rl import read_rl, rl_defaults
from posttrain.config.importers.verl_rows import VERL_ROWS

_RL = "main_ppo"
_SFT = ("fsdp_sft_trainer", "sft_trainer")


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    script = source.get(SCRIPT) or (_RL if any(key.startswith("actor_rollout_ref.") for key in source) else _SFT[0])
    if script == _RL:
        return "ppo" if source.get("algorithm.adv_estimator", "gae") == "gae" else "grpo"
    if script in _SFT:
        return "sft"
    todo = f"known are {', '.join((_RL, *_SFT))}; else train with verl"
    return Refusal(SCRIPT, f"{script}: no such method here", todo)


def finish(draft: ImportDraft) -> None:
    draft.leave(SCRIPT, f"it is run by `posttrain {draft.kind}`")
    _adapter(draft)
    _betas(draft)
    _length(draft)
    _trackers(draft)
    _output(draft)
    _template_values(draft)
    if draft.kind == "sft":
        _read_sft(draft)
    else:
        read_rl(draft)
    _sharding(draft)


def _adapter(draft: ImportDraft) -> None:
    place = "model" if draft.kind == "sft" else "actor_rollout_ref.model"
    rank, target = f"{place}.lora_rank", f"{place}.target_modules"
    if not draft.asks(rank):
        draft.drop("lora_alpha", "there is no adapter")
        for key in (rank, target):
            if key in draft.source:
                draft.leave(key, "there is no adapter")
        return
    draft.put("adapter", "lora", rank)
    draft.put("lora_r", int(as_float(draft.source[rank])), rank)
    listed = names(draft.source.get(target, "all-linear"))
    draft.put("lora_target", "all-linear" if listed == ["all-linear"] else listed, target)


def _betas(draft: ImportDraft) -> None:
    key = "optim.betas" if draft.kind == "sft" else "actor_rollout_ref.actor.optim.betas"
    if key in draft.source:
        first, second = draft.source[key]
        draft.put("adam_beta1", as_float(first), key)
        draft.put("adam_beta2", as_float(second), key)


def _length(draft: ImportDraft) -> None:
    """What happens to a row that is too long: to its prompt, in RL."""
    cut, drop = draft.source.get("data.truncation", "error"), "data.filter_overlong_prompts"
    keeps = "right" if draft.kind == "sft" else "left"
    if draft.asks(drop) and draft.kind != "sft":
        draft.put("overflow", "drop", drop)
        if "data.truncation" in draft.source:
            draft.leave("data.truncation", "prompts that are too long are left out")
        return
    if drop in draft.source:
        draft.leave(drop, "data.truncation says it")
    if cut == "error":
        settle(draft, "overflow", "error", "data.truncation")
    elif cut == keeps:
        draft.put("overflow", "truncate", "data.truncation")
    else:
        draft.refuse("data.truncation", f"{cut}: a row keeps its {'beginning' if keeps == 'right' else 'end'} here", f"set {keeps} or error")  # fmt: skip


def _trackers(draft: ImportDraft) -> None:
    key = "trainer.logger"
    found = trackers(draft.source.get(key, ["console", "wandb"]))
    if key in draft.source and found:
        draft.put("report_to", found, key, "of those that are here: mlflow, wandb, trackio, tensorboard")
    elif key in draft.source:
        draft.leave(key, "every run writes metrics.jsonl, and says what it does")


def _output(draft: ImportDraft) -> None:
    key = "trainer.default_local_dir"
    if key not in draft.source:
        return
    if "$" in str(draft.source[key]):
        draft.leave(key, "only a shell or hydra knows it; a run is in runs/NAME, with the YAML's name")
    else:
        draft.put("output_dir", draft.source[key], key)


def _template_values(draft: ImportDraft) -> None:
    start = "data.apply_chat_template_kwargs"
    if given := part_of(draft.source, start):
        draft.put("chat_template_kwargs", given, f"{start}.*")


def _sharding(draft: ImportDraft) -> None:
    actor = "actor_rollout_ref.actor"
    for key in (f"{actor}.ulysses_sequence_parallel_size", "ulysses_sequence_parallel_size", "engine.ulysses_sequence_parallel_size"):  # fmt: skip
        if key in draft.source:
            draft.put("sharding", tokens_over(draft.source[key]), key)
    size, again = f"{actor}.fsdp_config.fsdp_size", f"{actor}.fsdp_config.reshard_after_forward"
    if size in draft.source:
        number = int(as_float(draft.source[size]))
        draft.put("sharding", {"dp_shard_size": number} if number > 0 else {}, size)
    if again in draft.source:
        draft.put("sharding", STRATEGIES[flag(draft.source[again])], again)
    count_shards_together(draft)


def _read_sft(draft: ImportDraft) -> None:
    entry = examples_of(draft)
    read_files(draft, entry)
    total, micro_key = draft.size("data.train_batch_size", 256), "data.micro_batch_size_per_gpu"
    micro = draft.size(micro_key, 4)
    settle(draft, "per_device_train_batch_size", micro, micro_key)
    if total % micro:
        draft.refuse("data.train_batch_size", f"{total} is no multiple of {micro} rows at once", f"set {micro_key} to a divisor")  # fmt: skip
    else:
        draft.put("gradient_accumulation_steps", total // micro, "data.train_batch_size", f"{total} rows a step over all processes")  # fmt: skip
        draft.put("num_processes", 1, "data.train_batch_size", "so that the rows of a step are the same under any number of processes")  # fmt: skip
    for ours, theirs in (("max_steps", "total_training_steps"), ("save_steps", "save_freq"), ("eval_steps", "test_freq")):  # fmt: skip
        key = f"trainer.{theirs}"
        if key in draft.source:
            draft.put(ours, max(-1 if ours == "max_steps" else 0, int(as_float(draft.source[key]))), key)
    for key in ("optim.warmup_steps_ratio", "optim.lr_warmup_steps_ratio"):
        if key in draft.source:
            draft.put("warmup_ratio", as_float(draft.source[key]), key)
    warm = "optim.lr_warmup_steps"
    if (number := draft.number(warm)) is not None:
        if number > 0:
            draft.put("warmup_steps", int(number), warm)
        else:
            draft.leave(warm, "the ratio says it")


def defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What verl does where its command is silent."""
    shared = {"weight_decay": 0.01, **adapter_defaults(draft, 16, 16), "overflow": "error"}
    if draft.kind != "sft":
        return {**shared, **rl_defaults(draft)}
    shared |= {"num_train_epochs": 4.0, "sequence_len": 1024, "seed": 1}
    if draft.source.get(SCRIPT) == "sft_trainer":
        return shared | {"learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    return shared | {"learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "adam_beta2": 0.95}


VERL = Tool(
    "verl", VERL_ROWS, stage, finish,
    frozenset({"actor_rollout_ref.model.path", "actor_rollout_ref.rollout.n", "algorithm.adv_estimator", "data.train_files", "model.partial_pretrain", "trainer.n_gpus_per_node"}),
    defaults, nested=True,
)  # fmt: skip
