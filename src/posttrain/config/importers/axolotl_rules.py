"""What several of Axolotl's keys say together: the method, batches, adapter, tokens, schedule."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.axolotl_data import read_datasets, read_streaming, read_template
from posttrain.config.importers.axolotl_ebft import read_ebft
from posttrain.config.importers.axolotl_grpo import read_batches, read_grpo
from posttrain.config.importers.fates import ImportDraft, Kind, Refusal, as_float, is_off, names
from posttrain.config.importers.sharded import count_shards_together
from posttrain.config.importers.values import (
    OPTIMIZERS,
    adapter_defaults,
    best_model,
    cadence,
    compiling,
    drawn_by_seed,
    eight_bits,
    schedule,
    sft_losses,
    sft_only,
    start_from_adapter,
    warmup,
)

OTHER = "train with Axolotl"
_HARMLESS_PLUGINS = ("CutCrossEntropyPlugin", "LigerPlugin", "KernelsPlugin", "ExpertParallelPlugin", "SwanLabPlugin", "NemoGymTrackingPlugin",
                     "MegatronCorePlugin", "DenseMLPPlugin")  # fmt: skip

_TRACKERS = {
    "wandb_project": "wandb",
    "use_wandb": "wandb",
    "use_mlflow": "mlflow",
    "use_tensorboard": "tensorboard",
    "use_trackio": "trackio",
}
_PREFERENCES = {"dpo": "sigmoid", "ipo": "ipo", "kto": "kto", "orpo": "orpo", "simpo": "simpo"}
_DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero", "apo_down", "discopop", "sigmoid_norm")  # fmt: skip


_LABELS = {"reward_model": 1, "process_reward_model": 2}
"""Kind, and Axolotl's key for it → what its head says."""
_HEADS = {"reward_model": "a reward is one number", "process_reward_model": "a step is right or wrong"}


def stage(source: Mapping[str, Any]) -> Kind | Refusal:
    rl = source.get("rl")
    if source.get("process_reward_model"):
        return "process_reward_model"
    if source.get("reward_model"):
        return "reward_model"
    if is_off(rl):
        return "sft"
    if rl in _PREFERENCES:
        return "dpo"
    if rl in ("grpo", "gdpo"):
        return "grpo"
    if rl == "ebft":
        return "ebft"
    return Refusal(
        "rl", f"{rl}: no such method here", "set rl: dpo, ipo, kto, orpo, simpo, grpo, gdpo or ebft, or " + OTHER
    )


def finish(draft: ImportDraft) -> None:
    _method(draft)
    read_datasets(draft)
    read_template(draft)
    warmup(draft)
    schedule(draft)
    _batch(draft)
    read_batches(draft)
    _adapter(draft)
    _model(draft)
    _storage(draft)
    _training(draft)
    count_shards_together(draft)
    _trackers(draft)
    eight_bits(draft)
    compiling(draft)
    sft_only(draft)
    read_streaming(draft)
    _order(draft)
    best_model(draft)
    cadence(draft, "save", "save_steps", 1)
    cadence(draft, "eval", "eval_steps", 1)


def _method(draft: ImportDraft) -> None:
    rl, source = draft.source.get("rl"), draft.source
    if draft.kind == "dpo":
        loss = _PREFERENCES[str(rl)]
        asked = source.get("dpo_loss_type")
        if asked is not None and rl == "dpo":
            loss = asked[0] if isinstance(asked, list) and len(asked) == 1 else asked
        listed: list[Any] = loss if isinstance(loss, list) else [loss]
        if all(one in (*_DPO_LOSSES, *_PREFERENCES.values()) for one in listed):
            draft.put("loss_type", loss, "rl")
        else:
            draft.refuse("dpo_loss_type", f"{loss} has no counterpart here", "set one of " + ", ".join(_DPO_LOSSES))
    elif "rl" in source and is_off(rl):
        draft.leave("rl", f"it is no RL: the stage is {draft.kind}")
    _rewards(draft)
    if "ebft" in source and draft.kind != "ebft":
        draft.leave("ebft", "it is read with rl: ebft only")
    if draft.kind == "grpo":
        read_grpo(draft)
    elif draft.kind == "ebft":
        read_ebft(draft)
    elif "trl" in source:
        draft.leave("trl", f"it plays no part in {draft.kind}")


