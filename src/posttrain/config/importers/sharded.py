"""FSDP's and ZeRO's words for what is sharded, and the keys of `sharding` that they come to here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.config.importers.fates import ImportDraft, is_off

UNIT = "each decoder layer is a unit of its own here"
OFFLOAD = "shares are not offloaded here: what does not fit wants more processes, a smaller micro-batch or adapter: qlora; in one process see layer_offloading"
SHARDED = "FSDP2 shards here; a decoder layer is a unit, and nothing is offloaded"
_ALL = {"reshard_after_forward": True}
_KEPT = {"reshard_after_forward": False}
_NODE = {"dp_shard_size": "node"}
STRATEGIES: dict[Any, dict[str, Any]] = {
    word: keys
    for words, keys in (
        (("FULL_SHARD", "full_shard", 1, "1", True, "true", "True"), _ALL),
        (("SHARD_GRAD_OP", "shard_grad_op", 2, "2", False, "false", "False"), _KEPT),
        (("NO_SHARD", "no_shard", 3, "3"), {"dp_shard_size": 1}),
        (("HYBRID_SHARD", "hybrid_shard", 4, "4"), _NODE | _ALL),
        (("HYBRID_SHARD_ZERO2", "hybrid_shard_zero2", 5, "5"), _NODE | _KEPT),
    )
    for word in words
}
"""FSDP1's sharding strategies and FSDP2's `reshard_after_forward` → keys of ours. (True is 1 in Python, as it is in meaning.)"""
STAGES: dict[Any, dict[str, Any]] = {0: {"dp_shard_size": 1}, 1: _KEPT | {"sync_each_batch": False}, 2: _KEPT, 3: _ALL}
"""ZeRO's stages → keys of ours. What they leave whole, parameters and gradients, is cut here, and gathered no more often than there."""
SPLIT = "Ulysses deals the tokens of a sequence here: the numbers of any other way"
_WORDS: dict[Any, dict[str, Any]] = {**STRATEGIES, "auto_wrap": {}, "offload": {}}


def tokens_over(size: Any) -> dict[str, Any]:
    """Of so many processes that share each sequence. Raises: TypeError, ValueError."""
    if is_off(size):
        return {}
    number = int(size)
    if number < 1 or (isinstance(size, float) and number != size):
        raise ValueError(size)
    return {"sp_size": number} if number > 1 else {}


def fsdp_words(value: Any) -> dict[str, Any]:
    """What `--fsdp "full_shard auto_wrap"` comes to. Raises: KeyError for a word that is none of FSDP's."""
    if is_off(value):
        return {}
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value]
    return {key: ours for word in words for key, ours in _WORDS[word].items()}


def fsdp_config(value: Any) -> dict[str, Any]:
    """What `fsdp_config` of transformers' trainer comes to, with or without FSDP's name before its keys. Raises: KeyError, TypeError."""
    if not isinstance(value, Mapping):
        raise TypeError(value)
    said = {str(key).removeprefix("fsdp_"): word for key, word in value.items()}
    known = (said[key] for key in ("sharding_strategy", "reshard_after_forward") if said.get(key) is not None)
    return {key: ours for word in known for key, ours in STRATEGIES[word].items()}


def count_shards_together(draft: ImportDraft) -> None:
    """There shards are counted apart from the processes that share a sequence, and both hold the model; here they are counted together."""
    said = draft.keys.get("sharding", {})
    shards, sharing = said.get("dp_shard_size"), said.get("sp_size", 1)
    if isinstance(shards, int) and sharing > 1:
        draft.keys["sharding"] = said | {"dp_shard_size": shards * sharing}
        draft.notes["sharding"].append(f"{shards} shards there, each over the {sharing} that share a sequence")
