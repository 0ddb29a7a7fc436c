"""OpenRLHF's RL (`openrlhf.cli.train_ppo_ray`): batches, lengths, advantages, losses, the KL, the critic and rewards.

It counts steps in generation batches, we in optimizer steps. Read as its releases from 0.8 on: older ones whiten RLOO's advantages too.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.config.importers.fates import ImportDraft, as_float, is_off, show_short
from posttrain.config.importers.openrlhf_data import given, read_prompts
from posttrain.config.importers.openrlhf_rows import ADVANTAGE, ALIKE
from posttrain.config.importers.paths import local_file
from posttrain.config.importers.sharded import tokens_over
from posttrain.config.importers.verl_data import settle
from posttrain.config.importers.verl_rl import same_setting

_NO_LIMIT = 1e6
_SHAPED = {"group_norm": {"advantage_estimator": "group", "scale_rewards": "group", "advantage_eps": 1e-9}, "dr_grpo": {"advantage_estimator": "group", "scale_rewards": "none"}, "rloo": {"advantage_estimator": "rloo"}}  # fmt: skip
"""Their estimator → keys of grpo. `dr_grpo` is a mean over tokens there too."""
_OURS = "def reward_func(prompts, completions, **columns)"


def is_ppo(source: Mapping[str, Any]) -> bool:
    return next((source[key] for key in ADVANTAGE if key in source), "gae") == "gae"


def read_ppo_ray(draft: ImportDraft) -> None:
    """All that several keys say together."""
    _batch(draft)
    _lengths(draft)
    _schedule(draft)
    _advantages(draft)
    _surrogate(draft)
    _kl(draft)
    _rewards(draft)
    _clipped_rewards(draft)
    _overlong(draft)
    _sequences(draft)
    _critic(draft)
    read_prompts(draft)


def _samples(draft: ImportDraft) -> tuple[str, int]:
    key = given(draft, "rollout.n_samples_per_prompt", "n_samples_per_prompt")[0]
    return key, draft.size(key, 1)


def _batch(draft: ImportDraft) -> None:
    """A step has so many completions over all processes there, and so many prompts here."""
    prompts_key = given(draft, "rollout.batch_size", "rollout_batch_size")[0]
    total_key = given(draft, "train.batch_size", "train_batch_size")[0]
    samples_key, samples = _samples(draft)
    prompts, total = draft.size(prompts_key, 1024), draft.size(total_key, 128)
    settle(draft, "num_prompts_per_step", prompts, prompts_key)
    if draft.kind == "grpo" and samples < 2:
        draft.refuse(samples_key, f"{samples}: a completion is compared with others of its prompt", "set it to 2 or more")  # fmt: skip
    else:
        settle(draft, "num_generations", samples, samples_key)
    steps, left_over = divmod(prompts * samples, total)
    if left_over or not steps or prompts % steps:
        draft.refuse(total_key, f"{prompts} prompts of {samples} completions are no whole steps of {total} completions, each prompt in one", f"set it to {samples} times a divisor of {prompts_key}")  # fmt: skip
        return
    settle(draft, "steps_per_generation", steps, total_key, f"steps of {prompts // steps} prompts")
    if samples > 1 and steps > 1:
        draft.change(total_key, "completions of a prompt stay in one step here; there a batch is shuffled over its steps")  # fmt: skip


def _lengths(draft: ImportDraft) -> None:
    """In older releases a prompt and a completion each have a length, in newer ones both together."""
    prompt_key, prompt = given(draft, "prompt_max_len")
    whole_key, whole = given(draft, "data.max_len", "max_len")
    answer_key, answer = given(draft, "rollout.max_new_tokens", "max_new_tokens", "generate_max_len")
    if prompt is not None or answer_key == "generate_max_len":
        answer = draft.size(answer_key, 1024)
        settle(draft, "max_completion_length", answer, answer_key)
        settle(draft, "sequence_len", draft.size(prompt_key, 1024) + answer, prompt_key, "a prompt with its completion")  # fmt: skip
        if whole is not None:
            draft.leave(whole_key, "a prompt and a completion each have a length")
    elif answer is None:
        draft.refuse(answer_key, "missing: a completion then has the room that its prompt leaves, from 1024 to all of it by release", "set max_new_tokens")  # fmt: skip
        return
    else:
        draft.put("max_completion_length", draft.size(answer_key, 1), answer_key)
        settle(draft, "sequence_len", draft.size(whole_key, 2048), whole_key)


def _schedule(draft: ImportDraft) -> None:
    """Steps of theirs are generation batches."""
    passes_key, passes = given(draft, "train.max_epochs", "max_epochs")
    if passes is not None:
        draft.put("num_iterations", int(as_float(passes)), passes_key, "over each generation batch")
    times = int(draft.keys.get("steps_per_generation", 1)) * int(draft.keys.get("num_iterations", 1))
    note = f"of {times} optimizer steps each" if times > 1 else ""
    for ours, spellings in (("save_steps", ("ckpt.save_steps", "save_steps")), ("eval_steps", ("eval.steps", "eval_steps"))):  # fmt: skip
        key = given(draft, *spellings)[0]
        if (number := draft.number(key)) is not None:
            draft.put(ours, max(0, int(number)) * times, key, note if number > 0 else "")
    key = given(draft, "critic.freezing_steps", "freezing_actor_steps")[0]
    frozen = draft.number(key)
    if frozen is not None and draft.kind == "ppo":
        draft.put("critic_warmup_steps", max(0, int(frozen)) * times, key, note)
    elif frozen is not None:
        draft.leave(key, f"there is no critic in {draft.kind}")
    if draft.source.get("actor.lr_scheduler") == "constant":
        draft.drop("warmup_ratio", "a constant rate has no warmup there")
        draft.put("warmup_ratio", 0.0, "actor.lr_scheduler", "no warmup there")


def _advantages(draft: ImportDraft) -> None:
    key, asked = given(draft, *ADVANTAGE)
    plain_key, plain = given(draft, "algo.advantage.no_std_norm", "no_advantage_std_norm")
    if draft.kind == "ppo":
        draft.change(key, "gae is ppo; advantages are divided by a std of n - 1 tokens here, of n there")
        if plain:
            draft.refuse(plain_key, "true: advantages of a critic are whitened here", "take it out")
        elif plain_key in draft.source:
            draft.leave(plain_key, "it is off")
        return
    if asked not in _SHAPED:
        whitened = str(asked).startswith("reinforce")
        why = "its advantages are whitened token by token, which weighs long completions more" if whitened else "no such advantage here"  # fmt: skip
        todo = f"set one of gae, {', '.join(_SHAPED)}" + ("; or write a YAML with advantage_estimator: reinforce_pp or reinforce_pp_baseline, which whiten completions" if whitened else "")  # fmt: skip
        draft.refuse(key, f"{asked}: {why}", todo)
        return
    for ours, value in _SHAPED[asked].items():
        draft.put(ours, value, key)
    if plain_key in draft.source:
        draft.leave(plain_key, f"{asked} is not whitened")


def _surrogate(draft: ImportDraft) -> None:
    loss_key, loss = given(draft, "actor.policy_loss_type", "policy_loss_type")
    loss = loss or "ppo"
    if loss not in ("ppo", "gspo") or (draft.kind == "ppo" and loss != "ppo"):
        draft.refuse(loss_key, f"{loss}: no such loss in {draft.kind}", "set ppo" + (" or gspo" if draft.kind == "grpo" else ""))  # fmt: skip
        return
    if draft.kind == "grpo":
        settle(draft, "loss_type", "gspo" if loss == "gspo" else "dapo", loss_key, "a mean over the tokens of a step" if loss == "ppo" else "")  # fmt: skip
    elif loss_key in draft.source:
        draft.leave(loss_key, "it is PPO's clipped surrogate, a mean over tokens")
    _clip(draft, dual=loss == "ppo")
    entropy_key = given(draft, "actor.entropy_coef", "entropy_loss_coef")[0]
    weight = draft.number(entropy_key)
    if weight and loss == "gspo":
        draft.refuse(entropy_key, f"{weight:g} with gspo: the entropy is a mean over tokens there", "set policy_loss_type: ppo, or 0")  # fmt: skip
    elif weight is not None:
        draft.put("entropy_coef", weight, entropy_key)


def _clip(draft: ImportDraft, *, dual: bool) -> None:
    both_key, both = given(draft, "actor.eps_clip", "eps_clip")
    sides_key, sides = given(draft, "actor.eps_clip_low_high", "eps_clip_low_high")
    third_key, third = given(draft, "actor.dual_clip", "dual_clip")
    if sides is not None:
        low, high = sides
        draft.put("epsilon", as_float(low), sides_key)
        draft.put("epsilon_high", as_float(high), sides_key)
        if both is not None:
            draft.leave(both_key, f"{sides_key} is read")
    elif both is not None:
        draft.put("epsilon", as_float(both), both_key)
    edge = 1 + as_float(draft.keys.get("epsilon_high") or draft.keys.get("epsilon", 0.2))
    if third is not None and (not dual or as_float(third) <= edge):
        why = "a second clip inside the first" if dual else "a bound on gspo's ratio"
        draft.refuse(third_key, f"{third}: {why}", f"set it above {edge:g}" if dual else "take it out")
    elif third is not None:
        draft.put("delta", as_float(third), third_key, "where the advantage is negative")


def _kl(draft: ImportDraft) -> None:
    """In the loss, or in the reward, where it is added after a group's rewards are compared."""
    weight_key, weight = given(draft, "algo.kl.init_coef", "init_kl_coef")
    loss_key, loss = given(draft, "algo.kl.use_loss", "use_kl_loss")
    kind_key, kind = given(draft, "algo.kl.estimator", "kl_estimator")
    weight, kind = as_float(0.01 if weight is None else weight), str(kind or "k1")
    if weight <= 0:
        settle(draft, "beta", 0.0, weight_key)
        for key in (loss_key, kind_key):
            if key in draft.source:
                draft.leave(key, "no KL is asked for")
        return
    if kind not in ("k1", "k2", "k3"):
        draft.refuse(kind_key, f"{kind}: no such estimator here", "set k1, k2 or k3")
    elif not is_off(loss):
        draft.put("kl_in_reward", False, loss_key)
        draft.put("use_bias_correction_kl", False, loss_key, "no ratio weighs the KL there")
        if draft.keys.get("loss_type") == "gspo":
            draft.put("kl_reduction", "token_mean", loss_key, "of the KL")
        settle(draft, "kl_estimator", kind, kind_key)
        settle(draft, "beta", weight, weight_key)
    elif draft.kind == "grpo":
        draft.refuse(weight_key, f"{weight:g} (0.01 where it is silent): the KL is taken off the compared rewards there, and before they are compared here", "set it to 0, or set use_kl_loss")  # fmt: skip
    elif kind != "k1":
        draft.refuse(kind_key, f"{kind} in the reward: a KL in the reward is k1 here", "set k1, or use_kl_loss")
    else:
        settle(draft, "kl_in_reward", True, loss_key)
        settle(draft, "beta", weight, weight_key)
        if kind_key in draft.source:
            draft.leave(kind_key, "a KL in the reward is k1 here too")


