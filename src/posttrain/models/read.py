"""A model's file into memory: whole, or of every tensor the share that this rank holds. Knows no adapter and no stage."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.distributed import DistributedConfig
from transformers.utils import CONFIG_NAME, cached_file

from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.errors import ModelError
from posttrain.models.continued import adapter_before, is_continued
from posttrain.models.generation import forget_special_tokens
from posttrain.models.low_rank import adapter_config
from posttrain.models.reward_head import with_reward_per_token
from posttrain.models.stored import as_floats, unpacking
from posttrain.protocols import Sharding

log = logging.getLogger(__name__)


def read_model(
    keys: ModelKeys, dtype: torch.dtype, sharding: Sharding | None = None, **options: Any
) -> PreTrainedModel:
    """The weights of `keys.base_model` at its revision, as they are in the file. Raises: ModelError, in one line.

    With `sharding` each rank reads its own rows of each tensor, and no tensor is ever whole.
    """
    if keys.init_seed is not None:
        return _drawn(keys, dtype)
    if packed := unpacking(_config(keys)):  # whole: a share of what is packed is no share of the floats
        return as_floats(_read(keys, dtype, **packed, **options), dtype)
    if sharding is None or not sharding.is_sharded:
        return _read(keys, dtype, **options)
    if torch.cuda.is_available():  # where the shares lie
        options = {"device_map": {"": torch.cuda.current_device()}} | options
    with _cut_before_reading(sharding):
        model = _read(keys, dtype, distributed_config=_ONE, **options)
    config: Any = model.config
    del config.distributed_config
    return model


def read_as_filed(keys: ModelKeys) -> PreTrainedModel | None:
    """The model in the one dtype of all its floats in the file: its weights are then pages of the file, and no memory of the process.

    None where it cannot be had so and compute in float32 what the file says: of several dtypes, quantised, drawn, or with buffers that
    are made in the model's dtype.
    """
    config = _config(keys)
    dtypes = set() if keys.init_seed is not None or unpacking(config) else _dtypes_in_files(keys)
    if len(dtypes) != 1 or (dtype := _FLOATS.get(dtypes.pop())) is None:
        return None
    model = _read(keys, dtype)
    return None if dtype != torch.float32 and any(buffer.dtype == dtype for buffer in model.buffers()) else model


_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def _dtypes_in_files(keys: ModelKeys) -> set[str]:
    config = cached_file(keys.base_model, CONFIG_NAME, revision=keys.revision)
    assert config is not None  # it was read
    found: set[str] = set()
    for path in Path(config).parent.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - no mapping
    return found


def is_token_classifier(source: str) -> bool:
    """Whether a model's config says so, of a folder or of a hub id. Raises: ModelError."""
    config = _config(ModelKeys(base_model=source))
    return any("ForTokenClassification" in name for name in config.architectures or ())


def may_read_shares(keys: ModelKeys) -> bool:
    """Whether nothing that is done between reading and sharding needs a whole tensor of the base."""
    if keys.base_bits or keys.added_tokens or keys.is_reward_model or keys.init_seed is not None:
        return False
    if is_continued(keys):
        return fits_shares(adapter_before(keys))
    plain = isinstance(keys.init_lora_weights, bool) and not (keys.use_dora or keys.lora_modules_to_save)
    return keys.adapter == "none" or plain


def fits_shares(adapter: Path) -> bool:
    """Whether a saved adapter can be put on a base of which each rank holds its share."""
    config = adapter_config(adapter)
    return not (config.get("use_dora") or config.get("modules_to_save"))  # which older versions of PEFT do not write


_ONE = DistributedConfig(tp_size=1, fsdp_size=1, pp_size=1, ep_size=1)
"""Makes transformers call `maybe_distribute_model`, with nothing for it to do."""
_CLASSIFIERS = re.compile("For(Sequence|Token)Classification")
_BY_ROWS = (MergeModulelist, Concatenate)


