"""OpenRLHF's command lines (`openrlhf.cli.train_sft --…`): the fate of every key, under its dotted name and the flat one of releases before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import (
    ImportDraft,
    KeyFate,
    Kind,
    Refusal,
    Tool,
    as_float,
    changed,
    joint,
    left,
    names,
    refused,
    rows,
    to,
)
from posttrain.config.importers.openrlhf_data import given, read_data
from posttrain.config.importers.openrlhf_rl import is_ppo, ppo_ray_defaults, read_ppo_ray
from posttrain.config.importers.openrlhf_rows import RL_ROWS
from posttrain.config.importers.sharded import OFFLOAD, SHARDED, SPLIT, STAGES, tokens_over
from posttrain.config.importers.trl import SCRIPT
from posttrain.config.importers.values import (
    KERNELS,
    LOADING,
    MEMORY,
    OWN_LOOP,
    PADDING,
    PROCESSES,
    SAVING,
    SCHEDULES,
    TRACKING,
    adapter_defaults,
    warmup,
)

_SCHEDULE = "cosine_with_min_lr"
_OTHER = "train with OpenRLHF"
_MUON = "Muon's own options are not passed on"


ROWS: dict[str, KeyFate] = {
    SCRIPT: joint("loss_type"),
    **rows(to("base_model"), "model.model_name_or_path", "pretrain"),
    **rows(joint("base_model", "the reference is the model the stage starts from"), "ref.model_name_or_path", "ref_pretrain"),
    **rows(joint("datasets"), "data.dataset", "dataset", "data.dataset_probs", "dataset_probs", "data.dataset_split", "dataset_split", "data.max_samples", "max_samples",
           "data.input_key", "input_key", "data.output_key", "output_key", "data.input_template", "input_template", "data.apply_chat_template", "apply_chat_template",
           "data.prompt_key", "prompt_key", "data.chosen_key", "chosen_key", "data.rejected_key", "rejected_key", "model.pretrain_mode_enable", "pretrain_mode"),
    **rows(joint("eval_datasets"), "eval.dataset", "eval_dataset", "eval.split", "eval_split"),
    **rows(joint("train_on"), "data.multiturn", "multiturn"),
    **rows(refused("a template written into the command", "save it as a Jinja file and set chat_template: FILE in a YAML of ours"), "data.tokenizer_chat_template", "tokenizer_chat_template"),
    **rows(joint("sequence_len"), "data.max_len", "max_len"),
    **rows(to("per_device_train_batch_size"), "train.micro_batch_size", "micro_train_batch_size"),
    **rows(joint("gradient_accumulation_steps"), "train.batch_size", "train_batch_size"),
    **rows(joint("num_train_epochs", "passes over the data; in RL over a generation batch (num_iterations)"), "train.max_epochs", "max_epochs"),
    **rows(to("learning_rate", as_float), "adam.lr", "learning_rate"),
    **rows(joint("adam_beta1"), "adam.betas", "adam_betas"),
    "adam.eps": to("adam_epsilon", as_float),
    **rows(to("weight_decay", as_float, "on matrices only"), "adam.weight_decay", "l2"),
    "optim": to("optim", {"adam": "adamw"}, "DeepSpeed's Adam decays weights as AdamW does", todo="set adam, or optim: muon in a YAML of ours"),
    **rows(refused(_MUON, "write a YAML of ours with optim: muon"), "muon.lr", "muon.momentum", "muon.ns_steps", "muon.nesterov", "muon.no_nesterov"),
    "lr_scheduler": to("lr_scheduler_type", SCHEDULES, todo="set lr_scheduler_type: cosine, linear, constant or wsd"),
    "lr_warmup_ratio": to("warmup_ratio", as_float),
    "min_lr_ratio": to("min_lr_ratio", as_float),
    "max_norm": to("max_grad_norm", as_float),
    **rows(to("seed"), "train.seed", "seed"),
    **rows(joint("adapter"), "ds.lora.rank", "lora_rank", "ds.load_in_4bit", "load_in_4bit"),
    **rows(to("lora_alpha"), "ds.lora.alpha", "lora_alpha"),
    **rows(to("lora_dropout", as_float), "ds.lora.dropout", "lora_dropout"),
    **rows(joint("lora_target"), "ds.lora.target_modules", "target_modules"),
    **rows(to("gradient_checkpointing"), "model.gradient_checkpointing_enable", "gradient_checkpointing"),
    **rows(to("bf16", {"bf16": True, "fp32": False}, todo="set bf16; there is no float16 training here"), "ds.param_dtype", "param_dtype"),
    "bf16": to("bf16"),
    **rows(to("packing"), "ds.packing_samples", "packing_samples"),
    **rows(to("sharding", STAGES, SHARDED, "give a stage from 0 to 3"), "ds.zero_stage", "zero_stage"),
    **rows(joint("sharding", SPLIT), "ds.ring_attn_size", "ring_attn_size"),
    **rows(changed(OFFLOAD), "ds.adam_offload", "adam_offload", "ref.offload", "ref_offload"),
    **rows(left(PROCESSES), "ds.zpg", "zpg", "ds.tensor_parallel_size", "ds_tensor_parallel_size", "local_rank", "ds.ring_attn_head_stride", "ring_head_stride", "ds.disable_ds", "ckpt.disable_ds"),
    **rows(left(MEMORY), "ds.overlap_comm", "overlap_comm", "ds.grad_accum_dtype", "grad_accum_dtype", "ds.deepcompile", "deepcompile", "model.gradient_checkpointing_reentrant",
           "gradient_checkpointing_use_reentrant", "model.compute_fp32_loss_enable", "compute_fp32_loss", "ds.use_universal_ckpt", "use_ds_universal_ckpt"),
    **rows(left(KERNELS), "ds.attn_implementation", "attn_implementation", "flash_attn", "ds.use_liger_kernel", "use_liger_kernel", "ds.experts_implementation"),
    **rows(left(LOADING), "data.dataloader_num_workers", "dataloader_num_workers", "data.disable_fast_tokenizer", "disable_fast_tokenizer"),
    **rows(left(SAVING), "ckpt.save_hf", "save_hf_ckpt", "ckpt.path", "ckpt_path", "ckpt.max_mem", "max_ckpt_mem", "disable_ds_ckpt"),
    **rows(joint("base_model", "what a model's files name its head; another than `score` is refused in RL"), "ds.value_head_prefix", "value_head_prefix"),
    **rows(to("output_dir"), "ckpt.output_dir", "save_path"),
    **rows(left("a run that is started again goes on by itself"), "ckpt.load_enable", "load_checkpoint"),
    **rows(to("save_total_limit"), "ckpt.max_num", "max_ckpt_num"),
    **rows(joint("save_steps"), "ckpt.save_steps", "save_steps"),
    **rows(joint("eval_steps"), "eval.steps", "eval_steps"),
    **rows(to("logging_steps"), "logger.logging_steps", "logging_steps"),
    **rows(KeyFate("changed", "report_to", "the token is read from WANDB_API_KEY, and not written down", joint=True), "logger.wandb.key", "use_wandb"),
    **rows(joint("report_to"), "logger.tensorboard_dir", "use_tensorboard"),
    **rows(left(TRACKING), "logger.wandb.org", "logger.wandb.group", "logger.wandb.project", "logger.wandb.run_name", "wandb_org", "wandb_group", "wandb_project", "wandb_run_name"),
    **rows(left(OWN_LOOP), "train.full_determinism_enable", "full_determinism"),
    **rows(left(PADDING), "pad_to_multiple_of"),
    "use_ms": refused("data and models of ModelScope are not fetched here", "download them and name the folders"),
    **rows(refused("the routers' loss has the weight that the model's config gives it", "set router_aux_loss_coef in the config.json of a copy"), "model.aux_loss_coef", "aux_loss_coef"),
    **rows(to("beta", as_float), "model.beta", "beta"),
    **rows(joint("loss_type"), "model.ipo_enable", "ipo", "model.loss_type", "loss"),
    **rows(to("label_smoothing", as_float), "model.label_smoothing", "label_smoothing"),
    **rows(to("rpo_alpha", as_float), "model.nll_loss_coef", "nll_loss_coef"),
    **rows(left("a column `margin` of the rows is read where there is one"), "model.margin_loss_enable", "margin_loss"),
    **RL_ROWS,
}  # fmt: skip

_RL = "train_ppo_ray"
_KINDS: dict[str, Kind] = {"train_sft": "sft", "train_dpo": "dpo", "train_rm": "reward_model"}


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    script = str(source.get(SCRIPT, ""))
    if script in _KINDS:
        return _KINDS[script]
    if script == _RL:
        return "ppo" if is_ppo(source) else "grpo"
    return Refusal(
        SCRIPT, f"{script or 'missing'}: no such method here", f"known are {', '.join((*_KINDS, _RL))}; else {_OTHER}"
    )


def finish(draft: ImportDraft) -> None:
    _reference(draft)
    _adapter(draft)
    if draft.kind in ("grpo", "ppo"):
        read_ppo_ray(draft)
    else:
        read_data(draft)
        _batch(draft)
        _loops(draft)
    _betas(draft)
    warmup(draft)
    _loss(draft)
    _trackers(draft)


def _reference(draft: ImportDraft) -> None:
    key, reference = given(draft, "ref.model_name_or_path", "ref_pretrain")
    if reference is not None and reference != draft.keys.get("base_model"):
        draft.refuse(key, f"{reference}: the reference is the model the stage starts from", "name the same model")
    elif reference is not None:
        draft.leave(key, "the reference is the model the stage starts from")


def _adapter(draft: ImportDraft) -> None:
    key, rank = given(draft, "ds.lora.rank", "lora_rank")
    four, quantised = given(draft, "ds.load_in_4bit", "load_in_4bit")
    target, modules = given(draft, "ds.lora.target_modules", "target_modules")
    if not rank:
        for name in (key, four, target):
            if name in draft.source:
                draft.leave(name, "there is no adapter")
        if quantised:
            draft.refuse(four, "true without lora.rank would train nothing", "set lora.rank")
        return
    draft.put("adapter", "qlora" if quantised else "lora", key)
    draft.put("lora_r", int(rank), key)
    listed = names(modules) if modules is not None else ["all-linear"]
    draft.put("lora_target", "all-linear" if listed == ["all-linear"] else listed, target)
    if four in draft.source:
        draft.leave(four, "adapter says it")


def _batch(draft: ImportDraft) -> None:
    """The rows of a step are counted over all processes there."""
    key = given(draft, "train.batch_size", "train_batch_size")[0]
    total, micro = draft.size(key, 128), int(draft.keys.get("per_device_train_batch_size") or _MICRO[draft.kind])
    if total % micro:
        draft.refuse(key, f"{total} is no multiple of {micro} rows at once", "set micro_batch_size to a divisor")
        return
    draft.put("gradient_accumulation_steps", total // micro, key, f"{total} rows a step over all processes")
    draft.put("num_processes", 1, key, "so that the rows of a step are the same under any number of processes")


def _loops(draft: ImportDraft) -> None:
    """Lengths and passes, whose keys say other things in RL; -1 steps are never."""
    for ours, spellings in (("sequence_len", ("data.max_len", "max_len")), ("num_train_epochs", ("train.max_epochs", "max_epochs"))):  # fmt: skip
        key, value = given(draft, *spellings)
        if value is not None:
            draft.put(ours, value, key)
    for ours, spellings in (("save_steps", ("ckpt.save_steps", "save_steps")), ("eval_steps", ("eval.steps", "eval_steps"))):  # fmt: skip
        key, value = given(draft, *spellings)
        if value is not None:
            draft.put(ours, max(0, int(as_float(value))), key)
    key, size = given(draft, "ds.ring_attn_size", "ring_attn_size")
    if size is not None:
        draft.put("sharding", tokens_over(size), key, SPLIT)
    key = given(draft, "ds.value_head_prefix", "value_head_prefix")[0]
    if key in draft.source:
        draft.leave(key, SAVING)


def _betas(draft: ImportDraft) -> None:
    key, betas = given(draft, "adam.betas", "adam_betas", "actor.adam.betas")
    if betas is not None:
        first, second = betas
        draft.put("adam_beta1", first, key)
        draft.put("adam_beta2", second, key)


def _loss(draft: ImportDraft) -> None:
    key, ipo = given(draft, "model.ipo_enable", "ipo")
    if draft.kind == "dpo":
        draft.put("loss_type", "ipo" if ipo else "sigmoid", key if ipo else SCRIPT)
    else:
        draft.leave(SCRIPT, f"it is run by `posttrain {draft.kind}`")
    key, loss = given(draft, "model.loss_type", "loss")
    if loss is not None and loss not in ("sigmoid", "logexp"):
        draft.refuse(key, f"{loss}: a reward model learns by Bradley and Terry's likelihood here", "set sigmoid")
    elif loss is not None:
        draft.leave(key, "log(1 + exp(rejected - chosen)) is -log sigmoid(chosen - rejected): so it is here")


def _trackers(draft: ImportDraft) -> None:
    wandb, tensorboard = (
        given(draft, "logger.wandb.key", "use_wandb"),
        given(draft, "logger.tensorboard_dir", "use_tensorboard"),
    )
    asked = [(key, name) for (key, value), name in ((wandb, "wandb"), (tensorboard, "tensorboard")) if value]
    if asked:
        note = "the token is read from WANDB_API_KEY, and not written down" if asked[0][1] == "wandb" else ""
        draft.put("report_to", [name for _, name in asked], asked[0][0], note)
    for key, _ in asked[1:]:
        draft.leave(key, "it stands in report_to")


_MICRO = {"sft": 8, "dpo": 8, "reward_model": 1}


def defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What OpenRLHF does where its command is silent."""
    filled: dict[str, Any] = {
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "adam_beta2": 0.95, **adapter_defaults(draft, 8, 16),
    }  # fmt: skip
    if (given(draft, "lr_scheduler", "actor.lr_scheduler")[1] or _SCHEDULE) == _SCHEDULE:
        filled["min_lr_ratio"] = 0.1
    if draft.kind in ("grpo", "ppo"):
        return {**filled, **ppo_ray_defaults(draft)}
    return filled | {
        "learning_rate": {"sft": 5e-6, "dpo": 1e-5, "reward_model": 9e-6}[draft.kind], "num_train_epochs": 2.0 if draft.kind == "sft" else 1.0,
        "sequence_len": 2048 if draft.kind == "sft" else 512, "per_device_train_batch_size": _MICRO[draft.kind], "overflow": "truncate",
    }  # fmt: skip


OPENRLHF = Tool("OpenRLHF", ROWS, stage, finish, frozenset({"micro_train_batch_size", "pretrain"}), defaults)