def _rewards(draft: ImportDraft) -> None:
    """A reward model, or a function in a file; both are asked for a whole completion."""
    model_key, model = given(draft, "reward.model_name_or_path", "reward_pretrain")
    place_key, place = given(draft, "reward.remote_url", "remote_rm_url")
    normal_key, normal = given(draft, "reward.normalize_enable", "normalize_reward")
    head_key, head = given(draft, "ds.value_head_prefix", "value_head_prefix")
    if place:
        _function(draft, place_key, str(place))
        if model:
            draft.leave(model_key, f"{place_key} alone is asked")
    elif not model or "," in str(model):
        draft.refuse(model_key, f"{model}: one reward model, or a function, says what a completion is worth" if model else "missing: nothing says what a completion is worth", "name one reward model, or a file in remote_rm_url")  # fmt: skip
    else:
        draft.put("reward_funcs", [f"model:{local_file(draft, str(model))}"], model_key, "its score is the reward")
    if head not in (None, "score") and (not place or draft.kind == "ppo"):
        draft.refuse(head_key, f"{head}: the head of a reward model or critic is `score` here", "rename it in the model's files, and take this out")  # fmt: skip
    if normal and (not place or draft.kind == "ppo"):
        draft.refuse(normal_key, "true: a reward model's scores, and values, are as they are here", "fold mean and std that its config has into its head, or take it out")  # fmt: skip
    elif normal_key in draft.source:
        draft.leave(normal_key, "a function's rewards are not normalised there either" if normal else "it is off")