def _config(keys: ModelKeys) -> Any:
    try:
        return AutoConfig.from_pretrained(
            keys.base_model, revision=keys.revision, trust_remote_code=keys.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unloadable(keys, error) from error


def _unloadable(keys: ModelKeys, error: Exception) -> ModelError:
    return ModelError(f"base_model: {keys.base_model} did not load: {str(error).strip().splitlines()[0]}")


def _family(keys: ModelKeys) -> Any:
    if not keys.is_reward_model:
        return AutoModelForCausalLM
    return AutoModelForTokenClassification if keys.rates_steps else AutoModelForSequenceClassification


def _num_labels(keys: ModelKeys) -> int:
    return 2 if keys.rates_steps else 1


def _drawn(keys: ModelKeys, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this config with random weights: the same in every process, for they are drawn whole, in float32, on the CPU."""
    assert keys.init_seed is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keys.init_seed)
        made: Any = _from_config(keys, torch.float32)
        model = made.to(dtype)
    log.info("%s: weights drawn by seed %d from its config", keys.base_model, keys.init_seed)
    return _prepared(model.eval(), keys)


def skeleton(keys: ModelKeys) -> PreTrainedModel:
    """The model of this config without any weight: its modules and the names and sizes of its parameters. Raises: ModelError."""
    with torch.device("meta"):
        model = _prepared(_from_config(keys, torch.float32), keys)
    return _with_its_head(model, keys)


def _from_config(keys: ModelKeys, dtype: torch.dtype) -> PreTrainedModel:
    config = _config(keys)
    if keys.is_reward_model:
        config.num_labels = _num_labels(keys)
    try:
        return _family(keys).from_config(config, dtype=dtype, trust_remote_code=keys.trust_remote_code)
    except (ValueError, RuntimeError, ImportError) as error:
        raise _unloadable(keys, error) from error


def _prepared(model: PreTrainedModel, keys: ModelKeys) -> PreTrainedModel:
    """Without what the keys take from elsewhere."""
    if keys.tokenizer_name_or_path is not None:
        forget_special_tokens(model)
    return with_reward_per_token(model) if keys.is_reward_model else model


def _read(keys: ModelKeys, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    family = _family(keys)
    if keys.is_reward_model:
        options |= {"num_labels": _num_labels(keys)}
        torch.manual_seed(keys.seed if isinstance(keys, TrainKeys) else 0)  # a new head is random
    try:
        model = family.from_pretrained(
            keys.base_model, dtype=dtype, revision=keys.revision, trust_remote_code=keys.trust_remote_code,
            use_safetensors=True, **options,
        )  # fmt: skip
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
    ) as error:  # the last: of a library that a way of storing needs
        raise _unloadable(keys, error) from error
    return _with_its_head(_prepared(model, keys), keys)


def _with_its_head(model: PreTrainedModel, keys: ModelKeys) -> PreTrainedModel:
    """Raises: ModelError for a reward model where a language model is asked for."""
    if not keys.is_reward_model and any(_CLASSIFIERS.search(name) for name in model.config.architectures or ()):
        raise ModelError(
            f"base_model: {keys.base_model} is a reward model: it has no head that gives tokens; expected a language model, "
            "such as the one that it was trained from"
        )
    return model


@contextmanager
def _cut_before_reading(sharding: Sharding) -> Iterator[None]:
    """transformers fills shares where a model without data has shares; the moment to put them there is its own method's."""

    def cut(_: Any, model: PreTrainedModel, *__: Any) -> PreTrainedModel:
        return sharding.cut(model) if _is_read_by_rows(model) else model

    model_class: Any = PreTrainedModel
    model_class.maybe_distribute_model = classmethod(cut)
    try:
        yield
    finally:
        del model_class.maybe_distribute_model


def _is_read_by_rows(model: PreTrainedModel) -> bool:
    """Whether each row of a parameter comes from rows of the file: experts are stacked, other conversions mix rows."""
    converters = [c for c in get_model_conversion_mapping(model) if isinstance(c, WeightConverter)]
    operations: list[Any] = [operation for converter in converters for operation in converter.operations]
    return all(isinstance(operation, _BY_ROWS) and _dim_is_kept(operation) for operation in operations)


def _dim_is_kept(operation: Any) -> bool:
    return operation.dim == 0 if isinstance(operation, MergeModulelist) else operation.dim > 0
