"""Weights in: any transformers causal LM with its tokenizer, whole, with a LoRA adapter, or 4-bit with one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config import hub
from posttrain.config.chat_template import chat_template
from posttrain.config.places import is_an_adapter
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.distributed.whole import Whole
from posttrain.errors import ModelError
from posttrain.files import read_json, size_text
from posttrain.models import attention, generation
from posttrain.models.adapters import ATTENTION_NAMES, attach_adapter, continue_adapter, is_tied, linear_modules
from posttrain.models.compiled import compile_layers, compile_where_it_fits, is_compiled, wants_compiling
from posttrain.models.continued import adapter_before, base_keys, is_continued
from posttrain.models.device import Placement, has_bf16, place, weight_dtype
from posttrain.models.exact import refuse_unless_exact
from posttrain.models.freezing import freeze
from posttrain.models.offload import OffloadedLayers, checkpoint_layers
from posttrain.models.policy import Policy
from posttrain.models.proof import in_float32
from posttrain.models.read import may_read_shares, read_model, skeleton
from posttrain.models.routing import expert_choices, router_loads
from posttrain.models.selfcheck import cache_is_exact, ragged_is_exact
from posttrain.models.sequence import refuse_unless_split
from posttrain.models.stored import refuse_quantised, stored_dtype
from posttrain.models.tensor_parallel import refuse_unless_parallel
from posttrain.models.vocabulary import add_tokens, check_fits, grow, name_tokens
from posttrain.protocols import Sharding

log = logging.getLogger(__name__)


def load_config(keys: ModelKeys) -> Any:
    """The model's transformers config. Raises: ModelError in one line if it is not there or not reachable."""
    source = keys.base_model
    if Path(source).is_dir() and not (Path(source) / "config.json").exists():
        if (Path(source) / "adapter_config.json").exists():
            raise ModelError(f"base_model: {is_an_adapter(source)}")
        raise ModelError(f"base_model: {source} has no config.json; expected a Hugging Face model folder")
    if keys.init_seed is None:
        _refuse_pickles(Path(source))
    offline = "" if Path(source).is_dir() else hub.prepare()
    try:
        return AutoConfig.from_pretrained(source, revision=keys.revision, trust_remote_code=keys.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = offline or str(error).strip().splitlines()[0]
        raise ModelError(
            f"base_model: {source}/config.json cannot be read: {reason}"
            if Path(source).is_dir()
            else not_fetched(source, reason)
        ) from error


def refuse_other_media(keys: ModelKeys, config: Any) -> None:
    """Raises: ModelError for a checkpoint with parts for images or sound, which would be trained, adapted and exported as if they were layers of text."""
    media = [part for part in config.sub_configs if part.startswith(("vision", "audio", "image", "video"))]
    if media:
        named = (config.architectures or [type(config).__name__])[0]
        raise ModelError(
            f"base_model: {keys.base_model} is {named}, with parts for images or sound ({', '.join(media)}); what is trained here is a model of "
            "text alone: name one, such as a text-only size of its family"
        )


def not_fetched(source: str, reason: str, key: str = "base_model") -> str:
    return (
        f"{key}: {source} is not a local folder and could not be fetched from the hub ({reason}); "
        "give a local folder, or connect to the hub and log in if the model is gated"
    )


def _refuse_pickles(folder: Path) -> None:
    """Raises: ModelError for a local model that has its weights in pickle files alone."""
    pickled = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"base_model: {folder} has only pickled weights ({pickled[0]}), which can run code when they are read; expected "
            "*.safetensors: load it once where you trust it with AutoModelForCausalLM.from_pretrained and save_pretrained it"
        )


def refuse_missing_weights(keys: ModelKeys) -> None:
    """Raises: ModelError for a local model of which a file of weights is not there, or not whole."""
    folder = Path(keys.base_model)
    if not folder.is_dir() or keys.init_seed is not None:
        return
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = {"model.safetensors"}
    elif index.exists():
        names = _listed(index)
    else:
        raise ModelError(
            f"base_model: {folder} has no weights (model.safetensors, or model.safetensors.index.json with the files that it names); "
            "copy them from where the model came from, or set init_seed to draw them"
        )
    for name in sorted(names):
        try:
            with safe_open(folder / name, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"base_model: {folder / name} is not there whole ({error}); copy it again from where the model came from"
            ) from error