def _function(draft: ImportDraft, key: str, place: str) -> None:
    """`FILE.py` is taken where its `reward_func` has our signature: theirs is given texts that no reward has here."""
    if not place.endswith(".py") or "," in place:
        why = "a server is asked there" if "://" in place else "one file with a function is read"
        draft.refuse(key, f"{show_short(place)}: {why}", f"write `{_OURS}` into a file, which may ask that server, and name FILE.py")  # fmt: skip
        return
    file = Path(local_file(draft, place))
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        draft.refuse(key, f"{place}: cannot be read ({type(error).__name__})", f"name a file with `{_OURS}`")
        return
    found = next((node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "reward_func"), None)  # fmt: skip
    taken = [] if found is None else [one.arg for one in (*found.args.args, *found.args.kwonlyargs)]
    if "completions" not in taken:
        got = "has no reward_func" if found is None else f"reward_func({', '.join(taken)}) is given prompts and completions as one rendered text, special tokens and all"  # fmt: skip
        draft.refuse(key, f"{place}: {got}", f"write it as `{_OURS}`; the column of label_key comes as `labels`")
    else:
        draft.put("reward_funcs", [f"{file}:reward_func"], key, "in our signature")


def _clipped_rewards(draft: ImportDraft) -> None:
    """There rewards end at ±10 unasked, in a group after they were compared."""
    key, limits = given(draft, "reward.clip_range", "reward_clip_range")
    low, high = (-10.0, 10.0) if limits is None else (as_float(limit) for limit in limits)
    samples = _samples(draft)[1]
    bound = min(-low, high)
    if bound >= _NO_LIMIT:
        draft.leave(key, "so wide a range is no limit")
    elif draft.keys.get("scale_rewards") == "group" and (samples - 1) ** 2 <= samples * bound**2:
        # Of n values none is further from the mean than (n - 1)/√n of their stds.
        if key in draft.source:
            draft.leave(key, f"normalised rewards of {samples} completions are always within it")
    else:
        what = "rewards" if draft.kind == "ppo" else "advantages"
        draft.refuse(key, f"{low:g} to {high:g}{'' if limits is not None else ' (its default)'}: {what} beyond it are cut there, and are not here", f"where yours stay within it say so with --{key} -1e9 1e9; else cut them in a reward function")  # fmt: skip


