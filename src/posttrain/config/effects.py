"""Keys that were set and do nothing, because of another key: said aloud, not refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.config.stages import DPOKeys, GRPOKeys, ModelKeys, SFTKeys, TrainKeys


@dataclass(frozen=True, slots=True)
class NoEffect:
    """`keys` do nothing when `when` holds, because of `why`."""

    model: type[ModelKeys]
    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    why: str


_LORA = ("lora_r", "lora_alpha", "lora_dropout", "lora_target", "lora_modules_to_save", "use_rslora", "use_dora",
         "init_lora_weights", "rank_pattern", "alpha_pattern")  # fmt: skip
_QUANT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "merge_onto")
_KL = ("kl_estimator", "kl_in_reward", "use_bias_correction_kl")


def _loss_is_not(*names: str) -> Callable[[Any], bool]:
    return lambda keys: keys.loss_type not in names


NO_EFFECT: tuple[NoEffect, ...] = (
    NoEffect(TrainKeys, _LORA, lambda k: k.adapter == "none", "adapter is none; set adapter: lora or qlora"),
    NoEffect(TrainKeys, _QUANT, lambda k: not k.load_in_4bit, "the base is not in 4 bits; set adapter: qlora"),
    NoEffect(TrainKeys, ("num_train_epochs",), lambda k: k.max_steps > 0, "max_steps decides; set max_steps: -1 to count epochs"),
    NoEffect(TrainKeys, ("warmup_ratio",), lambda k: k.warmup_steps > 0, "warmup_steps decides"),
    NoEffect(TrainKeys, ("min_lr_ratio",), lambda k: k.lr_scheduler_type == "constant", "lr_scheduler_type is constant"),
    NoEffect(TrainKeys, ("eval_suite_limit",), lambda k: k.eval_suite is None, "there is no eval_suite"),
    NoEffect(SFTKeys, ("eval_steps", "load_best_model_at_end"), lambda k: not k.eval_datasets and not k.eval_suite, "there are no eval_datasets and no eval_suite"),
    NoEffect(SFTKeys, ("packing_window",), lambda k: not k.packing, "packing is false"),
    NoEffect(DPOKeys, ("eval_steps", "load_best_model_at_end"), lambda k: not k.eval_datasets and not k.eval_suite, "there are no eval_datasets and no eval_suite"),
    NoEffect(DPOKeys, ("label_smoothing",), _loss_is_not("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "cpo", "simpo"), "loss_type does not use it"),
    NoEffect(DPOKeys, ("discopop_tau",), _loss_is_not("discopop"), "loss_type is not discopop"),
    NoEffect(DPOKeys, ("simpo_gamma",), _loss_is_not("simpo"), "loss_type is not simpo"),
    NoEffect(DPOKeys, ("cpo_alpha",), _loss_is_not("cpo"), "loss_type is not cpo"),
    NoEffect(DPOKeys, ("desirable_weight", "undesirable_weight"), _loss_is_not("kto"), "loss_type is not kto"),
    NoEffect(DPOKeys, ("beta",), lambda k: k.loss_type == "sft", "loss_type is sft"),
    NoEffect(DPOKeys, ("precompute_ref_log_probs",), lambda k: k.loss_type in ("simpo", "cpo", "orpo", "sft"), "loss_type has no reference"),
    NoEffect(GRPOKeys, _KL, lambda k: k.beta == 0, "beta is 0, so there is no KL to the reference"),
    NoEffect(GRPOKeys, ("use_bias_correction_kl",), lambda k: k.kl_in_reward and k.beta > 0, "the KL is in the reward"),
    NoEffect(GRPOKeys, ("dynamic_sampling_max_rounds",), lambda k: not k.dynamic_sampling, "dynamic_sampling is false"),
    NoEffect(GRPOKeys, ("sapo_temperature_pos", "sapo_temperature_neg"), _loss_is_not("sapo"), "loss_type is not sapo"),
    NoEffect(GRPOKeys, ("importance_sampling_cap",), lambda k: k.importance_sampling_correction == "off", "importance_sampling_correction is off"),
    NoEffect(GRPOKeys, ("multi_objective_aggregation",), lambda k: len(k.reward_funcs) == 1, "there is one reward function"),
    NoEffect(GRPOKeys, ("advantage_eps",), lambda k: k.scale_rewards == "none", "scale_rewards is none, so nothing is divided"),
)  # fmt: skip
"""Which keys need which others."""


def without_effect(keys: ModelKeys, was_set: Callable[[str], bool]) -> list[str]:
    """A note for every key that the user set and that changes nothing."""
    notes: list[str] = []
    for row in NO_EFFECT:
        if isinstance(keys, row.model) and row.when(keys):
            names = [key for key in row.keys if was_set(key)]
            if names:
                notes.append(f"{', '.join(names)}: no effect, because {row.why}")
    return notes