def _rewards(draft: ImportDraft) -> None:
    """`reward_model`, `process_reward_model`, and the outputs of their head."""
    labels = _LABELS.get(draft.kind)
    for key in _LABELS:
        if key in draft.source:
            draft.leave(key, f"it is run by `posttrain {draft.kind}`" if key == draft.kind else "it is off")
        if key != draft.kind and labels and draft.asks(key):
            draft.refuse(key, f"true beside {draft.kind}: true are two stages", "keep one of the two")
    if labels and draft.asks("rl"):
        draft.refuse("rl", f"{draft.source['rl']} beside {draft.kind}: true are two stages", "keep one of the two")
    if draft.asks("num_labels") and draft.source["num_labels"] != labels:
        what = _HEADS.get(draft.kind, "classification is not trained here")
        draft.refuse("num_labels", f"{draft.source['num_labels']}: {what}", f"set {labels}" if labels else OTHER)
    elif "num_labels" in draft.source:
        draft.leave("num_labels", f"{_HEADS.get(draft.kind, 'it is off')}, here too" if labels else "it is off")


def _trackers(draft: ImportDraft) -> None:
    """A project's name is W&B's own variable here."""
    asked = [key for key in _TRACKERS if not is_off(draft.source.get(key))]
    if not asked:
        return
    project = draft.source.get("wandb_project")
    note = f"set WANDB_PROJECT={project} in the environment" if project else ""
    draft.put("report_to", list(dict.fromkeys(_TRACKERS[key] for key in asked)), asked[0], note)
    for key in asked[1:]:
        draft.leave(key, "it stands in report_to")


def _batch(draft: ImportDraft) -> None:
    total = draft.source.get("batch_size")
    if not total or draft.kind == "ebft":
        return
    micro = draft.source.get("micro_batch_size", 1)
    if "gradient_accumulation_steps" in draft.source:
        draft.leave("batch_size", "micro_batch_size and gradient_accumulation_steps say it")
    elif total % micro:
        draft.refuse(
            "batch_size", f"{total} is no multiple of micro_batch_size {micro}", "set gradient_accumulation_steps"
        )
    else:
        draft.put("gradient_accumulation_steps", total // micro, "batch_size", "batch_size / micro_batch_size")


def _adapter(draft: ImportDraft) -> None:
    modules, linear = draft.source.get("lora_target_modules"), draft.source.get("lora_target_linear")
    if draft.keys.get("adapter", "none") == "none":
        for key in ("lora_target_modules", "lora_target_linear", "bnb_config_kwargs"):
            if key in draft.source:
                draft.leave(key, "there is no adapter")
        if draft.asks("lora_model_dir"):
            draft.refuse("lora_model_dir", f"{draft.source['lora_model_dir']} without adapter: Axolotl trains the base without it, and says nothing", "set adapter: lora or qlora, or take it out to train the base")  # fmt: skip
        return
    if draft.asks("lora_model_dir"):
        start_from_adapter(draft, "lora_model_dir", str(draft.source["lora_model_dir"]))
    _target(draft, modules, linear)
    for key, value in (draft.source.get("bnb_config_kwargs") or {}).items():
        if key in ("bnb_4bit_use_double_quant", "bnb_4bit_quant_type"):
            draft.put(key, value, f"bnb_config_kwargs.{key}")
        elif key in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
            draft.leave(f"bnb_config_kwargs.{key}", "bf16 says in which type is computed")
        elif not is_off(value):
            draft.refuse(f"bnb_config_kwargs.{key}", f"{value}: it has no counterpart here", "take it out")


def _target(draft: ImportDraft, modules: Any, linear: Any) -> None:
    """Modules and parameters that get an adapter. Those of fused experts are named among the modules here."""
    parameters = names(draft.source.get("lora_target_parameters") or [])
    if draft.asks("peft_layers_to_transform"):
        _layers(draft, modules, in_all=linear or parameters)
    elif linear:
        draft.put("lora_target", "all-linear", "lora_target_linear")
        if modules:
            draft.change("lora_target_modules", "lora_target_linear takes every linear layer, these among them")
    elif isinstance(modules, str) or (modules and len(modules) == 1 and not modules[0].isidentifier()):
        text = modules if isinstance(modules, str) else modules[0]
        text = "all-linear" if text == "all_linear" else text
        is_apart = not parameters or text == "all-linear"
        draft.put("lora_target", text if is_apart else [text, *parameters], "lora_target_modules")
    elif modules or parameters:
        key = "lora_target_modules" if modules else "lora_target_parameters"
        draft.put("lora_target", [*(modules or []), *parameters], key)
    else:
        if draft.asks("lora_model_dir"):
            return  # the adapter says it
        draft.refuse(
            "lora_target_modules", "missing: PEFT then takes modules that depend on the family",
            "set lora_target_linear: true or name them",
        )  # fmt: skip
    if "lora_target_linear" in draft.source and not linear:
        draft.leave("lora_target_linear", "false: the modules are named")
    if parameters and not isinstance(draft.keys.get("lora_target"), list):
        draft.refuse(
            "lora_target_parameters",
            f"{parameters[0]} beside all linear layers",
            "name the modules in a list, or by a pattern",
        )
    elif parameters and modules:
        draft.leave("lora_target_parameters", "they stand in lora_target")


def _layers(draft: ImportDraft, modules: Any, in_all: Any) -> None:
    """Modules by name in some layers: the number behind a list of layers is one of these."""
    given = draft.source["peft_layers_to_transform"]
    numbers = given if isinstance(given, list) else [given]
    named = [str(module) for module in modules or []] if isinstance(modules, list) else []
    if in_all or not named or not all(re.fullmatch(r"[\w.]+", name) for name in named):
        draft.refuse("peft_layers_to_transform", f"{given} without a list of module names", "name them in lora_target_modules, and set lora_target_linear: false")  # fmt: skip
        return
    layers, ends = "|".join(str(int(number)) for number in numbers), "|".join(map(re.escape, named))
    lists = names(draft.source.get("peft_layers_pattern") or [])
    # Without a list's name PEFT takes the first number in a module's name.
    before = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, lists))})\." if lists else r"(?:[^.]*[^.\d][^.]*\.){2,}"
    draft.put("lora_target", rf"{before}(?:{layers})\.(?:.*\.)?(?:{ends})", "lora_target_modules", "in the layers of peft_layers_to_transform")  # fmt: skip
    if lists:
        draft.leave("peft_layers_pattern", "it stands in lora_target")


