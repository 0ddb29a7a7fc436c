"""The generation config of a model: where a completion ends, for every sampler here and for those that load the export."""

from __future__ import annotations

import logging
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.errors import ModelError
from posttrain.models.text import end_of_turn_id

log = logging.getLogger(__name__)

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a completion: the generation config's, the tokenizer's EOS, the template's end of turn."""
    ends: list[Any] = [*_configured(model), tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return tuple(sorted({int(token) for token in ends if token is not None}))


def stored_stop_token_ids(
    source: str, revision: str | None, model_config: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The same for a model that is not loaded; `model_config` is its config."""
    try:
        config = GenerationConfig.from_pretrained(source, revision=revision or "main")
    except OSError:
        config = GenerationConfig.from_model_config(model_config)
    ends: list[Any] = [*_ends(config), tokenizer.eos_token_id, end_of_turn_id(tokenizer)]
    return tuple(sorted({int(token) for token in ends if token is not None}))


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give the model's generation config all stop tokens, and make it one that transformers saves; a reward model has none.

    Raises: ModelError if it cannot be saved even without its sampling keys, which is said now and not after training.
    """
    if not model.can_generate():
        return
    stops = list(stop_token_ids(model, tokenizer))
    config: Any = model.generation_config
    if config is None:
        config = model.generation_config = GenerationConfig.from_model_config(model.config)
    if set(stops) != set(_configured(model)):
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
    try:
        config.validate(strict=True)
    except ValueError:
        _drop_sampling_keys(config, name)


def forget_special_tokens(model: PreTrainedModel) -> None:
    """Take out the special tokens that the model's configs name: they are ids of another tokenizer than the one it is given."""
    for config in (model.config.get_text_config(), model.generation_config):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config is not None and hasattr(config, name):
                setattr(config, name, None)


def _configured(model: PreTrainedModel) -> list[int]:
    return _ends(model.generation_config)


def _ends(config: Any) -> list[int]:
    ends = None if config is None else config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def _drop_sampling_keys(config: GenerationConfig, name: str) -> None:
    """A config that says `do_sample: false` and how to sample contradicts itself; what it does is not to sample."""
    given = {key: getattr(config, key) for key in _SAMPLING if getattr(config, key, None) is not None}
    if config.do_sample is not True:
        for key in given:
            setattr(config, key, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{name}: its generation_config.json cannot be saved again: {reason}; mend that file"
        ) from None
    log.warning(
        "%s: generation_config.json does not sample (do_sample is not true) and yet sets %s; these keys are left out of what is saved",
        name, ", ".join(f"{key}: {value}" for key, value in given.items()),
    )  # fmt: skip
