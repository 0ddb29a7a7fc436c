"""LoRA and QLoRA through PEFT: what is adapted is checked and said, and a merge is proven before it is kept."""

from __future__ import annotations

import copy
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from posttrain.config.stages import ModelKeys
from posttrain.distributed.sharding import replace_parameters
from posttrain.errors import ModelError
from posttrain.models.low_rank import CONFIG, adapter_config, adapter_weights
from posttrain.models.offload import OffloadedLayers
from posttrain.models.reward_head import REWARD_TASKS, reward_head, task_type
from posttrain.names import is_pattern

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

log = logging.getLogger(__name__)

ATTENTION_NAMES = re.compile(r"(q_proj|k_proj|v_proj|o_proj|qkv_proj|query_key_value|c_attn|Wqkv|out_proj|dense)$")


def attach_adapter(model: PreTrainedModel, keys: ModelKeys, *, grown: bool = False) -> tuple[PeftModel, bool]:
    """A fresh LoRA adapter on a frozen base, and whether its init moved a part of the base into it.

    Where the embedding has `grown`, embedding and head are trained and saved whole; so is always the head of a reward model.

    With the adapter the model is what it was; without it too, unless the init moved something.
    Raises: ModelError for whatever in the adapter's keys matches nothing, or cannot be trained and merged.
    """
    config, matches = _adapter_of(model, keys, grown=grown)
    _check_init(keys)
    log.info(
        "adapter: %d modules (%s)",
        sum(matches.values()),
        ", ".join(f"{name} ×{count}" for name, count in matches.items()),
    )
    if (
        keys.lora_target != "all-linear"
        and not any(map(ATTENTION_NAMES.search, matches))
        and not isinstance(keys.lora_target, str)
    ):
        log.warning(
            "lora_target leaves out the attention projections (%s); that usually learns less", ", ".join(matches)
        )
    # PEFT's own default, and none at all, leave the base alone by definition.
    before = [] if isinstance(keys.init_lora_weights, bool) else [(p, _fingerprint(p)) for p in model.parameters()]
    adapted = _adapted(model, config, keys)
    _check_patterns(adapted, keys)
    present = {id(parameter) for parameter in adapted.parameters()}
    return adapted, any(id(p) not in present or _fingerprint(p) != digest for p, digest in before)


def check_adapter(model: PreTrainedModel, keys: ModelKeys, *, grown: bool) -> PeftModel:
    """A fresh adapter on a model without weights. Raises: ModelError for what `attach_adapter` would refuse of one with them."""
    config, _ = _adapter_of(model, keys, grown=grown)
    # Of what an init computes there is nothing here: PEFT is asked on a layer of its own.
    config.init_lora_weights = True
    adapted = _adapted(model, config, keys)
    _check_patterns(adapted, keys)
    _check_init(keys)
    return adapted