def _overlong(draft: ImportDraft) -> None:
    length_key = given(draft, "reward.overlong_buffer_len", "overlong_buffer_len")[0]
    factor_key, factor = given(draft, "reward.overlong_penalty_factor", "overlong_penalty_factor")
    length = draft.number(length_key)
    if not length:
        for key in (length_key, factor_key):
            if key in draft.source:
                draft.leave(key, "no penalty is asked for")
    elif factor is not None and as_float(factor) != 1:
        draft.refuse(factor_key, f"{factor}: the penalty ends at -1 here", "set 1.0")
    else:
        draft.put("soft_overlong_cache", int(length), length_key)


def _sequences(draft: ImportDraft) -> None:
    key, size = given(draft, "ds.ring_attn_size", "ring_attn_size")
    if size is not None:
        draft.put("sharding", tokens_over(size), key, "Ulysses deals the tokens of a sequence")


def _critic(draft: ImportDraft) -> None:
    """It shares the policy's schedule and batches; its head begins at 0, there at random."""
    key, path = given(draft, "critic.model_name_or_path", "critic_pretrain")
    if draft.kind != "ppo":
        for name in (key, *(f"critic.{one}" for one in ALIKE)):
            if name in draft.source:
                draft.leave(name, f"there is no critic in {draft.kind}")
        return
    if draft.keys.get("adapter", "none") != "none":
        draft.refuse(given(draft, "ds.lora.rank", "lora_rank")[0], "with gae: the critic is trained under an adapter too there, and whole here", "set 0, or an estimator without a critic")  # fmt: skip
    asked = given(draft, "reward.remote_url", "remote_rm_url")[1]
    path = path or (None if asked else given(draft, "reward.model_name_or_path", "reward_pretrain")[1])
    if path is not None and path != draft.keys.get("base_model"):
        settle(draft, "value_model", local_file(draft, str(path)), key, "the reward model, as the critic to begin with")  # fmt: skip
    else:
        draft.change(key, "the policy's own base: its head begins at 0 here, at random there")
    for name, default in ALIKE.items():
        ours, theirs = (draft.source.get(f"{side}.{name}", default) for side in ("actor", "critic"))
        if not same_setting(ours, theirs):
            draft.refuse(f"critic.{name}", f"{show_short(theirs)} beside the policy's {show_short(ours)}: a critic has the policy's here", "set both alike")  # fmt: skip
        elif f"critic.{name}" in draft.source:
            draft.leave(f"critic.{name}", "it is the policy's own")


def ppo_ray_defaults(draft: ImportDraft) -> Mapping[str, Any]:
    """What train_ppo_ray does where its command is silent."""
    filled: dict[str, Any] = {"learning_rate": 1e-6, "num_train_epochs": 1.0, "max_steps": -1, "per_device_train_batch_size": 4, "overflow": "error"}  # fmt: skip
    if draft.kind == "ppo":
        filled |= {"critic_learning_rate": 9e-6, "gae_lambda": 1.0, "cliprange_value": 0.5, "vf_coef": 1.0}
    return filled
