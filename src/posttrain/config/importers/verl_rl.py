"""verl's GRPO and PPO (`verl.trainer.main_ppo`): batches, advantages, losses, the KL, the critic and rewards.

It counts steps in generation batches, we in optimizer steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, as_float, flag
from posttrain.config.importers.nested import part_of
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.verl_data import read_files, settle

_ACTOR = "actor_rollout_ref.actor"
_ESTIMATORS: dict[str, str] = {"grpo": "group", "rloo": "rloo"}
_REDUCTIONS = {"token-mean": "dapo", "seq-mean-token-mean": "grpo"}
"""How tokens add up under the clipped surrogate of token ratios → the loss that is so here."""
_KL_REDUCTIONS = {"token-mean": "token_mean", "seq-mean-token-sum": "sequence_sum_mean", "seq-mean-token-mean": "sequence_mean_of_token_mean"}  # fmt: skip
_MODES = {"vanilla": None, "gspo": "gspo", "geo_mean": "gmpo", "clip_cov": "clip_cov", "kl_cov": "kl_cov"}
_COVARIANCE = {"clip_cov": ("clip_cov_ratio", "clip_cov_lb", "clip_cov_ub"), "kl_cov": ("kl_cov_ratio", "ppo_kl_coef")}
_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
_CLIP = 3.0
_WHITENED = "its advantages are whitened token by token, which weighs long completions more"
_ALIKE: dict[str, Any] = {
    "optim.lr_warmup_steps_ratio": 0.0, "optim.lr_warmup_steps": -1, "optim.min_lr_ratio": 0.0, "optim.weight_decay": 0.01, "optim.betas": [0.9, 0.999], "optim.optimizer": "AdamW",
    "optim.warmup_style": "constant", "optim.lr_scheduler_type": "constant", "grad_clip": 1.0, "ppo_mini_batch_size": None, "ppo_epochs": None, "loss_agg_mode": None,
}  # fmt: skip
"""Keys that the critic has beside the policy's, and their defaults; None where it takes the policy's."""
_WRITTEN = "write a file with `from verl.utils.reward_score import default_compute_score as compute_score`, where verl is installed, or with a function of your own, and name it in custom_reward_function.path"  # fmt: skip


def read_rl(draft: ImportDraft) -> None:
    """All that several keys say together."""
    _batch(draft)
    _lengths(draft)
    _schedule(draft)
    _advantages(draft)
    _surrogate(draft)
    _kl(draft)
    _correction(draft)
    _router_replay(draft)
    _rewards(draft)
    _overlong(draft)
    if draft.kind == "ppo":
        _critic(draft)
    else:
        for name in ("model.path", *_ALIKE):
            if f"critic.{name}" in draft.source:
                draft.leave(f"critic.{name}", f"there is no critic in {draft.kind}")
    _prompts(draft)


def _batch(draft: ImportDraft) -> None:
    prompts, mini_key = draft.size("data.train_batch_size", 1024), f"{_ACTOR}.ppo_mini_batch_size"
    mini = draft.size(mini_key, 256)
    settle(draft, "num_prompts_per_step", prompts, "data.train_batch_size")
    if prompts % mini:
        draft.refuse(mini_key, f"{prompts} prompts are no whole steps of {mini}", "set it to a divisor of data.train_batch_size")  # fmt: skip
        return
    settle(draft, "steps_per_generation", prompts // mini, mini_key, f"steps of {mini} prompts")
    if draft.kind == "grpo" and draft.size("actor_rollout_ref.rollout.n", 1) < 2:
        draft.refuse("actor_rollout_ref.rollout.n", "1: a completion is compared with others of its prompt", "set it to 2 or more")  # fmt: skip
    if "data.micro_batch_size_per_gpu" in draft.source:
        draft.leave("data.micro_batch_size_per_gpu", "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu says it")


def _steps_per_batch(draft: ImportDraft) -> int:
    return int(draft.keys.get("steps_per_generation", 1)) * int(as_float(draft.keys.get("num_iterations", 1)))


def _lengths(draft: ImportDraft) -> None:
    prompt, answer = "data.max_prompt_length", "data.max_response_length"
    longest, asked = draft.size(answer, 512), draft.size(prompt, 512)
    settle(draft, "max_completion_length", longest, answer)
    settle(draft, "sequence_len", asked + longest, prompt, "a prompt with its completion")
    again = "actor_rollout_ref.rollout.prompt_length"
    if again in draft.source and draft.size(again, asked) != asked:
        draft.refuse(again, f"{draft.source[again]}: a prompt's length is that of data", "set data.max_prompt_length")
    elif again in draft.source:
        draft.leave(again, "data.max_prompt_length says it")


def _schedule(draft: ImportDraft) -> None:
    """Steps of theirs are generation batches."""
    times, optimizer = _steps_per_batch(draft), f"{_ACTOR}.optim"
    note = f"of {times} optimizer steps each" if times > 1 else ""
    for key, ours, none in (
        ("trainer.total_training_steps", "max_steps", -1),
        ("trainer.save_freq", "save_steps", 0),
        ("trainer.test_freq", "eval_steps", 0),
        (f"{optimizer}.lr_warmup_steps", "warmup_steps", 0),
    ):
        number = draft.number(key)
        if number is not None:
            draft.put(ours, int(number) * times if number > 0 else none, key, note if number > 0 else "")
    ratio = f"{optimizer}.lr_warmup_steps_ratio"
    if ratio in draft.source:
        draft.put("warmup_ratio", as_float(draft.source[ratio]), ratio)
    if "max_steps" not in draft.keys:
        settle(draft, "max_steps", -1, "trainer.total_epochs", "the passes say when it ends")
    warming = draft.number("trainer.critic_warmup")
    if warming is not None and draft.kind == "ppo":
        # There the policy learns from the batch of that number on, counted from 1.
        draft.put("critic_warmup_steps", max(0, int(warming) - 1) * times, "trainer.critic_warmup", note)
    elif warming is not None:
        draft.leave("trainer.critic_warmup", f"there is no critic in {draft.kind}")


def _advantages(draft: ImportDraft) -> None:
    key, scaled = "algorithm.adv_estimator", "algorithm.norm_adv_by_std_in_grpo"
    asked = draft.source.get(key, "gae")
    if draft.kind == "ppo":
        if key in draft.source:
            draft.leave(key, "gae is ppo")
        if scaled in draft.source:
            draft.leave(scaled, "it plays no part in ppo")
        return
    if asked in _ESTIMATORS:
        draft.put("advantage_estimator", _ESTIMATORS[asked], key)
    elif str(asked).startswith("reinforce_plus_plus"):
        draft.refuse(key, f"{asked}: {_WHITENED}", "set grpo or rloo, or write a YAML with advantage_estimator: reinforce_pp, which whitens completions")  # fmt: skip
    else:
        draft.refuse(key, f"{asked}: no such advantage here", f"set one of gae, {', '.join(_ESTIMATORS)}")
    if asked == "grpo":
        settle(draft, "scale_rewards", "group" if flag(draft.source.get(scaled, True)) else "none", scaled)
        settle(draft, "advantage_eps", 1e-6, key, "added to the std there")
    elif scaled in draft.source:
        draft.leave(scaled, f"it plays no part with {asked}")


def _surrogate(draft: ImportDraft) -> None:
    mode_key, sum_key = f"{_ACTOR}.policy_loss.loss_mode", f"{_ACTOR}.loss_agg_mode"
    mode, adding = draft.source.get(mode_key, "vanilla"), draft.source.get(sum_key, "token-mean")
    if mode not in _MODES or (draft.kind == "ppo" and mode != "vanilla"):
        draft.refuse(mode_key, f"{mode}: no such loss in {draft.kind}", "set vanilla" + (", gspo, geo_mean, clip_cov or kl_cov" if draft.kind == "grpo" else ""))  # fmt: skip
        return
    # GSPO and GMPO add up their own way; it then says how the KL does.
    only_tokens = draft.kind == "ppo" or mode in _COVARIANCE
    known = {"token-mean"} if only_tokens else _REDUCTIONS if mode == "vanilla" else _KL_REDUCTIONS
    if adding not in known:
        why = "it divides by another constant from release to release" if "norm" in str(adding) else "no such mean here"
        todo = "set token-mean" if only_tokens else "set token-mean, or write a YAML with loss_type: dr_grpo"
        draft.refuse(sum_key, f"{adding}: {why}", todo)
        return
    if draft.kind == "grpo":
        settle(
            draft, "loss_type", _MODES[mode] or _REDUCTIONS[adding], mode_key if mode_key in draft.source else sum_key
        )
    for key in (mode_key, sum_key):
        if key in draft.source and (draft.kind == "ppo" or key != draft.came_from["loss_type"]):
            draft.leave(key, "loss_type says it" if draft.kind == "grpo" else "it is PPO's clipped surrogate, a mean over tokens")  # fmt: skip
    _clip(draft, dual=mode == "vanilla")
    for key, name in ((key, name) for name, keys in _COVARIANCE.items() for key in keys):
        place = f"{_ACTOR}.policy_loss.{key}"
        if place in draft.source and name == mode:
            draft.put(key, as_float(draft.source[place]), place)
        elif place in draft.source:
            draft.leave(place, f"it is read with loss_mode {name} only")
    weight = draft.number(f"{_ACTOR}.entropy_coeff")
    if weight and adding != "token-mean":
        draft.refuse(f"{_ACTOR}.entropy_coeff", f"{weight:g} with {adding}: the entropy is a mean over tokens here", "set loss_agg_mode: token-mean, or 0")  # fmt: skip
    elif weight is not None:
        draft.put("entropy_coef", weight, f"{_ACTOR}.entropy_coeff")


def _clip(draft: ImportDraft, *, dual: bool) -> None:
    both, third = f"{_ACTOR}.clip_ratio", f"{_ACTOR}.clip_ratio_c"
    sides = [f"{_ACTOR}.clip_ratio_{side}" for side in ("low", "high")]
    if both in draft.source and all(side in draft.source for side in sides):
        draft.leave(both, "clip_ratio_low and clip_ratio_high are read")
    elif both in draft.source and as_float(draft.source[both]) == draft.keys.get("epsilon", 0.2) == draft.keys.get("epsilon_high", 0.2):  # fmt: skip
        draft.put("epsilon", as_float(draft.source[both]), both)
    elif both in draft.source:
        draft.refuse(both, f"{draft.source[both]} without both sides: newer releases then clip at 0.2, older ones at this", "set clip_ratio_low and clip_ratio_high")  # fmt: skip
    high = as_float(draft.keys.get("epsilon_high") or draft.keys.get("epsilon", 0.2))
    bound = as_float(draft.source.get(third, _CLIP))
    if not dual:
        if third in draft.source:
            draft.leave(third, "it is read with loss_mode vanilla only")
    elif bound <= 1 + high:
        draft.refuse(third, f"{bound:g}: a second clip inside the first", f"set it above {1 + high:g}")
    else:
        settle(draft, "delta", bound, third)


def _kl(draft: ImportDraft) -> None:
    """In the loss, or in the reward; the weight of both is one key here."""
    loss, reward = f"{_ACTOR}.use_kl_loss", "algorithm.use_kl_in_reward"
    weight, kind = f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type"
    control = "algorithm.kl_ctrl"
    if draft.asks(loss) and draft.asks(reward):
        draft.refuse(reward, f"true with {loss}: a KL is in the loss or in the reward here", "keep one")
        return
    read: dict[str, str] = {}
    if draft.asks(loss):
        settle(draft, "beta", as_float(draft.source.get(weight, 0.001)), weight)
        asked = str(draft.source.get(kind, "low_var_kl"))
        if asked in _KL:
            settle(draft, "kl_estimator", _KL[asked], kind)
        else:
            draft.refuse(kind, f"{asked}: no such estimator here", f"set one of {', '.join(_KL)}")
        draft.put("kl_in_reward", False, loss)
        draft.put("use_bias_correction_kl", False, loss, "no ratio weighs the KL there")
        adding = str(draft.source.get(f"{_ACTOR}.loss_agg_mode", "token-mean"))
        if draft.keys.get("loss_type") in ("gspo", "gmpo"):
            draft.put("kl_reduction", _KL_REDUCTIONS[adding], f"{_ACTOR}.loss_agg_mode", "of the KL")
        read = {weight: "", kind: ""}
    elif draft.asks(reward):
        settle(draft, "beta", as_float(draft.source.get(f"{control}.kl_coef", 0.001)), f"{control}.kl_coef")
        draft.put("kl_in_reward", True, reward)
        if (asked := str(draft.source.get("algorithm.kl_penalty", "kl"))) not in ("kl", "k1"):
            draft.refuse("algorithm.kl_penalty", f"{asked}: a KL in the reward is k1 here", "set kl")
        if (asked := draft.source.get(f"{control}.type", "fixed")) != "fixed":
            draft.refuse(f"{control}.type", f"{asked}: it is steered in another way here", "set fixed, or kl_target in a YAML of ours")  # fmt: skip
        read = dict.fromkeys((f"{control}.kl_coef", f"{control}.type", "algorithm.kl_penalty"), "")
    for key in (loss, reward, weight, kind, f"{control}.kl_coef", f"{control}.type", "algorithm.kl_penalty"):
        if key in draft.source and key not in read and key not in draft.came_from.values():
            draft.leave(key, "no KL is asked for by it")


def _correction(draft: ImportDraft) -> None:
    key = f"{_ACTOR}.tis_imp_ratio_cap"
    cap = draft.number(key)
    if cap is None:
        return
    if cap > 1:
        draft.put("importance_sampling_correction", "token_truncate", key)
        draft.put("importance_sampling_cap", cap, key)
    else:
        draft.leave(key, "it is off")


def _router_replay(draft: ImportDraft) -> None:
    key = f"{_ACTOR}.router_replay.mode"
    mode = draft.source.get(key)
    if mode is None:
        return
    if mode == "R3":
        draft.put("rollout", {"routed_experts": "replay"}, key)
    elif mode == "disabled":
        draft.leave(key, "experts are chosen anew at each pass here too")
    else:
        draft.refuse(key, "the choices of the trainer's own earlier pass are not replayed, those of the sampler are", "set R3 or disabled")  # fmt: skip


def _rewards(draft: ImportDraft) -> None:
    """A reward model, or a function; what verl picks by a row's data_source is not here."""
    enabled, model = "reward_model.enable", "reward_model.model.path"
    place = "reward." if "reward.custom_reward_function.path" in draft.source else ""
    path, name = f"{place}custom_reward_function.path", f"{place}custom_reward_function.name"
    options = f"{place}custom_reward_function.reward_kwargs"
    kwargs = part_of(draft.source, options)
    if draft.asks(enabled):
        if not draft.asks(model):
            draft.refuse(model, "missing: it is another model's folder there", "name the reward model")
        draft.put("reward_funcs", [f"model:{local_file(draft, str(draft.source.get(model)))}"], model, "its score is the reward")  # fmt: skip
        for key in (enabled, path, name):
            if key in draft.source:
                draft.leave(key, "the reward model alone is asked" if key != enabled else "reward_funcs says it")
        return
    for key in (enabled, model):
        if key in draft.source:
            draft.leave(key, "there is no reward model")
    if not draft.asks(path):
        draft.refuse(path, "missing: a reward of verl's own is then chosen by each row's data_source (openai/gsm8k, math …), which is not here", _WRITTEN)  # fmt: skip
        return
    function = str(draft.source.get(name, "compute_score"))
    draft.put("reward_funcs", [f"{local_file(draft, str(draft.source[path]))}:{function}"], path, "called as verl calls it")  # fmt: skip
    if name in draft.source:
        draft.leave(name, "reward_funcs names it")
    if kwargs:
        draft.put("reward_kwargs", {function: kwargs}, f"{options}.*")