def _check_init(keys: ModelKeys) -> None:
    """Raises: ModelError where PEFT does not begin an adapter so, or where that moves a part of a base out of which it cannot be taken again."""
    from peft import LoraConfig

    if isinstance(keys.init_lora_weights, bool):
        return
    # That one wants an even rank; of others the size is no matter.
    rank = keys.lora_r if keys.init_lora_weights == "orthogonal" else min(keys.lora_r, 8)
    size = 2 * rank
    config = LoraConfig(
        r=rank, target_modules=["0"], use_rslora=keys.use_rslora, use_dora=keys.use_dora,
        init_lora_weights=keys.init_lora_weights,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # what is drawn after it is what would have been
        layer: Any = nn.Sequential(nn.Linear(size, size, bias=False))
        before = _fingerprint(layer[0].weight)
        adapted = _adapted(layer, config, keys)
    if _fingerprint(adapted.base_model.model[0].base_layer.weight) != before and (keys.use_dora or keys.base_bits):
        other = "use_dora: true" if keys.use_dora else f"a base in {keys.base_bits} bits"
        raise ModelError(
            f"init_lora_weights: {keys.init_lora_weights} moves a part of the base into the adapter, which with {other} "
            "cannot be taken apart again at the export; set init_lora_weights: true"
        )


def _adapter_of(model: PreTrainedModel, keys: ModelKeys, *, grown: bool) -> tuple[LoraConfig, Mapping[str, int]]:
    """What PEFT is asked for, and how many modules each entry of `lora_target` matches. Raises: ModelError."""
    from peft import LoraConfig, TaskType

    matches = check_targets(model, keys.lora_target)
    saved = sorted({*check_saved(model, keys), *(_ends_of(model) if grown else ())})
    config = LoraConfig(
        task_type=TaskType(task_type(keys)),
        r=keys.lora_r,
        lora_alpha=keys.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=keys.lora_dropout,
        target_modules=_targets_in(_linear_names(model, keys.lora_target), keys.lora_target),
        target_parameters=_expert_targets(model, keys) or None,
        exclude_modules=[*_odd_linears(model), *_token_head(model, keys)] or None,
        modules_to_save=saved or None,
        ensure_weight_tying=is_tied(model) and bool({name.rsplit(".", 1)[-1] for name in saved} & _ends_of(model)),
        use_rslora=keys.use_rslora,
        use_dora=keys.use_dora,
        init_lora_weights=keys.init_lora_weights,  # pyright: ignore[reportArgumentType]
        rank_pattern=dict(keys.rank_pattern),
        alpha_pattern=dict(keys.alpha_pattern),
    )
    return config, matches


def _adapted(model: PreTrainedModel, config: LoraConfig, keys: ModelKeys) -> Any:
    """The model with the adapter, which is trained in float32. Raises: ModelError."""
    from peft import get_peft_model

    try:
        with _whole_shapes(model):
            adapted: Any = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise ModelError(
            f"PEFT refuses this adapter (init_lora_weights: {keys.init_lora_weights}, lora_target: {keys.lora_target}): "
            f"{' '.join(str(error).split())}"
        ) from error
    _train_in_float32(adapted)
    return adapted


@contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[None]:
    """PEFT takes the sizes of an adapter from a layer's weight, and of one that lies in shares on several meshes those of the share."""
    shares = {id(p): p for p in model.parameters() if hasattr(p, "full_tensor")}
    whole = {
        key: nn.Parameter(torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape), p.requires_grad)
        for key, p in shares.items()
    }
    places = replace_parameters(model, whole)
    try:
        yield
    finally:
        for module, name, key in places:
            shares[key].requires_grad = whole[key].requires_grad
            module._parameters[name] = shares[key]


def _fingerprint(parameter: torch.Tensor) -> bytes:
    raw = parameter.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.blake2b(raw.numpy().data).digest()


def check_targets(model: PreTrainedModel, target: list[str] | str) -> Mapping[str, int]:
    """Modules matched per entry of `lora_target`.

    Raises: ModelError naming the entry that matches nothing, with the module names there are.
    """
    _refuse_tied(model, target)
    names = _linear_names(model, target)
    if target == "all-linear":
        return {"all-linear": len(names)}
    if not isinstance(target, str):
        names += _expert_names(model)
    entries = [target] if isinstance(target, str) else target
    matches: dict[str, int] = {}
    for entry in entries:
        if isinstance(target, str):
            matched = [name for name in names if re.fullmatch(entry, name)]
        else:
            matched = [name for name in names if _named(name, entry)]
        if not matched:
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise ModelError(
                f"lora_target: {entry!r} matches no module of {type(model).__name__}; it has {', '.join(known)}"
            )
        matches[entry] = len(matched)
    return matches


def check_saved(model: PreTrainedModel, keys: ModelKeys) -> list[str]:
    """`lora_modules_to_save`, each of which must be a module. Raises: ModelError naming the one that is not."""
    names = [name for name, _ in model.named_modules() if name]
    for entry in keys.lora_modules_to_save:
        if not any(_named(name, entry) for name in names):
            last = {name.rsplit(".", 1)[-1] for name in names}
            known = ", ".join(sorted(str(name) for name in last if not name.isdigit()))
            raise ModelError(f"lora_modules_to_save: {entry!r} is no module of {type(model).__name__}; it has {known}")
    return list(keys.lora_modules_to_save)


