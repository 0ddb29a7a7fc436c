"""What loading a model for training would refuse, asked of its config, its tokenizer and an adapter's file: no weight of the base is read."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.config.optimizing import OptimizerKeys
from posttrain.config.rl import RewardedKeys
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.distributed.tensor_parallel import refuse_other_adapters
from posttrain.models.adapters import check_adapter, continue_adapter
from posttrain.models.continued import adapter_before, base_keys, is_continued
from posttrain.models.exact import refuse_inexact_layers
from posttrain.models.float32_head import plain_head
from posttrain.models.freezing import freeze, trained_ends
from posttrain.models.load import load_config
from posttrain.models.offload import checkpoint_layers
from posttrain.models.read import skeleton
from posttrain.models.vocabulary import rows_wanted


def check_loads(keys: ModelKeys, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises: ModelError, ConfigError for what `load_policy` and the stage's loop would refuse of these keys. Code shipped with a model is asked when that is loaded."""
    if hasattr(load_config(keys), "auto_map"):
        return
    with_adapter = keys.adapter != "none"
    under = base_keys(keys) if with_adapter else keys
    model = skeleton(under)
    made: Any = model
    if with_adapter and is_continued(keys):
        with warnings.catch_warnings():
            # Sizes are compared all the same.
            warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
            made = continue_adapter(model, adapter_before(keys), keys.lora_dropout)
    elif with_adapter:
        embedding: Any = model.get_input_embeddings()
        grown = rows_wanted(tokenizer, under) > embedding.weight.shape[0]
        made = check_adapter(model, keys, grown=grown)
        if isinstance(keys, TrainKeys) and keys.sharding.tensor_parallel_size > 1:
            refuse_other_adapters(made)
    elif isinstance(keys, OptimizerKeys):
        freeze(model, keys)
    if keys.gradient_checkpointing:
        checkpoint_layers(made, offload=keys.gradient_checkpointing == "offload")
    if isinstance(keys, OptimizerKeys) and keys.embedding_lr_scale != 1:
        trained_ends(made)
    if isinstance(keys, RewardedKeys) and keys.rollout.exact:
        refuse_inexact_layers(made)
    if isinstance(keys, RewardedKeys) and keys.cast_lm_head_to_fp32:
        plain_head(made)
