"""The model in use: one forward for training and scoring, and the same weights as their own reference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.config.stages import ModelKeys
from posttrain.distributed.whole import Whole
from posttrain.models.batch import Batch, pack
from posttrain.models.device import Placement
from posttrain.models.embedding_noise import noisy_embeddings
from posttrain.models.exact import score_tiles, value_of
from posttrain.models.float32_head import Float32Head
from posttrain.models.lengths import by_encoding, forget_lengths, length_rule
from posttrain.models.offload import OffloadedLayers
from posttrain.models.routing import ExpertChoices, RouterLoads
from posttrain.models.sequence import balancing_loss
from posttrain.models.weights import NamedTensors, Only, named_weights
from posttrain.objectives.distill import Head
from posttrain.objectives.logprobs import chunked_logprobs, token_entropy, token_logprobs
from posttrain.objectives.terms import LossTerms
from posttrain.protocols import RowSplit, Sharding, TokenSplit
from posttrain.types import Ratio, TokenSeq

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, slots=True)
class Scores:
    """Per scored token of a batch. Shapes: logp_M, entropy_M (nats; where asked for), top1_M (bool; where asked for or free).

    `aux_loss` is the router's load-balancing loss of a mixture-of-experts model, else None.
    """

    logp_M: torch.Tensor
    entropy_M: torch.Tensor | None
    top1_M: torch.Tensor | None
    aux_loss: torch.Tensor | None = None


@dataclass
class Policy:
    """A model with its tokenizer. `ragged` says whether packed sequences are exact for it; of one for which they are not, `cache_is_exact`
    whether the cache that it keeps itself is.

    `source` is the model that it started from. `under` is how the weights under its adapter load: `source`, or the base of
    the adapter that is trained on. `base_moved` says that the adapter's init moved a part of that base into it. `exact` says
    that a token's scores are the same to the bit whatever they are computed with (`models/exact.py`).
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    placement: Placement
    ragged: bool
    source: str
    under: ModelKeys
    cache_is_exact: bool = False
    base_moved: bool = False
    sharding: Sharding = field(default_factory=Whole)
    exact: bool = False
    start: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    """What is trained, as it was at the start, where the model without its adapter is not that start."""
    frozen: Policy | None = field(default=None, repr=False)
    """A copy of the given model, where it is not this one without its adapter (`load.freeze_reference`)."""
    frozen_follows: bool = False
    """Whether that copy is moved towards the model in training, and so belongs into a checkpoint."""
    routing: RouterLoads | None = field(default=None, repr=False)
    """What goes to which expert, of a mixture of experts in training."""
    choices: ExpertChoices | None = field(default=None, repr=False)
    """Its routers' choices, where they are recorded, or held against recorded ones."""
    offloaded: OffloadedLayers | None = field(default=None, repr=False)
    """The layers whose frozen weights lie in the machine's memory, where they do."""
    embedding_noise: float = 0.0
    """NEFTune's alpha: noise on the embeddings in a training forward."""

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model, adapter layers in place where there are any."""
        return self.model.get_base_model() if self.has_adapter else self.model  # pyright: ignore

    @property
    def has_adapter(self) -> bool:
        # Not isinstance: importing PEFT costs seconds, and only adapters need it.
        return hasattr(self.model, "peft_config")

    @property
    def sharded(self) -> bool:
        return self.sharding.is_sharded

    def without_dropout(self) -> Policy:
        """No dropout at all: log-probs of the same tokens must be the same whenever they are computed."""
        modules: list[Any] = list(self.model.modules())
        for module in modules:
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0  # pyright: ignore[reportArgumentType]
        return self

    def with_aux_loss(self, terms: LossTerms, aux_loss: torch.Tensor | None, share: float) -> LossTerms:
        """Add the router's balancing loss of a mixture-of-experts model, weighted by the micro-batch's share of the step."""
        if aux_loss is None:
            return terms
        coefficient = self.base.config.get_text_config().router_aux_loss_coef
        metrics = terms.metrics | {"aux_loss": Ratio(float(aux_loss.detach()) * share, share)}
        return LossTerms(terms.loss + coefficient * share * aux_loss, metrics)

    def weights(self, only: Only) -> NamedTensors:
        """See `named_weights`."""
        return named_weights(self, only)

    def adapter_config(self) -> dict[str, Any]:
        """`adapter_config.json`, as PEFT writes it."""
        config: Any = cast("PeftModel", self.model).peft_config["default"]
        values: dict[str, Any] = {**config.to_dict(), "inference_mode": True}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}

    def trainable(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def score(self, batch: Batch, *, temperature: float = 1.0, entropy: bool = False, top1: bool = False) -> Scores:
        """Scores of the batch's trained tokens; logits are computed at those positions only."""
        batch = batch.to(self.placement.device)
        with self.placement.autocast():
            if not self.exact:
                return self._score(batch, temperature, entropy, top1)
            values = Scores(*score_tiles(self.model, batch, temperature, entropy))
            if not torch.is_grad_enabled():
                return values
            return _with_gradient(values, self._score(batch, temperature, entropy, top1))

    def _score(self, batch: Batch, temperature: float, entropy: bool, top1: bool) -> Scores:
        if self.ragged and length_rule(self.base.config) is None:
            return self._score_together(batch, temperature, entropy, top1)
        parts = self._parts(batch)
        # Ranks of a sharded model call it equally often; known before the first call, which is a collective itself.
        idle = self.sharding.largest(len(parts)) - len(parts)
        scores = [self._score_part(part, temperature, entropy, top1) for part, _ in parts]
        for _ in range(idle):
            ((nothing, _),) = self._parts(pack([[TokenSeq((0, 0), (False, True))]]).to(self.placement.device))
            weightless = 0.0 * self._score_part(nothing, temperature, entropy=False, top1=False).logp_M.sum()
            scores[0] = replace(scores[0], logp_M=scores[0].logp_M + weightless)
        return _joined(scores, torch.cat([places for _, places in parts]).argsort())

    def rewards(self, batch: Batch) -> torch.Tensor:
        """What the head of a reward model says at the scored positions. Shape: [M]."""
        return self.label_logits(batch)[:, 0]

    def label_logits(self, batch: Batch) -> torch.Tensor:
        """What a head that classifies says at the scored positions. Shape: [M, labels]."""
        split = self._split(batch)
        if split is None:
            return self._logits(batch, {})[0].float()
        part, places = split.part(batch.to(self.placement.device))
        return split.whole(self._logits(part, {})[0].float(), places, len(batch.source_M))

    def head(self, batch: Batch) -> tuple[Head, torch.Tensor | None]:
        """What makes the logits at the batch's scored positions; the router's balancing loss of a mixture of experts."""
        assert self.sharding.sequence is None and self.sharding.tensor is None, (
            "a loss of whole distributions is not split"
        )
        if not (self.ragged and length_rule(self.base.config) is None and self._head_is_plain):
            logits_MV, aux_loss = self._logits(batch, self._router_options)
            return Head(logits_MV), aux_loss
        head = cast("torch.nn.Linear", self.base.get_output_embeddings())
        with self.placement.autocast():
            hidden_MD = self._hidden(batch.to(self.placement.device))
        return Head(hidden_MD, head.weight, head.bias, self._softcap), None

    @torch.no_grad()
    def hidden_states(self, batch: Batch, depths: Sequence[float]) -> torch.Tensor:
        """After the layers that lie at these shares of the depth (rounded down), at the scored positions. Shape: [M, K, D]."""
        num_layers = self.base.config.get_text_config().num_hidden_layers
        layers = [max(1, math.floor(depth * num_layers)) for depth in depths]
        calls = self._calls(batch)

        def run(part: Batch | _Sequence) -> torch.Tensor:
            # The logits are not read: as few as a model gives.
            output = self._output_of(part, output_hidden_states=True, logits_to_keep=part.source_M[:1])
            return torch.stack([output.hidden_states[layer][0][part.source_M].float() for layer in layers], 1)

        with self.placement.autocast():
            found = [run(part) for part in (*calls.parts, *calls.idle)]
        return torch.cat(found[: len(calls.parts)])[calls.order_M]

    def _logits(self, batch: Batch, options: dict[str, bool]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Whole, as the model gives them; the router's balancing loss. Shape: [M, V]."""
        calls = self._calls(batch)
        with self.placement.autocast():
            outputs = [self._output_of(part, **options) for part in calls.parts]
            found = [output.logits[0] for output in outputs]
            for nothing in calls.idle:
                found[0] = found[0] + 0.0 * self._output_of(nothing, **options).logits.sum()
        losses = [loss for output in outputs if (loss := self._aux_loss(output)) is not None]
        return torch.cat(found)[calls.order_M], torch.stack(losses).mean() if losses else None

    def _calls(self, batch: Batch) -> _Calls:
        batch = batch.to(self.placement.device)
        if self.ragged and length_rule(self.base.config) is None:
            return _Calls([batch], [], torch.arange(len(batch.source_M)))
        found = self._parts(batch)
        order_M = torch.cat([places for _, places in found]).argsort()
        parts, idle = [part for part, _ in found], self.sharding.largest(len(found)) - len(found)
        ((nothing, _),) = self._parts(pack([[TokenSeq((0, 0), (False, True))]]).to(self.placement.device))
        return _Calls(parts, [nothing] * idle, order_M)

    def _output_of(self, part: Batch | _Sequence, **options: Any) -> Any:
        forget_lengths(self.base)
        options = {"logits_to_keep": part.source_M} | options
        if isinstance(part, Batch):
            return self._forward(self.model, part, **options)
        with noisy_embeddings(self.base, self.embedding_noise, torch.arange(part.ids_N.numel())):
            return self.model(input_ids=part.ids_N[None], use_cache=False, **options)

    def _parts(self, batch: Batch) -> list[tuple[Batch | _Sequence, torch.Tensor]]:
        """What goes through the model in a call of its own, with the places of its scored tokens."""
        if not self.ragged:
            return list(_sequences(batch))
        everywhere_M = torch.arange(len(batch.target_M), device=batch.target_M.device)
        return [(part, everywhere_M if places is None else places) for part, places in by_encoding(self.base, batch)]

    def _score_part(self, part: Batch | _Sequence, temperature: float, entropy: bool, top1: bool) -> Scores:
        forget_lengths(self.base)
        if isinstance(part, Batch):
            return self._score_together(part, temperature, entropy, top1)
        return self._score_output(part, temperature, entropy)

    def _score_together(self, batch: Batch, temperature: float, entropy: bool, top1: bool) -> Scores:
        split = self._split(batch)
        if split is None:
            return self._score_here(batch, temperature, entropy, top1)
        part, places = split.part(batch)
        found = self._score_here(part, temperature, entropy, top1)
        columns = [column for column in (found.logp_M, found.entropy_M, found.top1_M) if column is not None]
        rows = torch.stack([column.to(found.logp_M.dtype) for column in columns], 1)
        whole = iter(split.whole(rows, places, len(batch.target_M)).unbind(1))
        logp_M = next(whole)
        entropy_M = None if found.entropy_M is None else next(whole)
        return Scores(logp_M, entropy_M, None if found.top1_M is None else next(whole) > 0, found.aux_loss)

    def _split(self, batch: Batch) -> RowSplit | None:
        """How the ranks that share this batch score its rows; None where each has batches of its own."""
        sequence, tensor = self.sharding.sequence, self.sharding.tensor
        if sequence is not None:
            return sequence.split(len(batch.input_ids_N))
        return None if tensor is None else tensor.split(len(batch.source_M))

    def _score_here(self, batch: Batch, temperature: float, entropy: bool, top1: bool) -> Scores:
        if self._head_is_plain:
            return self._score_hidden(batch, temperature, entropy, top1)
        return self._score_output(batch, temperature, entropy)

    def _score_output(self, part: Batch | _Sequence, temperature: float, entropy: bool) -> Scores:
        output = self._output_of(part, **self._router_options)
        aux_loss = self._aux_loss(output, part.layout.split if isinstance(part, Batch) else None)
        return _from_logits(output.logits[0], part.target_M, temperature, entropy, aux_loss)

    def reference_logp(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """The same scores under the given starting model. Shape: [M], no gradient."""
        # It goes its own way: where a sampler of other weights sent tokens says nothing of its distribution.
        with torch.no_grad(), self.reference() as reference:
            return reference.score(replace(batch, routed_N=None), temperature=temperature).logp_M

    @contextmanager
    def reference(self) -> Iterator[Policy]:
        """The starting point: the frozen copy, or this policy with its adapter off, or as it started, while this lasts."""
        if self.start is not None:
            with self._started():
                yield self
        elif self.has_adapter:
            with cast("PeftModel", self.model).disable_adapter():
                yield self
        else:
            assert self.frozen is not None, "freeze_reference comes before reference"
            yield self.frozen

    @contextmanager
    def _started(self) -> Iterator[None]:
        """Inside, what is trained has its starting values."""
        start = self.start
        assert start is not None
        # Rows are exchanged in place: a share has no other data to point to. What a pass gathered is of its own values.
        self.sharding.release(self.model)
        local, trained = self.sharding.local, self.trainable()
        kept = [local(parameter.detach()).clone() for _, parameter in trained]
        try:
            for name, parameter in trained:
                local(parameter).data.copy_(local(start[name]))
            yield
        finally:
            self.sharding.release(self.model)
            for (_, parameter), values in zip(trained, kept, strict=True):
                local(parameter).data.copy_(values)

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """The frozen copy becomes alpha · model + (1 − alpha) · itself, weight by weight. Source: TR-DPO, arXiv 2404.09656."""
        assert self.frozen is not None, "freeze_reference comes before follow"
        local = self.sharding.local
        # Of a sharded copy each rank moves its share; what a pass gathered is of the values before.
        self.sharding.release(self.frozen.model)
        for kept, trained in zip(self.frozen.model.parameters(), self.model.parameters(), strict=True):
            local(kept).mul_(1 - alpha).add_(local(trained), alpha=alpha)

    def reference_tensors(self) -> list[torch.Tensor]:
        """What is kept of the starting point beside the model."""
        kept = list((self.start or {}).values())
        return kept if self.frozen is None else [*kept, *self.frozen.model.parameters()]

    def _forward(self, model: Any, batch: Batch, **options: Any) -> Any:
        routed = self.choices.given(batch.routed_N) if self.choices else nullcontext()
        with noisy_embeddings(self.base, self.embedding_noise, batch.position_ids_N), routed:
            return model(
                input_ids=batch.input_ids_N[None],
                position_ids=batch.position_ids_N[None],
                use_cache=False,
                layout=batch.layout,
                **options,
            )

    @property
    def _head_is_plain(self) -> bool:
        """Whether logits are hidden states times one matrix, so that they need never exist all at once."""
        config = self.base.config.get_text_config()
        scaled = any(getattr(config, name, None) not in (None, 1.0) for name in ("logit_scale", "logits_scaling"))
        plain = type(self.base.get_output_embeddings()) in (torch.nn.Linear, Float32Head)
        # A cap on the logits would be put on what a sharded model gives in their place.
        return plain and not (scaled or self._wants_aux_loss or (self.sharded and self._softcap is not None))

    @property
    def _softcap(self) -> float | None:
        return getattr(self.base.config.get_text_config(), "final_logit_softcapping", None)

    def _score_hidden(self, batch: Batch, temperature: float, entropy: bool, top1: bool) -> Scores:
        hidden_MD, head = self._hidden(batch), cast("torch.nn.Linear", self.base.get_output_embeddings())
        weight_VD, bias = head.weight, head.bias
        is_float32 = isinstance(head, Float32Head)
        if is_float32:
            hidden_MD, weight_VD, bias = hidden_MD.float(), weight_VD.float(), None if bias is None else bias.float()
        with torch.autocast(hidden_MD.device.type, enabled=False) if is_float32 else nullcontext():
            scores = chunked_logprobs(
                hidden_MD, weight_VD, batch.target_M,
                temperature=temperature, bias=bias, softcap=self._softcap, with_entropy=entropy, with_top1=top1,
            )  # fmt: skip
        return Scores(*scores)

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """What the head is applied to, at the scored positions. Shape: [M, D].

        Only the root of a sharded model gathers the head; so the root is run with the head left out, and what it gathered
        stays until the backward.
        """
        if not self.sharded:
            return self._forward(self.base.get_decoder(), batch).last_hidden_state[0][batch.source_M]
        head: Any = self.base.get_output_embeddings()
        head.forward = lambda hidden: hidden
        try:
            return self._forward(self.model, batch, logits_to_keep=batch.source_M).logits[0]
        finally:
            del head.forward

    @property
    def _wants_aux_loss(self) -> bool:
        config = self.base.config.get_text_config()
        return bool(getattr(config, "router_aux_loss_coef", 0)) and hasattr(config, "output_router_logits")

    @property
    def _router_options(self) -> dict[str, bool]:
        """Asked for call by call: the config is exported, and is to be as it was given."""
        return {"output_router_logits": True} if self._wants_aux_loss else {}

    def _aux_loss(self, output: Any, split: TokenSplit | None = None) -> torch.Tensor | None:
        loss = getattr(output, "aux_loss", None)
        if not (isinstance(loss, torch.Tensor) and self._wants_aux_loss):
            return None
        return loss if split is None else balancing_loss(self.base, output.router_logits, split)


def _from_logits(
    logits_MV: torch.Tensor, target_M: torch.Tensor, temperature: float, entropy: bool, aux_loss: torch.Tensor | None
) -> Scores:
    entropy_M = token_entropy(logits_MV, temperature) if entropy else None
    return Scores(
        token_logprobs(logits_MV, target_M, temperature), entropy_M, logits_MV.argmax(-1) == target_M, aux_loss
    )


def _with_gradient(values: Scores, slopes: Scores) -> Scores:
    """The exact values, with the gradients that the ordinary kernels have for them."""
    entropy_M = None
    if values.entropy_M is not None:
        entropy_M = value_of(values.entropy_M, slopes.entropy_M)
    return Scores(value_of(values.logp_M, slopes.logp_M), entropy_M, values.top1_M, slopes.aux_loss)


def _joined(parts: Sequence[Scores], order_M: torch.Tensor) -> Scores:
    """The scores of parts that were run apart, put in order."""
    entropies = [part.entropy_M for part in parts if part.entropy_M is not None]
    best = [part.top1_M for part in parts if part.top1_M is not None]
    losses = [part.aux_loss for part in parts if part.aux_loss is not None]
    return Scores(
        torch.cat([part.logp_M for part in parts])[order_M],
        torch.cat(entropies)[order_M] if entropies else None,
        torch.cat(best)[order_M] if best else None,
        torch.stack(losses).mean() if losses else None,
    )


@dataclass(frozen=True, slots=True)
class _Sequence:
    """A sequence alone, its prefix included, nothing padded: for models that the ragged layout is not exact for."""

    ids_N: torch.Tensor
    source_M: torch.Tensor
    target_M: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Calls:
    """What goes through the model in calls of its own; as many with nothing in them as another rank has more; the scored tokens' order."""

    parts: Sequence[Batch | _Sequence]
    idle: Sequence[Batch | _Sequence]
    order_M: torch.Tensor


def _sequences(batch: Batch) -> Iterator[tuple[_Sequence, torch.Tensor]]:
    """Each sequence of a packed batch with the places of its scored tokens."""
    device, sequences = batch.input_ids_N.device, iter(batch.leaves)
    for tree in batch.layout.trees:
        spans = tree.spans
        for leaf in tree.leaves():
            packed = torch.cat([torch.arange(*spans[number], device=device) for number in tree.path(leaf)])
            mine = batch.seq_M == next(sequences)
            where = torch.zeros(batch.input_ids_N.numel(), dtype=torch.long, device=device)
            where[packed] = torch.arange(packed.numel(), device=device)
            if bool(mine.any()):
                sequence_alone = _Sequence(batch.input_ids_N[packed], where[batch.source_M[mine]], batch.target_M[mine])
                yield sequence_alone, mine.nonzero()[:, 0]
