"""Does the ragged layout mean the same to this model as running each sequence by itself? Asked once, at load."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from posttrain.errors import ModelError
from posttrain.models import attention
from posttrain.models.batch import pack
from posttrain.types import TokenSeq

_LONGEST = 40


@torch.no_grad()
def ragged_is_exact(model: PreTrainedModel) -> bool:
    """True if packed documents and shared prefixes give the logits of single runs, and no document sees another.

    Models with state-space or linear attention, or attention terms the layout cannot express, answer False. Windows
    shorter than the probe are exercised by it; longer ones are masked by the same code.
    """
    original = model.config._attn_implementation or "eager"
    families = _probe(model.config.get_text_config().vocab_size)
    try:
        # The eager path is the model's definition; torch's fused attention silently leaves soft caps out.
        model.set_attn_implementation("eager")
        alone = [_single(model, sequence) for family in families for sequence in family]
        model.set_attn_implementation(attention.NAME)
        together = _packed(model, families)
        disturbed = _packed(model, [[_other_tokens(families[0][0])], *families[1:]])
    except (ModelError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        model.set_attn_implementation(original)
    reference = torch.cat(alone)
    first = len(alone[0])
    tolerance = 2e-2 if next(model.parameters()).dtype != torch.float32 or _is_quantized(model) else 1e-3
    scale = float(reference.abs().max()) + 1.0
    equal = float((together - reference).abs().max()) <= tolerance * scale
    isolated = float((disturbed[first:] - together[first:]).abs().max()) <= 1e-4 * scale
    return equal and isolated


def _is_quantized(model: PreTrainedModel) -> bool:
    return getattr(model, "quantization_method", None) is not None


def _probe(vocab: int) -> list[list[TokenSeq]]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(min(vocab, 1000), (length,), generator=generator).tolist())

    prefix = ids(9)
    family = [prefix + ids(6), prefix + ids(_LONGEST - 9)]
    return [[_seq(ids(12))], [_seq(branch) for branch in family], [_seq(ids(7))]]


def _seq(ids: tuple[int, ...]) -> TokenSeq:
    return TokenSeq(ids, (True,) * len(ids))


def _other_tokens(sequence: TokenSeq) -> TokenSeq:
    return _seq(tuple(reversed(sequence.ids)))


def _single(model: PreTrainedModel, sequence: TokenSeq) -> torch.Tensor:
    ids = torch.tensor([sequence.ids], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, :-1].float()


def _packed(model: PreTrainedModel, families: list[list[TokenSeq]]) -> torch.Tensor:
    batch = pack(families).to(model.device)
    output = model(
        input_ids=batch.input_ids_N[None],
        position_ids=batch.position_ids_N[None],
        logits_to_keep=batch.source_M,
        use_cache=False,
        layout=batch.layout,
    )
    return output.logits[0].float()
