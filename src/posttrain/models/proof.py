"""The proof of an export: the logits of the trained policy, in float32, beside those of what is written to the folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.distributed.precision import without_mixed_precision
from posttrain.errors import ModelError
from posttrain.models.lengths import forget_lengths

_PROBE_TOKENS = 64
ROUNDING, HALF_ROUNDING = 1e-4, 0.1
"""Bounds on the largest difference of two logits over the largest logit: of float32 sums in another order, of weights
rounded to a half-precision dtype."""
QUANTISATION = 4.0
"""How many times what quantising did to the base an adapter merged onto the original base may be off."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """How far what was written is from the trained policy, in logits of one probe, all computed in float32.

    `base` says what an adapter was merged onto: base, dequantized or original; "" where there is none.
    `max_logit_difference` is that before the weights were cast to `dtype`, `cast_difference` that of the folder.
    """

    base: str
    dtype: str
    max_logit: float
    max_logit_difference: float
    cast_difference: float

    @property
    def relative(self) -> float:
        return self.max_logit_difference / max(self.max_logit, 1e-6)


@torch.no_grad()
def probe_logits(model: Any) -> torch.Tensor:
    """Logits of a fixed probe, computed in float32 by eager attention, whatever the model is held in. Shape: [T, V].

    `model` is a transformers model, or one of PEFT's around it. All ranks of a sharded model call it.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    rows = base.config.get_text_config().vocab_size
    ids = torch.randint(rows, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    attention, training = base.config._attn_implementation or "eager", model.training
    try:
        # The eager path is the model's definition; torch's fused attention silently leaves soft caps out.
        base.set_attn_implementation("eager")
        model.eval()
        forget_lengths(base)
        with in_float32(model):
            return model(input_ids=ids.to(base.device), use_cache=False).logits[0].float().cpu()
    finally:
        base.set_attn_implementation(attention)
        model.train(training)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Half-precision weights are lifted while their layer runs: the memory of one layer, and nothing is rounded.

    A layer's are lifted together, for its modules read each other's weights (convolutions, PEFT's experts and DoRA). Shares
    that are computed with in half precision are gathered as they are held.
    """
    lifted: dict[int, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
    layers = {id(layer) for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part}

    def lift(module: torch.nn.Module, _: Any) -> None:
        found = module.parameters(recurse=id(module) in layers)
        lifted[id(module)] = [(p, p.data) for p in found if p.dtype in (torch.bfloat16, torch.float16)]
        for parameter, data in lifted[id(module)]:
            parameter.data = data.float()

    def lower(module: torch.nn.Module, _: Any, __: Any) -> None:
        for parameter, data in lifted.pop(id(module), ()):
            parameter.data = data

    quantised = [module for module in model.modules() if hasattr(module, "compute_dtype")]
    # What a 4-bit layer computes in, and what it unpacks to for those who ask for its weights (DoRA's norm).
    dtypes = [(module.compute_dtype, module.weight.quant_state.dtype) for module in quantised]
    hooks = [module.register_forward_pre_hook(lift) for module in model.modules()]
    hooks += [module.register_forward_hook(lower) for module in model.modules()]
    try:
        for module in quantised:
            module.compute_dtype = module.weight.quant_state.dtype = torch.float32
        with without_mixed_precision(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, data in (pair for pairs in lifted.values() for pair in pairs):
            parameter.data = data
        for module, given in zip(quantised, dtypes, strict=True):
            module.compute_dtype, module.weight.quant_state.dtype = given


def compared(trained: torch.Tensor, found: torch.Tensor, base: str, bound: float) -> ExportReport:
    """The model to be written beside the trained one. Raises: ModelError if they differ by more than `bound`."""
    difference = float((trained - found).abs().max())
    report = ExportReport(base, "float32", float(trained.abs().max()), difference, difference)
    _hold(difference, report, bound, f"merging the adapter onto the {base} weights changes")
    return report


def relative_difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max()) / max(float(expected.abs().max()), 1e-6)


def compared_folder(
    trained: torch.Tensor, written: torch.Tensor, report: ExportReport, dtype: torch.dtype
) -> ExportReport:
    """The folder, as transformers reads it, beside the trained policy. Raises: ModelError past the dtype's rounding."""
    by_token = (trained - written).abs().amax(-1)
    difference = float(by_token.max())
    # What merging was allowed to change is in the folder too. In a lower precision the middle token is held: a router
    # may send a single one elsewhere.
    bound = report.relative + (ROUNDING if dtype == torch.float32 else HALF_ROUNDING)
    name = str(dtype).removeprefix("torch.")
    held = difference if dtype == torch.float32 else float(by_token.median())
    _hold(held, report, bound, f"writing the model in {name} changes")
    return replace(report, dtype=name, cast_difference=difference)


def _hold(difference: float, report: ExportReport, bound: float, what: str) -> None:
    if not difference <= bound * max(report.max_logit, 1e-6):
        raise ModelError(
            f"{what} the logits by {difference:.2e} of {report.max_logit:.2e}, more than rounding ({bound:.0e} relative): "
            "the exported model would not be the trained one; the adapter is kept, the model is not"
        )
