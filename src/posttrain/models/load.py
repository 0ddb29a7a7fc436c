"""Weights in: any transformers causal LM with its tokenizer, whole, with a LoRA adapter, or 4-bit with one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config import hub
from posttrain.config.stages import ModelKeys
from posttrain.errors import ModelError
from posttrain.models import attention
from posttrain.models.adapters import attach_adapter
from posttrain.models.device import place
from posttrain.models.policy import Policy
from posttrain.models.selfcheck import ragged_is_exact

log = logging.getLogger(__name__)


def load_config(keys: ModelKeys) -> Any:
    """The model's transformers config. Raises: ModelError in one line if it is not there or not reachable."""
    source = keys.base_model
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        raise ModelError(f"base_model: {source} has no config.json; expected a Hugging Face model folder")
    offline = "" if Path(source).is_dir() else hub.prepare()
    try:
        return AutoConfig.from_pretrained(source, revision=keys.revision, trust_remote_code=keys.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = offline or str(error).strip().splitlines()[0]
        raise ModelError(
            f"base_model: {source} is not a local folder and could not be fetched from the hub ({reason}); "
            "give a local folder, or connect to the hub and log in if the model is gated"
        ) from error


def load_tokenizer(keys: ModelKeys) -> PreTrainedTokenizerBase:
    """The tokenizer, with the given chat template if there is one and a pad token for tools that want one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            keys.base_model, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"base_model: {keys.base_model} has no tokenizer that loads: {str(error).splitlines()[0]}"
        ) from error
    if keys.chat_template is not None:
        tokenizer.chat_template = Path(keys.chat_template).read_text(encoding="utf-8")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{keys.base_model}: the tokenizer has no eos_token; a model could never learn to stop")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the tokenizer's and the generation config's, without the pad token."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    ends: list[Any] = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    return tuple(sorted({int(token) for token in ends if token is not None}))


def load_policy(keys: ModelKeys, *, tokenizer: PreTrainedTokenizerBase | None = None, trainable: bool = True) -> Policy:
    """The model that a stage trains or an eval scores.

    Trained weights are float32 masters; frozen ones keep the dtype they were saved in.
    """
    placement = place(keys)
    attention.register()
    model = _load_base(keys, float32=trainable and keys.adapter == "none")
    model.to(placement.device)  # pyright: ignore[reportArgumentType]
    ragged = ragged_is_exact(model)
    if ragged:
        model.set_attn_implementation(attention.NAME)
    else:
        log.warning("%s: its attention does not fit the ragged layout; sequences are run one by one", keys.base_model)
    adapted: Any = model
    if trainable and keys.adapter != "none":
        torch.manual_seed(getattr(keys, "seed", 0))
        adapted = attach_adapter(model, keys)
    elif not trainable:
        model.requires_grad_(False)
    if trainable and keys.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.eval()
    return Policy(adapted, tokenizer or load_tokenizer(keys), placement, ragged=ragged, source=keys.base_model)


def _load_base(keys: ModelKeys, *, float32: bool) -> PreTrainedModel:
    config = load_config(keys)
    options: dict[str, Any] = {"revision": keys.revision, "trust_remote_code": keys.trust_remote_code}
    if keys.load_in_4bit:
        options |= {"quantization_config": _bnb_config(keys), "device_map": {"": str(place(keys).device)}}
    dtype = torch.float32 if float32 else getattr(config, "dtype", None) or torch.float32
    try:
        model = AutoModelForCausalLM.from_pretrained(keys.base_model, dtype=dtype, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"base_model: {keys.base_model} did not load: {str(error).strip().splitlines()[0]}") from error
    model.config.use_cache = False
    text = model.config.get_text_config()
    if getattr(text, "router_aux_loss_coef", 0):
        text.output_router_logits = True
    if keys.load_in_4bit:
        _keep_4bit_differentiable(model)
    return model


def _bnb_config(keys: ModelKeys) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError("load_in_4bit needs bitsandbytes; install it with: pip install 'posttrain[qlora]'") from error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=keys.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=keys.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=place(keys).autocast_dtype or torch.float32,
    )


def _keep_4bit_differentiable(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16 an eval forward repacks 4-bit weights for a kernel without autograd: never allow it."""
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def missing_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return not getattr(tokenizer, "chat_template", None)


def model_shape(config: Any) -> Mapping[str, Any]:
    """The config as plain values, for planning."""
    return config.get_text_config().to_dict()
