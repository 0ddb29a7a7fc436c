"""Keys that were set and do nothing, because of another key: said aloud, not refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from posttrain.config.distill import DistillKeys
from posttrain.config.ebft import EBFTKeys
from posttrain.config.knob import Keys
from posttrain.config.preference import WITHOUT_REFERENCE, DPOKeys, PreferenceKeys
from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.config.rl import GRPOKeys, PolicyGradientKeys, RewardedKeys
from posttrain.config.stages import ModelKeys, RewardModelKeys, SFTKeys, TrainKeys


@dataclass(frozen=True, slots=True)
class NoEffect:
    """`keys` do nothing when `when` holds, because of `why`."""

    model: type[Keys]
    keys: tuple[str, ...]
    when: Callable[[Any], bool]
    why: str


_SHAPE = ("lora_r", "lora_alpha", "lora_target", "lora_modules_to_save", "use_rslora", "use_dora", "init_lora_weights",
          "rank_pattern", "alpha_pattern")  # fmt: skip
_LORA = (*_SHAPE, "lora_dropout", "adapter_start")
_QUANT = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
_KL = ("kl_estimator", "kl_reduction", "kl_in_reward", "use_bias_correction_kl")
_TEACHERS = ("teacher_advantage", "teacher_coef", "teacher_clip", "teacher_warmup_steps", "teacher_decay_steps")


def _loss_is_not(*names: str) -> Callable[[Any], bool]:
    return lambda keys: (
        not set(names).intersection(keys.losses if isinstance(keys, PreferenceKeys) else (keys.loss_type,))
    )


def _loss_is(*names: str) -> Callable[[Any], bool]:
    return lambda keys: keys.loss_type in names


def _has_nothing_to_measure(keys: TrainKeys) -> bool:
    return not keys.eval_names and not keys.eval_suite


def _estimator(keys: GRPOKeys) -> str:
    return keys.loss_type if keys.loss_type in ("rloo", "reinforce_pp") else keys.advantage_estimator


def _is_scaled_by_group(keys: GRPOKeys) -> bool:
    return _estimator(keys) == "group" and keys.multi_objective_aggregation == "sum_then_normalize"


NO_EFFECT: tuple[NoEffect, ...] = (
    NoEffect(TrainKeys, _LORA, lambda k: k.adapter == "none", "adapter is none; set adapter: lora or qlora"),
    NoEffect(TrainKeys, _SHAPE, lambda k: k.adapter != "none" and k.adapter_start == "continue", "adapter_start is continue, and the adapter keeps the form that it was begun with"),
    NoEffect(TrainKeys, _SHAPE, lambda k: k.adapter != "none" and k.adapter_name_or_path is not None, "adapter_name_or_path says it: that adapter keeps the form that it was begun with"),
    NoEffect(TrainKeys, _QUANT, lambda k: not k.load_in_4bit, "the base is not in 4 bits; set adapter: qlora"),
    NoEffect(TrainKeys, ("merge_onto",), lambda k: not k.base_bits, "the base is not in 4 bits, nor in 8; set adapter: qlora, or load_in_8bit: true"),
    NoEffect(TrainKeys, ("unfrozen_parameters", "unfrozen_layers"), lambda k: k.adapter != "none", "an adapter is trained, and all of it"),
    NoEffect(TrainKeys, ("unfrozen_layer_modules",), lambda k: not k.unfrozen_layers, "unfrozen_layers is 0"),
    NoEffect(TrainKeys, ("muon_adjust_lr",), lambda k: k.optim != "muon", "optim is not muon"),
    NoEffect(TrainKeys, ("num_train_epochs",), lambda k: k.max_steps > 0, "max_steps decides; set max_steps: -1 to count epochs"),
    NoEffect(TrainKeys, ("warmup_ratio",), lambda k: k.warmup_steps > 0, "warmup_steps decides"),
    NoEffect(TrainKeys, ("min_lr_ratio",), lambda k: k.lr_scheduler_type == "constant", "lr_scheduler_type is constant"),
    NoEffect(TrainKeys, ("lr_decay_ratio",), lambda k: k.lr_scheduler_type == "constant", "lr_scheduler_type is constant"),
    NoEffect(TrainKeys, ("lr_num_cycles",), lambda k: k.lr_scheduler_type != "cosine_with_restarts", "lr_scheduler_type is not cosine_with_restarts"),
    NoEffect(TrainKeys, ("lr_power",), lambda k: k.lr_scheduler_type != "polynomial", "lr_scheduler_type is not polynomial"),
    NoEffect(TrainKeys, ("warmup_type",), lambda k: not k.warmup_steps and not k.warmup_ratio, "there is no warmup"),
    NoEffect(TrainKeys, ("adam_beta1", "adam_beta2"), lambda k: k.optim in ("adafactor", "sgd"), "optim has no betas"),
    NoEffect(TrainKeys, ("adam_epsilon",), lambda k: k.optim in ("lion", "lion_8bit", "paged_lion_8bit", "adafactor", "sgd"), "optim does not use it"),
    NoEffect(TrainKeys, ("eval_suite_limit",), lambda k: k.eval_suite is None, "there is no eval_suite"),
    NoEffect(TrainKeys, ("metric_for_best_model", "greater_is_better"), lambda k: not k.load_best_model_at_end, "load_best_model_at_end is false"),
    NoEffect(SFTKeys, ("eval_steps", "load_best_model_at_end"), _has_nothing_to_measure, "there are no eval_datasets, no val_size and no eval_suite"),
    NoEffect(SFTKeys, ("packing_window", "packing_strategy"), lambda k: not k.packing, "packing is false"),
    NoEffect(SFTKeys, ("overflow",), lambda k: k.is_wrapped, "packing_strategy is wrapped, which cuts rows wherever a block ends"),
    NoEffect(SFTKeys, ("packing_window",), lambda k: k.train_sampling_strategy == "sequential", "train_sampling_strategy is sequential, and rows are packed as they come"),
    NoEffect(SFTKeys, ("packing_window",), lambda k: k.streaming, "streaming is true, and buffer_size says it"),
    NoEffect(SFTKeys, ("dataset_num_proc",), lambda k: k.streaming and not k.eval_datasets, "streaming is true: rows are tokenised as they are trained on"),
    NoEffect(SFTKeys, ("buffer_size",), lambda k: not k.streaming, "streaming is false"),
    NoEffect(DPOKeys, ("eval_steps", "load_best_model_at_end"), _has_nothing_to_measure, "there are no eval_datasets, no val_size and no eval_suite"),
    NoEffect(RewardModelKeys, ("eval_steps", "load_best_model_at_end"), _has_nothing_to_measure, "there are no eval_datasets and no val_size"),
    NoEffect(ProcessRewardModelKeys, ("eval_steps", "load_best_model_at_end"), _has_nothing_to_measure, "there are no eval_datasets and no val_size"),
    NoEffect(PreferenceKeys, ("label_smoothing",), _loss_is_not("sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "dpop", "cpo", "simpo"), "loss_type does not use it"),
    NoEffect(PreferenceKeys, ("discopop_tau",), _loss_is_not("discopop"), "loss_type is not discopop"),
    NoEffect(PreferenceKeys, ("f_alpha_divergence_coef",), lambda k: k.f_divergence_type != "alpha_divergence", "f_divergence_type is not alpha_divergence"),
    NoEffect(DPOKeys, ("ref_model_mixup_alpha", "ref_model_sync_steps"), lambda k: not k.sync_ref_model, "sync_ref_model is false"),
    NoEffect(PreferenceKeys, ("dpop_lambda",), _loss_is_not("dpop"), "loss_type is not dpop"),
    NoEffect(PreferenceKeys, ("f_divergence_type", "ld_alpha"), lambda k: k.losses == ("sft",), "loss_type is sft"),
    NoEffect(PreferenceKeys, ("simpo_gamma",), _loss_is_not("simpo"), "loss_type is not simpo"),
    NoEffect(PreferenceKeys, ("cpo_alpha",), _loss_is_not("cpo"), "loss_type is not cpo"),
    NoEffect(DPOKeys, ("desirable_weight", "undesirable_weight"), _loss_is_not("kto"), "loss_type is not kto"),
    NoEffect(DPOKeys, ("beta",), lambda k: k.losses == ("sft",), "loss_type is sft"),
    NoEffect(DPOKeys, ("precompute_ref_log_probs",), lambda k: WITHOUT_REFERENCE.issuperset(k.losses), "loss_type has no reference"),
    NoEffect(RewardedKeys, ("gradient_accumulation_steps", "num_processes"), lambda k: True, "a step of RL takes num_prompts_per_step × num_generations / steps_per_generation completions, however many processes share them"),
    NoEffect(DistillKeys, ("gradient_accumulation_steps", "num_processes"), lambda k: True, "a step takes num_prompts_per_step × num_generations completions, however many processes share them"),
    NoEffect(DistillKeys, ("jsd_beta",), _loss_is_not("jsd"), "loss_type is not jsd"),
    NoEffect(DistillKeys, ("teacher_top_k",), _loss_is_not("opd"), "loss_type is not opd"),
    NoEffect(DistillKeys, ("eval_steps", "load_best_model_at_end"), _has_nothing_to_measure, "there are no eval_datasets, no val_size and no eval_suite"),
    NoEffect(EBFTKeys, ("gradient_accumulation_steps", "num_processes"), lambda k: True, "a step takes num_prompts_per_step rows, with num_generations completions for each answer or anchor, however many processes share them"),
    NoEffect(EBFTKeys, ("stride", "context_length", "min_completion_prefix"), lambda k: k.mode != "strided", "mode is structured; set mode: strided"),
    NoEffect(EBFTKeys, ("unbiased_baseline",), lambda k: not k.diversity_coef, "diversity_coef is 0"),
    NoEffect(EBFTKeys, ("scale_rewards", "advantage_eps"), lambda k: k.advantage_estimator == "rloo", "leave-one-out advantages are not divided"),
    NoEffect(EBFTKeys, ("advantage_eps",), lambda k: k.advantage_estimator == "group" and k.scale_rewards == "none", "scale_rewards is none, so nothing is divided"),
    NoEffect(EBFTKeys, ("eval_steps", "load_best_model_at_end"), _has_nothing_to_measure, "there are no eval_datasets, no val_size and no eval_suite"),
    NoEffect(PolicyGradientKeys, _KL, lambda k: k.beta == 0, "beta is 0, so there is no KL to the reference"),
    NoEffect(PolicyGradientKeys, ("kl_reduction",), lambda k: k.kl_in_reward and k.beta > 0, "the KL is in the reward"),
    NoEffect(RewardedKeys, ("ptx_coef", "ptx_rows_per_step"), lambda k: not k.ptx_datasets, "there are no ptx_datasets"),
    NoEffect(PolicyGradientKeys, ("use_bias_correction_kl",), lambda k: k.kl_in_reward and k.beta > 0, "the KL is in the reward"),
    NoEffect(GRPOKeys, _TEACHERS, lambda k: not k.teachers, "there are no teachers"),
    NoEffect(GRPOKeys, ("teacher_clip",), lambda k: bool(k.teachers) and k.teacher_advantage != "rlsd", "teacher_advantage is not rlsd"),
    NoEffect(RewardedKeys, ("thinking_budget_spread", "interruption"), lambda k: k.thinking_budget is None, "there is no thinking_budget"),
    NoEffect(RewardedKeys, ("dynamic_sampling_max_rounds",), lambda k: not k.dynamic_sampling, "dynamic_sampling is false"),
    NoEffect(GRPOKeys, ("sapo_temperature_pos", "sapo_temperature_neg"), _loss_is_not("sapo"), "loss_type is not sapo"),
    NoEffect(GRPOKeys, ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"), _loss_is_not("clip_cov"), "loss_type is not clip_cov"),
    NoEffect(GRPOKeys, ("kl_cov_ratio", "ppo_kl_coef"), _loss_is_not("kl_cov"), "loss_type is not kl_cov"),
    NoEffect(GRPOKeys, ("loss_type", "kl_cov_ratio", "ppo_kl_coef"), lambda k: k.loss_type == "kl_cov" and k.steps_per_batch == 1 and k.rollout.engine == "embedded" and not k.rollout.max_staleness, "what is trained on was sampled with the weights that are trained, which are no way from themselves: kl_cov is then the plain policy gradient; set num_iterations or steps_per_generation to 2 or more"),
    NoEffect(GRPOKeys, ("gamma",), lambda k: k.credit == "episode", "credit is episode; set credit: turn or step"),
    NoEffect(PolicyGradientKeys, ("importance_sampling_cap",), lambda k: k.importance_sampling_correction == "off", "importance_sampling_correction is off"),
    NoEffect(GRPOKeys, ("advantage_estimator",), _loss_is("rloo", "reinforce_pp"), "loss_type brings its own"),
    NoEffect(GRPOKeys, ("scale_rewards",), lambda k: not _is_scaled_by_group(k), "only advantage_estimator: group with sum_then_normalize is scaled by it"),
    NoEffect(GRPOKeys, ("advantage_eps",), lambda k: _is_scaled_by_group(k) and k.scale_rewards == "none", "scale_rewards is none, so nothing is divided"),
    NoEffect(GRPOKeys, ("advantage_eps",), lambda k: _estimator(k) == "rloo", "leave-one-out advantages are not divided"),
    NoEffect(GRPOKeys, ("epsilon",), _loss_is("cispo", "sapo", "kl_cov"), "loss_type does not use it"),
    NoEffect(GRPOKeys, ("epsilon_high",), _loss_is("sapo", "kl_cov"), "loss_type does not use it"),
    NoEffect(GRPOKeys, ("delta",), _loss_is("cispo", "sapo"), "loss_type does not use it"),
    NoEffect(GRPOKeys, ("importance_sampling_level",), _loss_is("gspo", "gmpo", "dppo", "clip_cov", "kl_cov", "rloo"), "loss_type brings its own ratio"),
    NoEffect(PolicyGradientKeys, ("off_policy_mask_threshold",), lambda k: k.steps_per_generation * k.num_iterations == 1 and k.rollout.engine == "embedded" and not k.rollout.max_staleness, "what is trained on was sampled with the weights that are trained"),
    NoEffect(PolicyGradientKeys, ("epsilon", "epsilon_high", "delta"), lambda k: k.steps_per_generation * k.num_iterations == 1, "each generation batch is trained on in one step, so the importance ratio is 1; see steps_per_generation and num_iterations"),
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
