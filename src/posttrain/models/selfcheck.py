"""Does the ragged layout, or the cache that a model keeps itself, mean the same to it as running each sequence by itself? Asked once, at load."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models import attention
from posttrain.models.batch import pack
from posttrain.models.lengths import by_encoding, forget_lengths, length_rule, rope_parameters
from posttrain.models.own_cache import run_on
from posttrain.types import TokenSeq

if TYPE_CHECKING:
    from peft import PeftModel

_LONGEST = 40
_BOUNDARY = 16
"""What every length that a config names is scaled down to, so that the probe crosses it."""
_PROMPTS, _CACHED_STEPS = (1, 3, 24), 3
_ORIGINAL = "original_max_position_embeddings"
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@torch.no_grad()
def ragged_is_exact(model: PreTrainedModel | PeftModel) -> bool:
    """True if packed documents and shared prefixes give the logits of single runs, and no document sees another.

    Models with state-space or linear attention, or attention terms the layout cannot express, answer False. What starts
    only at a length beyond the probe (a window, a chunk, other rotary frequencies) is asked of a small random model of
    the same config with those lengths scaled down; where that cannot be made, the answer is False.
    """
    base = _base_of(model)
    text = base.config.get_text_config()
    if not set(getattr(text, "layer_types", None) or ()) <= _LAYER_TYPES or not _agrees(base, model):
        return False
    if not _boundaries(text):
        return True
    return small_is_exact(type(base), base.config)


@torch.no_grad()
def cache_is_exact(model: PreTrainedModel | PeftModel) -> bool:
    """True if a prompt, and token after token behind it, give the logits of the whole sequence with the cache that the model keeps itself.

    Prompts are of one token, of fewer than a convolution reaches, and of more. What starts only at a length beyond is asked as above. A model
    that encodes long sequences otherwise than short ones answers False.
    """
    base = _base_of(model)
    if length_rule(base.config) is not None or not _cache_agrees(base, model):
        return False
    if not _boundaries(base.config.get_text_config()):
        return True
    try:
        small = _scaled_down(type(base), base.config)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return _cache_agrees(small, small)


@torch.no_grad()
def small_is_exact(made: type[PreTrainedModel], config: Any) -> bool:
    """The same of a small random model of such a config; False where that cannot be made."""
    if not set(getattr(config.get_text_config(), "layer_types", None) or ()) <= _LAYER_TYPES:
        return False
    attention.register()
    try:
        small = _scaled_down(made, config)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return _agrees(small, small)


def _base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model  # pyright: ignore


def _cache_agrees(model: PreTrainedModel, called: Any) -> bool:
    generator, rows = torch.Generator().manual_seed(0), min(model.config.get_text_config().vocab_size, 1000)
    reference: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    try:
        for length in _PROMPTS:
            ids = tuple(torch.randint(rows, (length + _CACHED_STEPS,), generator=generator).tolist())
            reference.append(_single(model, called, _seq((*ids, 0)))[length - 1 :])
            scores_V, cache = run_on(called, ids[:length])
            found.append(scores_V.float())
            for token in ids[length:]:
                scores_V, cache = run_on(called, (token,), cache)
                found.append(scores_V.float())
    except (AttributeError, IndexError, KeyError, ModelError, RuntimeError, TypeError, ValueError):
        return False
    whole = torch.cat(reference)
    return float((torch.stack(found) - whole).abs().max()) <= _tolerance(model) * (float(whole.abs().max()) + 1.0)


def _tolerance(model: PreTrainedModel) -> float:
    """Of logits, relative to the largest."""
    return 2e-2 if next(model.parameters()).dtype != torch.float32 or _is_quantized(model) else 1e-3


def _agrees(model: PreTrainedModel, called: Any) -> bool:
    """`called` is what the model is run through: itself, or what wraps it."""
    original = model.config._attn_implementation or "eager"
    families = _probe(model.config.get_text_config().vocab_size)
    try:
        # The eager path is the model's definition; torch's fused attention silently leaves soft caps out.
        model.set_attn_implementation("eager")
        alone = [_single(model, called, sequence) for family in families for sequence in family]
        model.set_attn_implementation(attention.NAME)
        together = _packed(model, called, families)
        disturbed = _packed(model, called, [[_other_tokens(families[0][0])], *families[1:]])
    except (ModelError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.set_attn_implementation(original)
    reference = torch.cat(alone)
    first = len(alone[0])
    scale = float(reference.abs().max()) + 1.0
    equal = float((together - reference).abs().max()) <= _tolerance(model) * scale
    isolated = float((disturbed[first:] - together[first:]).abs().max()) <= 1e-4 * scale
    return equal and isolated


def _boundaries(text: Any) -> dict[str, int]:
    """Lengths by key at which attention begins to differ, where the model's own probe does not cross them."""
    found: dict[str, Any] = {
        name: getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "floor_scale")
    }
    rule = length_rule(text)
    originals = [rope.get(_ORIGINAL) for rope in rope_parameters(text)]
    found["rope"] = max((size for size in (*originals, rule and rule.boundary) if size), default=None)
    return {name: size for name, size in found.items() if size and size >= _LONGEST // 2}


def _scaled_down(made: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A small random model of this class: the first layer of each kind, few heads and experts, short boundaries."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text: Any = config.get_text_config()
    for name, size in _boundaries(text).items():
        if name == "rope":
            _scale_rope(text, size)
        else:
            setattr(text, name, _BOUNDARY // 2 if name == "sliding_window" else _BOUNDARY)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    grouped = getattr(text, "num_key_value_heads", text.num_attention_heads) < text.num_attention_heads
    sizes = {
        "num_hidden_layers": _layers_of_each_type(text), "num_attention_heads": 4, "num_key_value_heads": 2 if grouped else 4,
        "hidden_size": 4 * head_dim, "intermediate_size": 8 * head_dim, "intermediate_size_mlp": 8 * head_dim,
        "moe_intermediate_size": 4 * head_dim, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 256, "pad_token_id": 0,
        # Weights of this size make attention uneven: what a token attends to must move its logits.
        "initializer_range": (4 * head_dim) ** -0.5,
    }  # fmt: skip
    for name, size in sizes.items():
        present: Any = getattr(text, name, None)
        if present is not None:
            setattr(text, name, size if isinstance(size, float) else min(size, present))
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made._from_config(config, dtype=torch.float32).eval()


def _scale_rope(text: Any, boundary: int) -> None:
    for rope in rope_parameters(text):
        if _ORIGINAL in rope:
            rope[_ORIGINAL] = _BOUNDARY
    if getattr(text, _ORIGINAL, None):
        setattr(text, _ORIGINAL, _BOUNDARY)
    # With `dynamic` this is the boundary itself; with others its ratio to the original says how far to stretch.
    text.max_position_embeddings = max(1, text.max_position_embeddings // boundary) * _BOUNDARY


def _layers_of_each_type(text: Any) -> int:
    types = list(getattr(text, "layer_types", None) or ())
    last = max((types.index(kind) for kind in set(types)), default=0)
    return max(2, last + 1)


def _is_quantized(model: PreTrainedModel) -> bool:
    return getattr(model, "quantization_method", None) is not None


def _probe(vocab: int) -> list[list[TokenSeq]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(min(vocab, 1000), (length,), generator=generator).tolist())

    prefix = ids(9)
    branch = ids(6)
    # Three levels: two branches go on together, and the one between them does not.
    family = [prefix + branch + ids(3), prefix + ids(_LONGEST - 9), prefix + branch + ids(9)]
    # Inputs are a token less: just below the boundary, at it, and above it.
    edges = [[_seq(ids(_BOUNDARY + 1 + beyond))] for beyond in (-1, 0, 1)]
    return [[_seq(ids(12))], [_seq(branch) for branch in family], [_seq(ids(7))], *edges]


def _seq(ids: tuple[int, ...]) -> TokenSeq:
    return TokenSeq(ids, (True,) * len(ids))


def _other_tokens(sequence: TokenSeq) -> TokenSeq:
    return _seq(tuple(reversed(sequence.ids)))


def _single(model: PreTrainedModel, called: Any, sequence: TokenSeq) -> torch.Tensor:
    ids = torch.tensor([sequence.ids[:-1]], device=model.device)
    forget_lengths(model)
    return called(input_ids=ids, use_cache=False).logits[0].float()


def _packed(model: PreTrainedModel, called: Any, families: list[list[TokenSeq]]) -> torch.Tensor:
    batch = pack(families, least_shared=1).to(model.device)
    logits: list[torch.Tensor] = []
    order: list[torch.Tensor] = []
    for part, places in by_encoding(model, batch):
        output = called(
            input_ids=part.input_ids_N[None],
            position_ids=part.position_ids_N[None],
            logits_to_keep=part.source_M,
            use_cache=False,
            layout=part.layout,
        )
        logits.append(output.logits[0].float())
        order.append(torch.arange(len(batch.source_M), device=model.device) if places is None else places)
    return torch.cat(logits)[torch.cat(order).argsort()]