def _model(draft: ImportDraft) -> None:
    drawn_by_seed(draft, "reinit_weights")
    for key in ("tokenizer_config", "base_model_config"):
        other = draft.source.get(key)
        if other is None:
            continue
        if other == draft.source.get("base_model"):
            draft.leave(key, "it is the model's own")
        elif key == "tokenizer_config":
            draft.put("tokenizer_name_or_path", other, key)
        else:
            draft.refuse(key, f"{other}: the config is that of base_model", "write it into the config.json of a copy")
    config = draft.source.get("model_config")
    if config == {"output_router_logits": True}:
        draft.leave("model_config", "the routers' balancing loss of a mixture of experts is always trained here")
    elif config:
        draft.refuse("model_config", "the model's config is taken as it is", "write it into the config.json of a copy")
    tokens = draft.source.get("special_tokens") or {}
    kept = {name: token for name, token in tokens.items() if token and name in ("bos_token", "eos_token", "unk_token")}
    if tokens.get("pad_token"):
        draft.leave("special_tokens.pad_token", "nothing is padded here")
    if tokens.get("additional_special_tokens"):
        draft.put("added_tokens", tokens["additional_special_tokens"], "special_tokens.additional_special_tokens")
    if kept:
        draft.put("special_tokens", kept, "special_tokens")
    elif "special_tokens" in draft.source and not tokens:
        draft.leave("special_tokens", "it is empty")
    for name in draft.source.get("plugins") or []:
        if str(name).rpartition(".")[2] in _HARMLESS_PLUGINS:
            draft.leave(f"plugins {name}", "it makes the same numbers faster or in less memory")
        else:
            draft.refuse("plugins", f"{name}: what it does to training is not known here", "take it out, or " + OTHER)


def _storage(draft: ImportDraft) -> None:
    """How the base's weights are stored: MXFP4 is unpacked when it is read, as `dequantize: true` does there."""
    key, options = "model_quantization_config", "model_quantization_config_kwargs"
    method, given = draft.source.get(key), draft.source.get(options) or {}
    if method == "Mxfp4Config" and given.get("dequantize"):
        draft.leave(key, "experts in MXFP4 are always unpacked to bf16 here")
        draft.leave(options, "they are unpacked")
    elif method:
        draft.refuse(key, f"{method}: the base is trained as stored, in few bits", f"set {key}: Mxfp4Config with dequantize: true, or name a base_model in 16 bits")  # fmt: skip
    elif options in draft.source:
        draft.leave(options, f"it is read with {key} only")


