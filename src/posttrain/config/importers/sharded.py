"""FSDP's and ZeRO's words for what is sharded, and what each comes to here: no number changes with any of them."""

from __future__ import annotations

from typing import Any

UNIT = "each decoder layer is a unit of its own here"
_ALL = "parameters, gradients and optimizer states are sharded, and a layer is gathered while it runs, as here"
_KEPT = "a layer is given back after its forward here too: less memory, more communication, the same numbers"
_HYBRID = "all processes form one group here, without replicas: more communication between machines, the same numbers"
_NO_SHARD = "parameters are sharded here all the same: less memory, the same numbers"
OFFLOAD = "nothing is offloaded here: what does not fit wants more processes, a smaller micro-batch or adapter: qlora"
STRATEGIES: dict[Any, str] = {
    **dict.fromkeys(("FULL_SHARD", "full_shard", 1, "1", True, "true", "True"), _ALL),
    **dict.fromkeys(("SHARD_GRAD_OP", "shard_grad_op", 2, "2", False, "false", "False"), _KEPT),
    **dict.fromkeys(("NO_SHARD", "no_shard", 3, "3"), _NO_SHARD),
    **dict.fromkeys(
        ("HYBRID_SHARD", "hybrid_shard", 4, "4", "HYBRID_SHARD_ZERO2", "hybrid_shard_zero2", 5, "5"), _HYBRID
    ),
}
"""FSDP1's sharding strategies and FSDP2's `reshard_after_forward` → what it is here. (True is 1 in Python, as it is in meaning.)"""
_WORDS = {**STRATEGIES, "auto_wrap": UNIT, "offload": OFFLOAD}
STAGES: dict[Any, str] = {
    0: _NO_SHARD,
    1: "optimizer states are sharded, here parameters and gradients too",
    2: _KEPT,
    3: _ALL,
}
"""ZeRO's stages → what they are here."""


def fsdp_words(value: Any) -> str:
    """What `--fsdp "full_shard auto_wrap"` comes to. Raises: KeyError for a word that is none of FSDP's."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else [value] if value else []
    if not words:
        raise KeyError(value)
    return "; ".join(dict.fromkeys(_WORDS[word] for word in words))