def _overlong(draft: ImportDraft) -> None:
    """The penalty on long completions, which the manager `dapo` alone takes."""
    manager = str(draft.source.get("reward_model.reward_manager", draft.source.get("reward.reward_manager.name", "naive")))  # fmt: skip
    for place in ("reward_model.overlong_buffer", "reward_model.reward_kwargs.overlong_buffer_cfg"):
        length, factor = f"{place}.len", f"{place}.penalty_factor"
        if not draft.asks(f"{place}.enable"):
            for key in (f"{place}.enable", length, factor):
                if key in draft.source:
                    draft.leave(key, "no penalty is asked for")
        elif manager != "dapo":
            _not_read(draft, place, manager)
        elif as_float(draft.source.get(factor, 1.0)) != 1:
            draft.refuse(factor, f"{draft.source[factor]}: the penalty ends at -1 here", "set 1.0")
        else:
            draft.put("soft_overlong_cache", int(as_float(draft.source[length])), length)


def _not_read(draft: ImportDraft, place: str, manager: str) -> None:
    if "reward_kwargs" in place:
        draft.refuse(f"{place}.enable", f"true: the reward manager {manager} takes no such argument, and verl stops", "set reward_manager to dapo, or take it out")  # fmt: skip
        return
    for key in ("enable", "len", "penalty_factor"):
        if f"{place}.{key}" in draft.source:
            draft.leave(f"{place}.{key}", f"the reward manager {manager} does not read it")


