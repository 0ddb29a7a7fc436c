"""What tensor parallelism asks of a model: a plan of styles that are proven here, heads and experts that can be dealt."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from posttrain.config.sharding import ShardingKeys
from posttrain.distributed.tensor_parallel import ParallelPlan
from posttrain.errors import ModelError
from posttrain.models.lengths import length_rule
from posttrain.models.selfcheck import small_is_exact
from posttrain.models.sequence import refuse_unless_split


def refuse_unless_shared(name: str, config: Any, keys: ShardingKeys) -> None:
    """Raises: ModelError where a model does not go with what neighbouring processes share by these keys."""
    if keys.sp_size > 1:
        refuse_unless_split(name, config, keys.sp_size)
    if keys.tensor_parallel_size > 1:
        refuse_unless_parallel(name, config, keys.tensor_parallel_size)


def refuse_unless_parallel(name: str, config: Any, size: int) -> None:
    """Before it is loaded. Raises: ModelError where its layers cannot be held by `size` ranks between them."""
    if why := _without_plan(config) or _why_not_dealt(config, size):
        raise ModelError(f"sharding.tensor_parallel_size: {size} with {name}: {why}")


def _without_plan(config: Any) -> str:
    text = config.get_text_config()
    plan = ParallelPlan.of(text.base_model_tp_plan or {}, text.base_model_ep_plan or {})
    if not plan.dense:
        return f"transformers has no tensor-parallel plan for {text.model_type}; set it to 1"
    if plan.others:
        return f"its plan has styles that are not proven here ({', '.join(plan.others[:3])}); set it to 1"
    return ""


def _why_not_dealt(config: Any, size: int) -> str:
    text = config.get_text_config()
    heads = text.num_attention_heads
    counts = {
        "attention heads": heads,
        "heads of keys and values": getattr(text, "num_key_value_heads", None) or heads,
        "values between the matrices of its MLP": getattr(text, "intermediate_size", None) or size,
        "experts": getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or size,
    }
    uneven = [f"{number} {what}" for what, number in counts.items() if number % size]
    if uneven:
        return f"it has {' and '.join(uneven)}; expected a number that divides them"
    if length_rule(config) is not None:
        return "its rotary embeddings depend on a sequence's length, so that its sequences are run apart; set it to 1"
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # pyright: ignore[reportAttributeAccessIssue]
    if made is None or not small_is_exact(made, config):
        return "its attention does not fit the packed layout, so its sequences are run one by one; set it to 1"
    return ""
