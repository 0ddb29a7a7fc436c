"""Axolotl's `rl: ebft`: its `ebft` keys, what `trl` says beside them, and what it does where both are silent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, is_off

_OTHER = "train with Axolotl"
_BOTH = ("feature_layers", "use_whitening", "alignment_coef", "diversity_coef")
_STRIDED = {"stride": "stride", "context_length": "context_length", "min_completion_prefix": "min_completion_prefix",
            "generate_max_len": "max_completion_length", "n_samples_per_prompt": "num_generations", "top_p": "top_p"}  # fmt: skip
_STRIDED_ALONE = (*_STRIDED, "temperature", "rl_coef", "advantage_estimator")
_LENGTHS = ("adaptive_max_tokens", "gt_length_multiplier")
_KNOWN = {"mode", "embed_method", "ce_coef", *_BOTH, *_STRIDED_ALONE, *_LENGTHS}

_SAMPLED = (
    "num_generations",
    "max_completion_length",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "chat_template_kwargs",
)
_NO_RATIO = ("epsilon", "epsilon_high", "delta", "importance_sampling_level")
_NO_PART = ("use_vllm", "log_completions", "num_completions_to_print", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps",
            "reward_funcs", "reward_weights", "use_liger_loss")  # fmt: skip


def is_strided(source: Mapping[str, Any]) -> bool:
    return source.get("rl") == "ebft" and (source.get("ebft") or {}).get("mode") == "strided"


def read_ebft(draft: ImportDraft) -> None:
    """Puts or refuses every key of `ebft` and of `trl`."""
    given = draft.source.get("ebft") or {}
    draft.leave("rl", "ebft: it is run by `posttrain ebft`")
    for key, value in given.items():
        if key not in _KNOWN and not is_off(value):
            draft.refuse(f"ebft.{key}", f"{value}: no key of ebft that is known here", "take it out, or " + _OTHER)
    _features(draft, given)
    draft.assume("use_whitening", False)
    # Its baseline is made of the others' rewards as they are.
    draft.assume("unbiased_baseline", False)
    if is_strided(draft.source):
        _strided(draft, given)
    else:
        _structured(draft, given)


def _features(draft: ImportDraft, given: Mapping[str, Any]) -> None:
    strided, method = is_strided(draft.source), given.get("embed_method") or "last_token"
    for key in _BOTH:
        if given.get(key) is not None and not (key == "diversity_coef" and strided):
            draft.put(key, given[key], f"ebft.{key}")
    if method == "last_token" or (method == "mean_pooling" and strided):
        draft.put("embed_method", method, "ebft.embed_method")
    elif method == "mean_pooling":
        draft.refuse(
            "ebft.embed_method",
            "mean_pooling: with mode: structured the mean goes over the prompt too",
            "set last_token",
        )
    elif method == "completion_mean":
        draft.refuse(
            "ebft.embed_method",
            "completion_mean: states are averaged at their own lengths there, here each token's have length 1",
            "set last_token, or embed_method: mean_pooling in a YAML of ours",
        )
    else:
        told = (
            "it is read as last_token with mode: strided"
            if strided
            else "it takes three places of prompt and completion"
        )
        draft.refuse("ebft.embed_method", f"{method}: {told}", "set last_token")  # fmt: skip


def _strided(draft: ImportDraft, given: Mapping[str, Any]) -> None:
    """A few tokens from many anchors of a text on, each text `n_samples_per_prompt` times."""
    draft.put("mode", "strided", "ebft.mode")
    for key, ours in _STRIDED.items():
        if given.get(key) is not None:
            draft.put(ours, given[key], f"ebft.{key}")
    told = "the loss uses it too, which Axolotl's does not"
    draft.put("temperature", given.get("temperature", 0.6), "ebft.temperature", told)
    for ours, value in {"max_completion_length": 8, "num_generations": 4, "normalize_layers": True}.items():
        draft.assume(ours, value)
    _scaled_diversity(draft, given)
    if given.get("ce_coef") is not None:
        draft.put("ce_coef", given["ce_coef"], "ebft.ce_coef", "on the trained tokens of the step's rows")
    if given.get("rl_coef") not in (None, 1, 1.0):
        draft.refuse(
            "ebft.rl_coef", f"{given['rl_coef']}: the policy gradient weighs 1 here", "set 1, and divide ce_coef by it"
        )
    elif "rl_coef" in given:
        draft.leave("ebft.rl_coef", "the policy gradient weighs 1 here too")
    estimator = given.get("advantage_estimator") or "rloo"
    if estimator == "reinforce":
        draft.refuse(
            "ebft.advantage_estimator",
            "reinforce: a completion is always held against the others of its prompt here",
            "set rloo",
        )
    elif estimator == "group_norm":
        draft.put("advantage_estimator", "group", "ebft.advantage_estimator", "group_norm there")
        draft.assume("advantage_eps", 1e-8)
    else:
        draft.put("advantage_estimator", estimator, "ebft.advantage_estimator")
    for key in _LENGTHS:
        if key in given:
            draft.leave(f"ebft.{key}", "it is read with mode: structured only")
    if "trl" in draft.source:
        draft.leave("trl", "it plays no part with mode: strided")
    draft.put("overflow", "truncate", "ebft.mode", "a text is cut at sequence_len there")
    _texts_per_step(draft)


def _scaled_diversity(draft: ImportDraft, given: Mapping[str, Any]) -> None:
    """Without whitening its features have the length of as many ones as there are layers, and products of them that square."""
    coef, layers = given.get("diversity_coef", 1.0), len(draft.keys.get("feature_layers") or (0.25, 0.5, 0.75))
    if draft.keys.get("use_whitening"):
        draft.put("diversity_coef", coef, "ebft.diversity_coef")
    else:
        note = f"{coef} there, times {layers} layers: each has length 1 there, and all of them together have here"
        draft.put("diversity_coef", coef * layers, "ebft.diversity_coef", note)


def _texts_per_step(draft: ImportDraft) -> None:
    micro, accumulated = _batch(draft)
    draft.drop("gradient_accumulation_steps", "num_prompts_per_step says how many texts make a step")
    draft.drop("per_device_train_batch_size", "it counts texts, and completions here")
    draft.put(
        "num_prompts_per_step",
        micro * accumulated,
        "gradient_accumulation_steps",
        f"{micro} × {accumulated} texts there, of each process",
    )
    length, stride = draft.keys["max_completion_length"], draft.keys.get("stride", 8)
    room = draft.source.get("sequence_len", 512) - length - draft.keys.get("context_length", 8)
    anchors = max(1, room // stride + 1)
    together = micro * anchors * draft.keys["num_generations"]
    draft.put(
        "per_device_train_batch_size",
        together,
        "micro_batch_size",
        f"{micro} × at most {anchors} anchors × the completions of each",
    )


def _structured(draft: ImportDraft, given: Mapping[str, Any]) -> None:
    """Whole answers, by its GRPO trainer with this reward alone."""
    trl = draft.source.get("trl") or {}
    if "mode" in given:
        draft.put("mode", "structured", "ebft.mode")
    for key in _STRIDED_ALONE:
        if key in given:
            draft.leave(f"ebft.{key}", "it is read with mode: strided only")
    if not is_off(given.get("ce_coef")) and given.get("ce_coef") is not None:
        draft.refuse(
            "ebft.ce_coef",
            f"{given['ce_coef']}: Axolotl reads it with mode: strided only",
            "set 0, or ce_coef in the YAML that is written",
        )
    elif "ce_coef" in given:
        draft.put("ce_coef", 0.0, "ebft.ce_coef")
    if draft.keys.get("use_whitening"):
        draft.change("ebft.use_whitening", "features have length 1 here before they are whitened, and their own there")
    cut = "completions are not cut at a multiple of the batch's longest answer, which Axolotl does by itself with vLLM"
    if not is_off(trl.get("use_vllm")) and given.get("adaptive_max_tokens") is not False:
        draft.change("ebft.adaptive_max_tokens", cut)
    elif "adaptive_max_tokens" in given:
        draft.leave("ebft.adaptive_max_tokens", "nothing is cut so here")
    if "gt_length_multiplier" in given:
        draft.change("ebft.gt_length_multiplier", cut)
    _trl(draft, trl)
    for ours, value in {
        "num_generations": 8,
        "max_completion_length": 256,
        "advantage_estimator": "group",
        "loss_type": "dapo",
    }.items():
        draft.assume(ours, value)
    _completions_per_step(draft)


def _trl(draft: ImportDraft, trl: Mapping[str, Any]) -> None:
    for key, value in trl.items():
        where = f"trl.{key}"
        if value is None:
            continue
        if key in _SAMPLED:
            draft.put(key, value, where)
        elif key == "loss_type" and value in ("grpo", "dr_grpo", "bnpo", "dapo"):
            draft.put("loss_type", value, where)
        elif key == "scale_rewards":
            draft.put("scale_rewards", {True: "group", False: "none"}.get(value, value), where)
            draft.put("advantage_estimator", "group", where, "the mean of the group is its baseline there")
        elif key in _NO_RATIO or (key == "num_iterations" and value == 1):
            draft.leave(where, "each generation batch is trained on once, so the importance ratio is 1")
        elif key in _NO_PART or key.startswith("vllm_"):
            draft.leave(
                where, "the reward is that of the features, and the embedded engine samples here; it plays no part"
            )
        elif key == "generation_kwargs" and set(value) <= {"stop_token_ids"}:
            draft.change(
                where,
                "completions end where the tokenizer and the generation config of the model say; `stop` takes strings",
            )
        elif not is_off(value):
            draft.refuse(where, f"{value}: it has no counterpart in ebft", "take it out, or " + _OTHER)


def _completions_per_step(draft: ImportDraft) -> None:
    micro, accumulated = _batch(draft)
    total, size = micro * accumulated, draft.keys["num_generations"]
    draft.drop("gradient_accumulation_steps", "num_prompts_per_step says how many completions make a step")
    if total % size:
        draft.refuse(
            "gradient_accumulation_steps",
            f"{micro} × {accumulated} completions are no groups of {size}",
            "make it a multiple of num_generations",
        )
        return
    note = f"{micro} × {accumulated} completions there, of each process, in groups of {size}"
    draft.put("num_prompts_per_step", total // size, "gradient_accumulation_steps", note)


def _batch(draft: ImportDraft) -> tuple[int, int]:
    micro = int(draft.source.get("micro_batch_size") or 1)
    total = draft.source.get("batch_size")
    accumulated = draft.source.get("gradient_accumulation_steps") or (int(total) // micro if total else 1)
    return micro, int(accumulated)