def _listed(index: Path) -> set[str]:
    """Raises: ModelError."""
    try:
        return set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"base_model: {index} names no files of weights ({error}); copy it again from where the model came from"
        ) from error


def load_tokenizer(keys: ModelKeys) -> PreTrainedTokenizerBase:
    """The tokenizer, with the given chat template if there is one and a pad token for tools that want one."""
    key, source, revision = keys.tokenizer_source
    local = Path(source).is_dir()
    offline = "" if local else hub.prepare()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=keys.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # what a damaged file comes to
        why = offline or (str(error).splitlines() or [type(error).__name__])[0]
        if not local:
            raise ModelError(not_fetched(source, why, key)) from error
        raise ModelError(
            f"{key}: {source} has no tokenizer that loads: {why}; mend it, or name one in tokenizer_name_or_path"
        ) from error
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()):
        raise ModelError(  # what transformers makes of a folder without these files
            f"{key}: {source} has no tokenizer: its config.json is there, tokenizer.json and "
            "tokenizer_config.json are not; copy them from where the model came from, or name one in tokenizer_name_or_path"
        )
    tokenizer.chat_template = chat_template(tokenizer.chat_template, keys.chat_template, keys.chat_template_kwargs)
    add_tokens(tokenizer, keys.added_tokens)
    name_tokens(tokenizer, keys.special_tokens)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{source}: the tokenizer has no eos_token; a model could never learn to stop")
    if keys.tokenizer_name_or_path is not None:
        check_fits(keys, tokenizer, load_config(keys).get_text_config().vocab_size)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(
    keys: ModelKeys, *, tokenizer: PreTrainedTokenizerBase | None = None, trainable: bool = True, exact: bool = False,
    sharding: Sharding | None = None, routed: Literal["off", "compare", "replay"] = "off",
) -> Policy:  # fmt: skip
    """The model that a stage trains or an eval scores, in the precision that `device.weight_dtype` chooses.

    `exact`: see `Policy`; `routed`: what is done with recorded choices of its routers. Raises: ModelError where that is not to be had.
    """
    shards: Sharding = sharding or Whole()
    if keys.layer_offloading and shards.is_sharded:
        raise ModelError(
            f"layer_offloading: true with {shards.num_shards} processes, which share the weights between them: set it to false, or "
            "train in one process"
        )
    if keys.load_in_8bit and shards.is_sharded:
        raise ModelError(
            f"load_in_8bit: true with {shards.num_shards} processes, which share the weights between them: set adapter: qlora, "
            "or load_in_8bit: false, or train in one process"
        )
    if exact and shards.is_sharded:
        raise ModelError(f"rollout.exact: true with {shards.num_shards} processes; expected one: set it to false")
    if shards.tensor is not None:
        refuse_unless_parallel(keys.base_model, load_config(keys), shards.tensor.size)
    tokenizer = tokenizer or load_tokenizer(keys)
    attention.register()
    with_adapter = trainable and keys.adapter != "none"
    # Under an adapter that is trained on lies the base that it was begun on.
    under = base_keys(keys) if with_adapter else keys
    model, placement = load_base(under, trainable=trainable, sharding=shards if may_read_shares(keys) else None)
    grown = grow(model, tokenizer, under)
    generation.complete(model, tokenizer, keys.base_model)
    if keys.is_reward_model:  # by it transformers finds where a row ends
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if with_adapter and shards.tensor is not None:  # an adapter is cut as the layer is that it is on
        model = shards.cut(model)
    adapted: Any = model
    moved = False
    if with_adapter and is_continued(keys):
        adapted = continue_adapter(model, adapter_before(keys), keys.lora_dropout)
        log.info("adapter: %s, trained on", adapter_before(keys))
    elif with_adapter:
        torch.manual_seed(keys.seed if isinstance(keys, TrainKeys) else 0)
        adapted, moved = attach_adapter(model, keys, grown=grown)
    elif not trainable:
        model.requires_grad_(False)
    elif isinstance(keys, TrainKeys):
        freeze(model, keys)
    if trainable and keys.gradient_checkpointing:
        checkpoint_layers(adapted, offload=keys.gradient_checkpointing == "offload")
    offloaded = _offload(adapted, placement) if keys.layer_offloading else None
    adapted = shards.shard(adapted.eval())
    # Whether the layout fits is no question of rounding, which in bf16 sends a token to another expert.
    with in_float32(adapted):
        ragged = ragged_is_exact(adapted)
        own_cache = not ragged and cache_is_exact(adapted)
    shards.release(adapted)
    if shards.sequence is not None:
        refuse_unless_split(keys.base_model, model.config, shards.sequence.size, is_ragged=ragged)
    if ragged:
        model.set_attn_implementation(attention.NAME)
    else:
        log.warning("%s: its attention does not fit the ragged layout; sequences are run one by one", keys.base_model)
    if exact:
        with placement.autocast():
            refuse_unless_exact(adapted, ragged)
    policy = Policy(
        adapted, tokenizer, placement, ragged=ragged, source=keys.base_model, under=under, cache_is_exact=own_cache,
        base_moved=moved, sharding=shards, exact=exact, offloaded=offloaded,
    )  # fmt: skip
    if routed != "off":
        policy.choices = expert_choices(model, routed, keys.base_model, ragged=ragged)
    if trainable and (policy.choices or not wants_compiling(keys, placement)):
        policy.routing = router_loads(model, policy.choices)
    if trainable and wants_compiling(keys, placement):
        compile_where_it_fits(policy) if keys.torch_compile == "auto" else compile_layers(policy)
    if moved or under is not keys:
        policy.start = {name: parameter.detach().clone() for name, parameter in policy.trainable()}
    return policy


