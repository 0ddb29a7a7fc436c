"""Which experts tokens go to: loads of a mixture of experts, counted while it is trained; choices, taken down and made again."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils.output_capturing import OutputRecorder

from posttrain.errors import ModelError
from posttrain.models.lengths import length_rule
from posttrain.protocols import Ranks

ONE_CHOICE = frozenset({"mixtral", "qwen2_moe", "qwen3_moe"})
"""Model types whose routers choose once, by one top-k, and for which it is tested that another choice can be put in its place."""
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class RouterLoads:
    """Tokens that each expert of each layer was given since it was last asked, and how undecided routers were.

    Only passes inside of `counting` with a gradient count. A layer that is recomputed counts twice, as its other tokens do.
    """

    def __init__(
        self, routers: Sequence[nn.Module], logits_at: int, per_token: int, choices: ExpertChoices | None = None
    ) -> None:
        self._logits_at, self._per_token, self._counts, self._choices = logits_at, per_token, False, choices
        self._loads: dict[int, Tensor] = {}
        self._entropy: dict[int, Tensor] = {}
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._seen, layer))

    @contextmanager
    def counting(self, *, on: bool) -> Iterator[None]:
        """`on` is False for rows that weigh nothing."""
        self._counts = on
        try:
            with self._choices.comparing(on=on) if self._choices else nullcontext():
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
        mismatch = self._choices.mismatch(ranks) if self._choices else {}
        if not known:
            return mismatch
        found_LE = torch.tensor(known, dtype=torch.float64).sum(0)
        return load_metrics(found_LE[:, :-1], found_LE[:, -1], self._per_token) | mismatch


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


def router_loads(model: nn.Module, choices: ExpertChoices | None = None) -> RouterLoads | None:
    """Counts in the routers of a model; None where it has none that can be counted."""
    found, recorded, per_token = _routers(model)
    return RouterLoads(list(found.values()), recorded.index, per_token, choices) if found else None


def _routers(model: nn.Module) -> tuple[dict[str, nn.Module], Any, int]:
    """The routers of a model, as transformers names them for its own balancing loss; what it records of them, and experts a token.

    None where it has none, or where those are not the logits of one choice of so many experts a token (Gemma 4, JetMoE).
    """
    recorded: Any = next(
        (table["router_logits"] for m in model.modules() if "router_logits" in (table := recorders(m))), None
    )
    per_token = getattr(_text_config(model), "num_experts_per_tok", None)
    if not isinstance(recorded, OutputRecorder) or per_token is None:
        return {}, None, 0
    routers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, recorded.target_class) and name.endswith(recorded.layer_name or "")
    }
    return routers, recorded, per_token


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def recorders(module: nn.Module) -> dict[str, Any]:
    """What transformers can record of a module; not all of its classes say."""
    return getattr(module, "_can_record_outputs", None) or {}


# --- choices -------------------------------------------------------------------------------------------------------


class ExpertChoices:
    """The experts that a model's routers choose: taken down, compared with recorded ones, or replaced by them.

    A router runs as it is, and only its top-k is answered otherwise: so the weights of the recorded experts come from its own logits, and
    the gradient goes through them. Source: R3, arXiv 2510.11370; differs: only tokens behind which one was sampled go where the
    engine sent them, the rest of the prompt where this model sends it.
    Shapes: T tokens of a forward, L layers of the model, K experts a token; layers without experts hold 0, as in vLLM.
    """

    def __init__(self, routers: Mapping[str, nn.Module], num_layers: int, num_experts: int, *, replaces: bool) -> None:
        self._num_layers, self._replaces = num_layers, replaces
        self._dtype = np.uint8 if num_experts <= 256 else np.uint16
        self._given: Tensor | None = None
        self._taken: dict[int, list[Tensor]] | None = None
        self._compares = False
        self._differing, self._compared = torch.zeros(()), torch.zeros(())
        for name, router in routers.items():
            [layer] = map(int, _LAYER.findall(name))
            router.forward = partial(self._run, layer, router.forward)

    def _run(self, layer: int, forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if self._given is None and self._taken is None:
            return forward(*args, **options)
        with _Answered(partial(self._chosen, layer)):
            return forward(*args, **options)

    def _chosen(self, layer: int, own_TK: Tensor) -> Tensor:
        """What goes in the place of a router's own choice."""
        if self._taken is not None:
            self._taken.setdefault(layer, []).append(own_TK)
            return own_TK
        assert self._given is not None
        given_TK = self._given[:, layer].to(own_TK)
        is_given_T = given_TK[:, 0] >= 0
        if self._compares and torch.is_grad_enabled():
            differs_T = (given_TK.sort(-1).values != own_TK.sort(-1).values).any(-1)
            # Not as numbers: on a GPU the host would wait in each layer.
            self._differing = self._differing.to(own_TK.device) + (differs_T & is_given_T).sum()
            self._compared = self._compared.to(own_TK.device) + is_given_T.sum()
        return torch.where(is_given_T[:, None], given_TK, own_TK) if self._replaces else own_TK

    @contextmanager
    def recording(self) -> Iterator[list[np.ndarray]]:
        """Inside, choices are taken down; afterwards the list holds those of all tokens that went through, in order. Shape: [T, L, K]."""
        found: list[np.ndarray] = []
        self._given, self._taken = None, {}
        try:
            yield found
            parts = {layer: torch.cat(taken) for layer, taken in self._taken.items()}
            first = next(iter(parts.values()))
            nothing = torch.zeros_like(first)
            found_TLK = torch.stack([parts.get(layer, nothing) for layer in range(self._num_layers)], 1)
            found.append(found_TLK.cpu().numpy().astype(self._dtype))
        finally:
            self._taken = None

    @contextmanager
    def given(self, routed_TLK: Tensor | None) -> Iterator[None]:
        """Inside, these are the recorded ones, -1 where nothing was recorded; with a gradient also behind it, where layers are run again."""
        self._given = routed_TLK
        try:
            yield
        finally:
            if not torch.is_grad_enabled():
                self._given = None

    @contextmanager
    def comparing(self, *, on: bool) -> Iterator[None]:
        """A micro-batch, its backward included."""
        self._compares = on
        try:
            yield
        finally:
            self._compares, self._given = False, None

    def mismatch(self, ranks: Ranks) -> dict[str, float]:
        """Of what was compared since the last call, the share of pairs of a token and a layer that went to other experts. All ranks call it."""
        differing, compared = ranks.sum([float(self._differing), float(self._compared)])
        self._differing, self._compared = torch.zeros(()), torch.zeros(())
        return {"router/mismatch": differing / compared} if compared else {}