def _check_patterns(adapted: Any, keys: ModelKeys) -> None:
    """Raises: ModelError for a `rank_pattern` or `alpha_pattern` that no adapted module matches, as PEFT matches it."""
    tuner = adapted.base_model
    names = [*tuner.targeted_module_names, *tuner.targeted_parameter_names]
    for key, patterns in (("rank_pattern", keys.rank_pattern), ("alpha_pattern", keys.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
                raise ModelError(f"{key}: {pattern!r} matches no adapted module; adapted are {known}")


def _refuse_tied(model: PreTrainedModel, target: list[str] | str) -> None:
    """Raises: ModelError if an adapter would stand on a head that shares its weights with the embedding."""
    if not is_tied(model):
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    for name in (name for name, module in model.named_modules() if module in ends):
        hits = re.fullmatch(target, name) if isinstance(target, str) else any(_named(name, entry) for entry in target)
        if hits:
            raise ModelError(
                f"lora_target: {target!r} reaches {name}, and embedding and head share one weight here: an update of one "
                "cannot be merged without changing the other; leave it out, or train it whole with lora_modules_to_save"
            )


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one weight."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _ends_of(model: PreTrainedModel) -> set[str]:
    """Last names of the embedding and the head."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if module in ends}


def linear_modules(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """Adaptable modules, the output head among them."""
    return [(name, module) for name, module in model.named_modules() if _is_linear(module)]


def _linear_names(model: PreTrainedModel, target: list[str] | str) -> list[str]:
    """Adaptable modules; the output head only where it is named, as PEFT's `all-linear` leaves it out, that of a reward never."""
    left_out = [reward_head(model), model.get_output_embeddings() if target == "all-linear" else None]
    return [name for name, module in linear_modules(model) if all(module is not head for head in left_out)]


def _is_linear(module: nn.Module) -> bool:
    """Whether its forward is x·W, which PEFT adds to: a router that is a linear by class answers with scores and choices."""
    plain = type(module).forward in (nn.Linear.forward, Conv1D.forward)
    quantised = hasattr(module, "compute_dtype") or hasattr(module, "init_8bit_state")  # those of bitsandbytes
    return plain or (isinstance(module, nn.Linear) and quantised)


def _token_head(model: PreTrainedModel, keys: ModelKeys) -> list[str]:
    """The head that labels tokens, which PEFT's `all-linear` would adapt, other than that of a sequence."""
    return [name for name, module in model.named_modules() if keys.rates_steps and module is reward_head(model)]


def _odd_linears(model: PreTrainedModel) -> list[str]:
    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and not _is_linear(module)]


def _expert_names(model: PreTrainedModel) -> list[str]:
    """Weights of all experts of a layer in one tensor, which are no modules of their own."""
    return [
        name for name, parameter in model.named_parameters() if parameter.ndim == 3 and not name.endswith(".weight")
    ]


def _expert_targets(model: PreTrainedModel, keys: ModelKeys) -> list[str]:
    """Raises: ModelError if experts are to be adapted with dropout, or begun on their weights, which PEFT cannot do."""
    found = [] if isinstance(keys.lora_target, str) else _targets_in(_expert_names(model), keys.lora_target)
    if found and keys.lora_dropout:
        raise ModelError(
            f"lora_dropout={keys.lora_dropout} with experts in lora_target ({', '.join(found)}); set it to 0"
        )
    if found and keys.init_lora_weights not in (True, False, "gaussian"):
        raise ModelError(
            f"init_lora_weights: {keys.init_lora_weights} with experts in lora_target ({', '.join(found)}); PEFT begins those "
            "with true, false or gaussian; set init_lora_weights: true"
        )
    return list(found)


def _targets_in(names: list[str], target: list[str] | str) -> list[str] | str:
    """What PEFT is given: of a list the entries that are in `names`, and for a pattern the names that it is of."""
    if isinstance(target, str):
        return target
    found: list[str] = []
    for entry in target:
        matched = [name for name in names if _named(name, entry)]
        found += matched if is_pattern(entry) else [entry] * bool(matched)
    return list(dict.fromkeys(found))


def _named(name: str, entry: str) -> bool:
    if is_pattern(entry):
        return re.fullmatch(entry, name) is not None
    return name == entry or name.endswith(f".{entry}")


def dequantized_weights(
    model: PreTrainedModel | PeftModel, offloaded: OffloadedLayers | None = None
) -> dict[str, Callable[[], torch.Tensor]]:
    """What unpacks each quantised linear of the base to its float32 matrix, by its module's name in the base model."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    from posttrain.models.eight_bit import dequantized

    base: Any = model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore
    found: dict[str, Callable[[], torch.Tensor]] = {}
    for name, module in base.named_modules():
        if isinstance(module, Linear8bitLt):
            found[name.removesuffix(".base_layer")] = partial(dequantized, module)
        elif isinstance(module, Linear4bit):
            found[name.removesuffix(".base_layer")] = partial(_unpacked, module, offloaded)
    return found


def _unpacked(module: Any, offloaded: OffloadedLayers | None) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    packed: Any = module.weight
    if offloaded is not None:
        offloaded.fetch_those_of([packed])
    # The product unpacks into its input's dtype, not into that of the file.
    state = copy.copy(packed.quant_state)
    state.dtype = torch.float32
    return dequantize_4bit(packed.data, state)


def load_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Attach a saved adapter. Raises: ModelError if its weights do not fill the adapter (PEFT only warns)."""
    from peft import PeftModel

    adapter_config(adapter)
    saved = adapter_weights(adapter)
    try:
        with _whole_shapes(model):
            adapted = PeftModel.from_pretrained(model, str(adapter))
    except RuntimeError as error:
        raise ModelError(f"{adapter} does not fit its base: {' '.join(str(error).split())}") from error
    _check_filled(adapted, saved, adapter)
    return adapted


def continue_adapter(model: PreTrainedModel, adapter: Path, dropout: float) -> PeftModel:
    """A saved adapter on its frozen base, to be trained on. Raises: ModelError if its weights do not fill it."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    try:
        config: Any = LoraConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{adapter / CONFIG}: PEFT reads no adapter from it: {' '.join(str(error).split())}"
        ) from error
    if (config.task_type in REWARD_TASKS) != (reward_head(model) is not None):
        raise ModelError(
            f"{adapter} was trained under {'a reward' if reward_head(model) is None else 'a language model'}'s "
            f"head, and {type(model).__name__} has another; begin a new adapter (adapter_start: fresh, without adapter_name_or_path)"
        )
    # What any other init would compute is overwritten below.
    config.inference_mode, config.init_lora_weights, config.lora_dropout = False, True, dropout
    try:
        with _whole_shapes(model):
            adapted: Any = get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{adapter} does not fit its base: {' '.join(str(error).split())}") from error
    _train_in_float32(adapted)
    saved = adapter_weights(adapter)
    _check_filled(adapted, saved, adapter)
    try:
        set_peft_model_state_dict(adapted, saved)
    except RuntimeError as error:
        raise ModelError(f"{adapter} does not fit its base: {' '.join(str(error).split())}") from error
    return adapted


def _check_filled(adapted: PeftModel, saved: Mapping[str, torch.Tensor], adapter: Path) -> None:
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)  # pyright: ignore[reportArgumentType]
    missing, unexpected = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
    if missing or unexpected:
        raise ModelError(
            f"{adapter}: adapter and model do not fit: {len(missing)} weights missing ({', '.join(missing[:3])}), "
            f"{len(unexpected)} unexpected ({', '.join(unexpected[:3])}); was it trained on another base?"
        )


def _train_in_float32(adapted: Any) -> None:
    """Also what is trained whole, which PEFT leaves in the base's dtype."""
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
