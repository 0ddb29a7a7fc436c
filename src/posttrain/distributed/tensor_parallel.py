"""Tensor parallelism: neighbours go through the same tokens, and each holds a part of every matrix of a layer, by the model's own plan.

Source: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053. What is done to a module of the plan is transformers' own. Experts are
dealt whole to the same neighbours (expert parallelism). Embedding, last norm and head are in no part: the neighbours score a part
of the micro-batch's rows each. Of an adapter that matrix is cut which meets the cut side of its layer, the other one lies alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from posttrain.distributed.sequence import gathered_rows
from posttrain.errors import ModelError

DENSE = frozenset({"colwise", "rowwise"})
EXPERTS = frozenset({"grouped_gemm", "ep_dispatch_experts"})
ADAPTED = {"colwise": "lora_B.default", "rowwise": "lora_A.default"}
"""Which of a layer's two matrices of low rank is cut as the layer is, by the layer's style."""
PER_HEAD = "replicated_with_grad_allreduce"
"""Of norms that each neighbour runs on its own heads: their weights are alike, and their gradients add up."""


@dataclass(frozen=True)
class ParallelPlan:
    """What becomes of the modules inside of layers: transformers' styles by name, numbers of layers as `*`."""

    dense: Mapping[str, str]
    experts: Mapping[str, str]
    per_head: frozenset[str]

    @classmethod
    def of(cls, tensor: Mapping[str, str], expert: Mapping[str, str]) -> ParallelPlan:
        """Of a model's two plans, or of its config's; experts are dealt by the second, where there is one."""
        experts = {name: style for name, style in expert.items() if "*" in name}
        dealt = tuple(f"{name}." for name in experts)
        inside = {n: s for n, s in tensor.items() if "*" in n and n not in experts and not n.startswith(dealt)}
        per_head = frozenset(name for name, style in inside.items() if style == PER_HEAD)
        return cls({n: s for n, s in inside.items() if n not in per_head}, experts, per_head)

    @property
    def others(self) -> list[str]:
        """The styles that are not proven here, by name."""
        found = [f"{name}: {style}" for name, style in self.dense.items() if style not in DENSE]
        return found + [f"{name}: {style}" for name, style in self.experts.items() if style not in EXPERTS]


@dataclass(frozen=True)
class TensorGroup:
    """Neighbours that hold a layer between them; `mesh` is theirs alone, `place` this rank's among them."""

    mesh: Any
    group: Any
    size: int
    place: int

    def split(self, num_scored: int) -> ScoredSplit:
        each, more = divmod(num_scored, self.size)
        return ScoredSplit(self, tuple(each + (place < more) for place in range(self.size)))

    def cut(self, model: Any, layers: list[nn.Module]) -> None:
        """A rank's part in the place of each parameter that the plan names, and around its module what the ranks exchange."""
        from transformers.distributed.tensor_parallel import (
            apply_expert_parallelism,
            apply_tensor_parallelism,
            replace_layer_number_by_wildcard,
        )

        plan = ParallelPlan.of(model.tp_plan, model.ep_plan)
        assert plan.dense and not plan.others, "refused before it is loaded"
        _refuse_other_parts(model, layers)
        apply_tensor_parallelism(model, self.mesh, dict(plan.dense))
        if plan.experts:
            apply_expert_parallelism(model, self.mesh, self.mesh, dict(plan.experts))
        for name, module in model.named_modules():
            if replace_layer_number_by_wildcard(name) in plan.per_head:
                module.forward = partial(_with_summed_gradients, module, module.forward, self.group)
        layers[0].register_forward_pre_hook(self._shared_gradient, with_kwargs=True)
        layers[-1].register_forward_hook(self._summed_gradient)

    def cut_adapter(self, model: Any) -> None:
        """The same for the adapters that were put on a model that is cut. Raises: ModelError for others than those of linear layers."""
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        refuse_other_adapters(model)
        base = model.get_base_model()
        plan = ParallelPlan.of(base.tp_plan, base.ep_plan)
        apply_tensor_parallelism(base, self.mesh, {f"{n}.{ADAPTED[style]}": style for n, style in plan.dense.items()})

    def _shared_gradient(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Every neighbour has the whole gradient of what layers are given; before them they add up."""
        share: Callable[[Tensor], Any] = partial(_ShareGradient.apply, self.size)
        if given:
            return (share(given[0]), *given[1:]), named
        return given, {**named, "hidden_states": share(named["hidden_states"])}

    def _summed_gradient(self, _: nn.Module, __: Any, output: Any) -> Any:
        """Behind the layers a neighbour has the gradient of its own rows; in them each wants the whole."""
        if isinstance(output, tuple):
            return (_SumGradient.apply(output[0], self.group), *output[1:])
        return _SumGradient.apply(output, self.group)


@dataclass(frozen=True)
class ScoredSplit:
    """How many of a micro-batch's scored rows each rank of a group scores, one after the other; all run all of its tokens."""

    ranks: TensorGroup
    lengths: tuple[int, ...]

    def part(self, batch: Any) -> tuple[Any, Tensor]:
        """What a rank scores of the batch, and the places of it."""
        ends = list(accumulate(self.lengths, initial=0))
        own = slice(ends[self.ranks.place], ends[self.ranks.place + 1])
        part = replace(batch, source_M=batch.source_M[own], target_M=batch.target_M[own], seq_M=batch.seq_M[own])
        return part, torch.arange(own.start, own.stop, device=batch.source_M.device)

    def whole(self, part: Tensor, places: Tensor, length: int) -> Tensor:
        """See `UlyssesSplit.whole`."""
        return gathered_rows(part, places, length, self.ranks.group)


def _refuse_other_parts(model: Any, layers: list[nn.Module]) -> None:
    """Raises: ModelError for weights whose gradient would be neither that of a layer nor that of a row."""
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    # Of a head the neighbours run their own rows, whether it gives tokens or a reward.
    heads = [module for module in model.children() if isinstance(module, nn.Linear)]
    ends = (model.get_input_embeddings(), model.get_output_embeddings(), *heads)
    for name, module in model.named_modules():
        known = module in ends or type(module).__name__.endswith("Norm")
        if not known and any(id(parameter) not in inside for parameter in module.parameters(recurse=False)):
            raise ModelError(
                f"sharding.tensor_parallel_size: {name} ({type(module).__name__}) has weights outside of the layers, where only embedding, "
                "norm and head are proven; set it to 1"
            )


def refuse_other_adapters(adapted: Any) -> None:
    """Raises: ModelError for what is trained beside A and B of linear layers."""
    linear = {name for name, module in adapted.named_modules() if isinstance(module, nn.Linear)}
    for name, parameter in adapted.named_parameters():
        layer, _, matrix = name.rpartition(".lora_")
        if parameter.requires_grad and not (matrix[:1] in ("A", "B") and f"{layer}.base_layer" in linear):
            raise ModelError(
                f"sharding.tensor_parallel_size: with an adapter {name} is trained, where only A and B of linear layers are proven; take it "
                "out of the adapter, or set it to 1"
            )


def _with_summed_gradients(
    module: nn.Module, forward: Callable[..., Any], group: Any, *given: Any, **named: Any
) -> Any:
    own = dict(module._parameters)
    summed: Any = {name: _SumGradient.apply(p, group) for name, p in own.items() if p is not None}
    module._parameters.update(summed)
    try:
        return forward(*given, **named)
    finally:
        module._parameters.update(own)


class _ShareGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, values: Tensor) -> Tensor:
        ctx.size = size
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, grad / ctx.size


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