def _critic(draft: ImportDraft) -> None:
    """It shares the policy's schedule and batches; its head begins at 0, there at random."""
    path, own = draft.source.get("critic.model.path"), draft.keys.get("base_model")
    if path is None:
        draft.refuse("critic.model.path", "missing: it is another model's folder there", "name the model that the critic starts from")  # fmt: skip
    elif path == own:
        draft.change("critic.model.path", "the policy's own base: its head begins at 0 here, at random there")
    else:
        draft.put("value_model", local_file(draft, str(path)), "critic.model.path")
    for name, default in _ALIKE.items():
        ours, theirs = draft.source.get(f"{_ACTOR}.{name}", default), draft.source.get(f"critic.{name}")
        # What is inherited from the policy where it is silent has no default of its own.
        theirs = (ours if default is None else default) if theirs is None else theirs
        if ours is not None and not same_setting(ours, theirs):
            draft.refuse(f"critic.{name}", f"{theirs} beside the policy's {ours}: a critic has the policy's here", "set both alike")  # fmt: skip
        elif f"critic.{name}" in draft.source:
            draft.leave(f"critic.{name}", "it is the policy's own")


def same_setting(one: Any, other: Any) -> bool:
    try:
        return as_float(one) == as_float(other)
    except (TypeError, ValueError):
        return one == other


def _prompts(draft: ImportDraft) -> None:
    columns = {"ground_truth": "reward_model.ground_truth"}
    prompt, source = draft.source.get("data.prompt_key", "prompt"), draft.source.get("data.reward_fn_key", "data_source")  # fmt: skip
    columns |= {"prompt": str(prompt)} if prompt != "prompt" else {}
    columns |= {"data_source": str(source)} if source != "data_source" else {}
    read_files(draft, {"type": "prompt", "columns": columns})


def rl_defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What main_ppo does where its command is silent."""
    filled: dict[str, Any] = {"num_train_epochs": 30.0}
    if draft.kind == "ppo":
        filled |= {"gae_lambda": 1.0, "cliprange_value": 0.5, "vf_coef": 1.0, "kl_in_reward": False}
    return filled