def _offload(model: torch.nn.Module, placement: Placement) -> OffloadedLayers:
    offloaded = OffloadedLayers(model, placement.device)
    if placement.device.type == "cpu":
        log.warning("layer_offloading: on a CPU layers are copied within the same memory, which saves none")
    else:
        size = size_text(offloaded.host_bytes)
        log.info("layer_offloading: %s of frozen layers in pinned memory, two layers at a time on the GPU", size)
    return offloaded


def freeze_reference(policy: Policy) -> int:
    """Keep the given weights as the reference. Returns the bytes that this rank holds for it: none with an adapter.

    Comes before the first step: a whole model is copied, of a sharded one each rank reads its share again.
    """
    if policy.has_adapter:
        return 0
    if policy.frozen is None:
        if policy.sharded:
            frozen = load_policy(policy.under, tokenizer=policy.tokenizer, sharding=policy.sharding)
        else:
            frozen = replace(policy, model=copy.deepcopy(policy.model))
        frozen.model.requires_grad_(False).eval()
        policy.frozen = frozen.without_dropout()
        if is_compiled(policy):
            compile_layers(policy.frozen)
    parameters = policy.frozen.model.parameters()
    return sum(local.numel() * local.element_size() for local in map(policy.sharding.local, parameters))


def load_base(
    keys: ModelKeys, *, trainable: bool, sharding: Sharding | None = None
) -> tuple[PreTrainedModel, Placement]:
    """The model of `keys.base_model` and `revision`, on its device; with `sharding` this rank's shares of it.

    What is to be offloaded is in the machine's memory, all of it. Raises: ModelError, in one line.
    """
    config = load_config(keys)
    if trainable:
        refuse_other_media(keys, config)
        refuse_quantised(keys, config)
    stored = stored_dtype(config)
    placement = place(keys, stored if trainable and keys.adapter != "none" else None)
    dtype = weight_dtype(keys, placement, stored, trainable=trainable)
    # Layers that are offloaded never lie on the device all at once.
    device = torch.device("cpu") if keys.layer_offloading else placement.device
    options: dict[str, Any] = {}
    if keys.base_bits:
        options = {"quantization_config": _bnb_config(keys, placement), "device_map": {"": str(device)}}
    # Quantised from the file's own dtype wherever it runs, so that the same adapter has the same base.
    model = read_model(keys, stored if keys.base_bits else dtype, sharding, **options)
    model.config.use_cache = False
    if keys.base_bits:
        _prepare_quantised(model, dtype)
    if stored != torch.float32 and not (trainable and keys.adapter == "none"):
        log.info("%s: %s file, held in %s (%s)", keys.base_model, *_names(stored, dtype), _reason(placement, dtype))
    if keys.base_bits != 8:  # transformers refuses to move those, and has put them there
        model.to(device)  # pyright: ignore[reportArgumentType]
    if keys.base_bits:
        _check_runs(model, placement, keys.base_bits)
    return model, placement


