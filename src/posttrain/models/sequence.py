"""What sequence parallelism asks of a model: heads that can be dealt, tokens that meet in attention alone."""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models.lengths import length_rule
from posttrain.models.selfcheck import small_is_exact
from posttrain.protocols import TokenSplit


def refuse_unless_split(name: str, config: Any, size: int, *, is_ragged: bool | None = None) -> None:
    """Before it is loaded a small random model of its class is asked whether the packed layout is exact for it.

    Raises: ModelError where the tokens of a micro-batch cannot be dealt to `size` ranks.
    """
    if why := _why_not(config, size, is_ragged):
        raise ModelError(f"sharding.sp_size: {size} with {name}: {why}")


def _why_not(config: Any, size: int, is_ragged: bool | None) -> str:
    text = config.get_text_config()
    if is_ragged is None:
        made: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)  # pyright: ignore[reportAttributeAccessIssue]
        is_ragged = made is None or small_is_exact(
            made, config
        )  # code shipped with a model is asked when that is loaded
    if not is_ragged:
        return "its attention does not fit the packed layout, so its sequences are run one by one; set it to 1"
    if length_rule(config) is not None:
        return "its rotary embeddings depend on a sequence's length, so that its sequences are run apart; set it to 1"
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or (groups % size and size % groups):
        fits = [n for n in range(2, heads + 1) if heads % n == 0 and (groups % n == 0 or n % groups == 0)]
        return f"it has {heads} attention heads and {groups} of keys and values; expected one of {', '.join(map(str, fits))}"
    return ""


def balancing_loss(model: PreTrainedModel, router_logits: tuple[torch.Tensor, ...], split: TokenSplit) -> torch.Tensor:
    """The router's loss, which is no sum over tokens, of all tokens of a micro-batch; by the model's own function."""
    begin, end = split.span
    places = torch.arange(begin, end, device=router_logits[0].device)
    whole = tuple(split.whole(layer, places, split.num_held)[: split.num_tokens] for layer in router_logits)
    base: Any = model
    # FSDP puts a class of its own before the model's.
    modules = (sys.modules[made.__module__] for made in type(model).__mro__)
    loss = next(module.load_balancing_loss_func for module in modules if hasattr(module, "load_balancing_loss_func"))
    return loss(whole, base.num_experts, base.num_experts_per_tok)
