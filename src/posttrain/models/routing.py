"""Which experts a step's tokens went to: loads of a mixture of experts, counted while it is trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import OutputRecorder

from posttrain.protocols import Ranks


class RouterLoads:
    """Tokens that each expert of each layer was given since it was last asked, and how undecided routers were.

    Only passes inside of `counting` with a gradient count. A layer that is recomputed counts twice, as its other tokens do.
    """

    def __init__(self, routers: Sequence[nn.Module], logits_at: int, per_token: int) -> None:
        self._logits_at, self._per_token, self._counts = logits_at, per_token, False
        self._loads: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._seen, layer))

    @contextmanager
    def counting(self, *, on: bool) -> Iterator[None]:
        """`on` is False for rows that weigh nothing."""
        self._counts = on
        try:
            yield
        finally:
            self._counts = False

    def _seen(self, layer: int, router: nn.Module, given: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        if not (self._counts and torch.is_grad_enabled()):
            return
        output = (output,) if isinstance(output, Tensor) else output
        logits_TE = output[self._logits_at].detach().flatten(0, -2).float()
        chosen = next((part for part in output if not part.is_floating_point()), None)
        if chosen is None:
            chosen = logits_TE.topk(self._per_token, -1).indices
        chosen = chosen.flatten()
        load_E = torch.zeros_like(logits_TE[0]).scatter_add_(0, chosen, torch.ones_like(chosen, dtype=logits_TE.dtype))
        entropy = torch.special.entr(logits_TE.softmax(-1)).sum()
        self._loads[layer] = self._loads.get(layer, 0.0) + load_E.double()
        self._entropy[layer] = self._entropy.get(layer, 0.0) + entropy.double()

    def metrics(self, ranks: Ranks) -> dict[str, float]:
        """Of all `ranks` since the last call; nothing where no token was counted. All ranks call it."""
        mine = [[*self._loads[layer].tolist(), float(self._entropy[layer])] for layer in sorted(self._loads)]
        self._loads, self._entropy = {}, {}
        known = [rank for rank in ranks.gather(mine) if rank]
        if not known:
            return {}
        found_LE = torch.tensor(known, dtype=torch.float64).sum(0)
        return load_metrics(found_LE[:, :-1], found_LE[:, -1], self._per_token)


def load_metrics(load_LE: Tensor, entropy_L: Tensor, per_token: int) -> dict[str, float]:
    """`load_LE`: tokens of each expert; `entropy_L`: summed over tokens, in nats.

    max_load: tokens of the busiest expert over the mean, in the layer where that is most; balance: in the layer where it is least, how
    even loads are, 1 for all alike and 0 where every token goes to the same experts (the entropy of loads between ln k and ln E);
    idle: experts of all layers that no token went to; entropy: of a router's distribution over its largest, ln E.
    """
    experts = load_LE.shape[1]
    share_LE = load_LE / load_LE.sum(1, keepdim=True)
    spread_L = torch.special.entr(share_LE).sum(1)
    least = math.log(per_token)
    room = math.log(experts) - least
    return {
        "router/max_load": float(share_LE.max() * experts),
        "router/balance": max(0.0, float((spread_L.min() - least) / room)) if room else 1.0,
        "router/idle": float((load_LE == 0).double().mean()),
        "router/entropy": float(entropy_L.sum() * per_token / load_LE.sum() / math.log(experts)),
    }


def router_loads(model: nn.Module) -> RouterLoads | None:
    """Counts in the routers of a model, as transformers names them for its own balancing loss.

    None where it has none, or where those are not the logits of one choice of so many experts a token (Gemma 4, JetMoE).
    """
    recorded: Any = next(
        (table["router_logits"] for m in model.modules() if "router_logits" in (table := recorders(m))), None
    )
    text: Any = model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    per_token = getattr(text, "num_experts_per_tok", None)
    if not isinstance(recorded, OutputRecorder) or per_token is None:
        return None
    routers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, recorded.target_class) and name.endswith(recorded.layer_name or "")
    ]
    return RouterLoads(routers, recorded.index, per_token) if routers else None


def recorders(module: nn.Module) -> dict[str, Any]:
    """What transformers can record of a module; not all of its classes say."""
    return getattr(module, "_can_record_outputs", None) or {}