def _names(*dtypes: torch.dtype) -> tuple[str, ...]:
    return tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _reason(placement: Placement, dtype: torch.dtype) -> str:
    kind = placement.device.type
    if placement.autocast_dtype is not None:
        return "computed with under bf16 autocast"
    if dtype == torch.float32:
        return f"computed with in float32; this {kind} {'has' if has_bf16(kind) else 'has no'} bf16 units"
    return f"this {kind} computes in it"


def refuse_without_bitsandbytes(keys: ModelKeys) -> None:
    """Raises: ModelError."""
    if keys.base_bits and find_spec("bitsandbytes") is None:
        raise ModelError(
            f"load_in_{keys.base_bits}bit needs bitsandbytes; install it with: pip install 'posttrain[qlora]'"
        )


def _bnb_config(keys: ModelKeys, placement: Placement) -> Any:
    refuse_without_bitsandbytes(keys)
    from transformers import BitsAndBytesConfig

    if keys.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=keys.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=keys.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=placement.autocast_dtype or torch.float32,
    )


def _prepare_quantised(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Freeze the base, hold what is not quantised in `dtype` and norms in float32, and keep the forward differentiable."""
    import bitsandbytes

    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.ndim == 1 else dtype)
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # On CPUs with AVX512-BF16 an eval forward repacks the weights for a kernel without autograd.
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            from posttrain.models.eight_bit import DequantizedLinear

            module.__class__ = DequantizedLinear
            module.init_8bit_state()


@torch.no_grad()
def _check_runs(model: PreTrainedModel, placement: Placement, bits: int) -> None:
    """Raises: ModelError for an architecture that multiplies with a linear's weight itself, which is quantised."""
    try:
        with placement.autocast():
            model(input_ids=torch.zeros((1, 2), dtype=torch.long, device=model.device))
    except RuntimeError as error:
        raise ModelError(
            f"{'adapter: qlora' if bits == 4 else 'load_in_8bit'}: {type(model).__name__} does not run on a base in {bits} bits ({' '.join(str(error).split())}); "
            f"set adapter: lora{'' if bits == 4 else ' and load_in_8bit: false'}"
        ) from error


def missing_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    return not getattr(tokenizer, "chat_template", None)


def model_shape(config: Any) -> Mapping[str, Any]:
    """The config as plain values, for planning."""
    return config.get_text_config().to_dict()


def adapter_targets(keys: ModelKeys, *, attention: bool, mlp: bool, head: bool) -> list[str]:
    """`lora_target` of these parts of a model that is not loaded; a head that shares its weights with the embedding is left out.

    Raises: ModelError where nothing is left.
    """
    load_config(keys)
    model = skeleton(keys)
    wanted = {True: attention, False: mlp}
    last = model.get_output_embeddings()
    inner = [name for name, module in linear_modules(model) if module is not last]
    targets = {name.rsplit(".", 1)[-1] for name in inner if wanted[bool(ATTENTION_NAMES.search(name))]}
    if head and not is_tied(model):
        targets |= {name.rsplit(".", 1)[-1] for name, module in linear_modules(model) if module is last}
    if not targets:
        raise ModelError(
            f"{keys.base_model}: no layer is left to adapt; its head shares its weights with the embedding and cannot be: train "
            "attention or MLP layers"
        )
    return sorted(targets)