def _training(draft: ImportDraft) -> None:
    sft_losses(draft, {"use_eaft": "eaft"})
    _embedding_lr(draft)
    _muon(draft)
    if "eta_min" in draft.source:
        floor, peak = as_float(draft.source["eta_min"]), draft.keys.get("learning_rate")
        if draft.source.get("optimizer") in OPTIMIZERS:
            draft.leave("eta_min", "Axolotl's cosine does not read it")
        elif peak:
            draft.put("min_lr_ratio", floor / as_float(peak), "eta_min")
    patterns = draft.source.get("unfrozen_parameters") or []
    sliced = [pattern for pattern in patterns if re.search(r"\[\d*:\d*\]$", pattern)]
    if sliced:
        draft.refuse("unfrozen_parameters", f"{sliced[0]}: parameters are trained whole here", "take the slice out")
    elif patterns:
        escaped = [pattern.replace(".", r"\.") for pattern in patterns]
        draft.put("unfrozen_parameters", escaped, "unfrozen_parameters", "a dot is a dot there")
    _offloading(draft)
    if "adam_eps" in draft.source:
        draft.leave("adam_eps", "Axolotl reads adam_epsilon, and ignores this name")


def _embedding_lr(draft: ImportDraft) -> None:
    """A learning rate of the embeddings' own, where they are trained."""
    trained = draft.keys.get("adapter", "none") == "none" or draft.keys.get("lora_modules_to_save")
    peak = draft.keys.get("learning_rate")
    for key in ("embedding_lr", "embedding_lr_scale"):
        value = draft.number(key)
        if value and trained and (key == "embedding_lr_scale" or peak):
            draft.put("embedding_lr_scale", value if key == "embedding_lr_scale" else value / as_float(peak), key)
        elif value is not None:
            draft.leave(key, "it is off" if not value else "neither embedding nor head is trained under this adapter")


_MESHES = ("fsdp", "fsdp_config", "dp_shard_size", "dp_replicate_size", "tensor_parallel_size", "context_parallel_size")
"""Keys under which Axolotl's processes form a mesh, for which it has a Muon of another scale."""


def _muon(draft: ImportDraft) -> None:
    if draft.source.get("optimizer") != "muon":
        return
    if mesh := next((key for key in _MESHES if draft.asks(key) and draft.source[key] != 1), None):
        draft.put("muon_adjust_lr", "spectral_norm", "optimizer", f"with {mesh} muon is another one there")
        draft.change(
            "optimizer", "the momentum of muon is Nesterov's here, and with a mesh of processes it is plain there"
        )
        draft.assume("adam_beta1", 0.9)
    else:
        draft.assume("adam_beta1", 0.95)
    draft.assume("adam_beta2", 0.95)


def _order(draft: ImportDraft) -> None:
    """Rows are merged in an order, and their order is drawn anew each epoch unless `curriculum_sampling` takes them as they were merged."""
    ordered = draft.keys.get("train_sampling_strategy") == "sequential"
    if ordered and draft.source.get("shuffle_merged_datasets", True):
        draft.refuse("curriculum_sampling", "true with shuffle_merged_datasets: rows come once shuffled, and in that order each epoch", "set shuffle_merged_datasets: false for the order of the files, or take it out")  # fmt: skip
    elif draft.source.get("shuffle_merged_datasets") is False and draft.keys.get("streaming"):
        draft.put(
            "train_sampling_strategy",
            "sequential",
            "shuffle_merged_datasets",
            "streamed rows come as they are read there",
        )
    elif "shuffle_merged_datasets" in draft.source:
        draft.leave(
            "shuffle_merged_datasets",
            "curriculum_sampling says it" if ordered else "an epoch's order is drawn all the same",
        )


def _offloading(draft: ImportDraft) -> None:
    if not draft.asks("layer_offloading"):
        if "layer_offloading" in draft.source:
            draft.leave("layer_offloading", "it is off")
    elif draft.keys.get("adapter", "none") == "none" or not draft.keys.get("gradient_checkpointing"):
        draft.leave(
            "layer_offloading", "here it needs an adapter and gradient_checkpointing, and no number changes with it"
        )
    else:
        draft.put("layer_offloading", True, "layer_offloading")


def defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What Axolotl does where its file is silent."""
    filled: dict[str, Any] = {"per_device_train_batch_size": 1, **adapter_defaults(draft, 8, 8)}
    if not {"warmup_steps", "warmup_ratio"} & set(draft.keys):
        filled["warmup_ratio"] = 0.03
    filled["lr_scheduler_type"] = "cosine"
    if draft.kind == "dpo":
        filled |= {"beta": 0.1, "loss_type": "sigmoid"}
    if draft.kind == "reward_model":
        filled["overflow"] = "truncate"
    if draft.keys.get("streaming"):
        filled["buffer_size"] = 10_000
    return filled