class _Answered(TorchFunctionMode):
    """Inside, the indices of a top-k are what `choose` makes of them, and its values those at these indices."""

    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in (torch.topk, Tensor.topk):
            return found
        chosen = self._choose(found.indices)
        if chosen is found.indices:
            return found
        return torch.return_types.topk((args[0].gather(-1, chosen), chosen))


def expert_choices(model: nn.Module, how: Literal["compare", "replay"], source: str, *, ragged: bool) -> ExpertChoices:
    """Those of a model's routers. Raises: ModelError for a model in which they cannot be recorded and replaced."""
    config, routers = _text_config(model), _routers(model)[0]
    refuse_other_routers(config, how, source)
    if not routers:
        raise _unchosen(how, source, "has no layer with experts")
    if not ragged:
        raise _unchosen(how, source, _ONE_BY_ONE)
    num_experts: Any = next(iter(routers.values())).num_experts
    return ExpertChoices(routers, config.num_hidden_layers, num_experts, replaces=how == "replay")


def refuse_other_routers(config: Any, how: str, source: str) -> None:
    """What a model's config alone says. Raises: ModelError for one whose choices cannot be recorded and replaced."""
    text = config.get_text_config()
    if text.model_type not in ONE_CHOICE:
        known = ", ".join(sorted(ONE_CHOICE))
        raise _unchosen(how, source, f"is a {text.model_type}, and choices of experts are known of {known}")
    if length_rule(text) is not None:
        raise _unchosen(how, source, _ONE_BY_ONE)


_ONE_BY_ONE = "is run sequence by sequence, or encoded otherwise by length"


def _unchosen(how: str, source: str, why: str) -> ModelError:
    return ModelError(f"rollout.routed_experts: {how}: {source} {why}; set rollout.routed_experts: off")
