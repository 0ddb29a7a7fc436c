"""Training one call at a time, for clients that write the loop themselves: gradients add up until a step is asked for.

One base is in memory with one adapter, and the weights of each tenant take their turn in it. Knows nothing of HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from posttrain.config.stages import ModelKeys
from posttrain.errors import DataError, TrainingError
from posttrain.models.batch import Batch, pack
from posttrain.models.generation import stop_token_ids
from posttrain.models.load import adapter_targets, load_policy
from posttrain.objectives.tinker import Streams, TinkerLoss, tinker_loss
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.types import Completion, Request, SamplingParams, TokenSeq, in_order

Tensors = dict[str, torch.Tensor]
ALPHA = 32
"""Of every adapter, whatever its rank, as in Tinker: an update is (32 / rank) · B·A."""


@dataclass(frozen=True, slots=True)
class AdapterShape:
    """What decides which tensors an adapter has."""

    rank: int
    attention: bool = True
    mlp: bool = True
    head: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """`ids` are the inputs; `targets[t]` is what is scored behind `ids[: t + 1]`; a stream has a value per target.

    Example: the prompt (5, 6) answered by (7, 8): ids 5 6 7, targets 6 7 8, weights 0 1 1.
    """

    ids: np.ndarray
    targets: np.ndarray
    streams: Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class AdamStep:
    """Of one step; names are those of `torch.optim.AdamW`."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    """0: no clipping."""


@dataclass(frozen=True, slots=True)
class Passed:
    """What a pass over data gave: per datum the log-probs and loss terms of its targets, and the sum of the latter."""

    logp: list[np.ndarray]
    terms: list[np.ndarray]
    loss: float


@dataclass(eq=False)
class Tenant:
    """What one client trains: tensors, gradients added up since the last step, and the optimizer's state."""

    tensors: Tensors
    optimizer: torch.optim.Optimizer
    gradients: Tensors = field(default_factory=dict[str, torch.Tensor])
    step: int = 0
    tokens: int = 0
    pending: dict[str, float] = field(default_factory=dict[str, float])
    """Sums over what was passed since the last step: loss, tokens, datums."""
    spoiled: str = ""
    """Why the gradients are not those that were asked for."""

    def forget_gradients(self) -> None:
        self.gradients, self.pending, self.spoiled = {}, {}, ""


class AdapterHost:
    """A base with an adapter of one shape. Whoever computes with it does so from one thread."""

    def __init__(self, source: str, shape: AdapterShape, micro_batch: int) -> None:
        """Raises: ModelError."""
        base = ModelKeys(base_model=source)
        targets = adapter_targets(base, attention=shape.attention, mlp=shape.mlp, head=shape.head)
        settings = {"adapter": "lora", "lora_r": shape.rank, "lora_alpha": ALPHA, "lora_target": targets}
        self.keys = base.model_copy(update=settings)
        self.policy = load_policy(self.keys).without_dropout()
        self.shape, self._micro_batch = shape, micro_batch
        self._parameters = dict(self.policy.trainable())
        self._none = {name: parameter.data for name, parameter in self._parameters.items()}
        self._stops = stop_token_ids(self.policy.base, self.policy.tokenizer)
        config = self.policy.base.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.window: int = config.max_position_embeddings

    # --- whose weights are in it ---

    def fresh(self, seed: int) -> Tenant:
        """A new adapter, with which the model is what it was. The seed alone decides its tensors."""
        from peft.tuners.lora.layer import LoraLayer

        tensors = {name: torch.empty_like(data) for name, data in self._none.items()}
        layers = [module for module in self.policy.model.modules() if isinstance(module, LoraLayer)]
        with self._holding(tensors):
            torch.manual_seed(seed)
            for layer in layers:
                layer.reset_lora_parameters("default", True)
        return Tenant(tensors, torch.optim.AdamW(self._parameters.values(), fused=True))

    @contextmanager
    def _holding(self, tensors: Tensors) -> Iterator[None]:
        for name, parameter in self._parameters.items():
            parameter.data = tensors[name]
        try:
            yield
        finally:
            for name, parameter in self._parameters.items():
                parameter.data, parameter.grad = self._none[name], None

    @contextmanager
    def holding(self, tenant: Tenant) -> Iterator[None]:
        """Inside, the policy is the tenant's, its gradients and optimizer included."""
        with self._holding(tenant.tensors):
            for name, parameter in self._parameters.items():
                parameter.grad = tenant.gradients.get(name)
            try:
                yield
            finally:
                gradients = {name: parameter.grad for name, parameter in self._parameters.items()}
                tenant.gradients = {name: grad for name, grad in gradients.items() if grad is not None}

    @contextmanager
    def sampling_from(self, tensors: Tensors | None) -> Iterator[None]:
        """Inside, the policy is that adapter, or the base alone."""
        if tensors is None:
            with cast("Any", self.policy.model).disable_adapter():
                yield
        else:
            with self._holding(tensors):
                yield

    def snapshot(self, tenant: Tenant) -> Tensors:
        return {name: tensor.clone() for name, tensor in tenant.tensors.items()}

    # --- training ---

    def pass_over(
        self, tenant: Tenant, data: Sequence[Datum], loss_fn: str, config: Mapping[str, float | str], *, backward: bool
    ) -> Passed:
        """Log-probs and losses, and with `backward` their gradients, added to those that are there.

        Raises: DataError, ConfigError, before anything is computed; whatever else is raised has spoiled the gradients.
        """
        row, whole = tinker_loss(loss_fn, config)
        data = [self._checked(datum, row, number) for number, datum in enumerate(data)]
        logp: list[np.ndarray] = []
        terms: list[np.ndarray] = []
        with self.holding(tenant), torch.set_grad_enabled(backward):
            self.policy.model.train(backward)
            for first in range(0, len(data), self._micro_batch):
                micro = data[first : first + self._micro_batch]
                batch = _packed(micro)
                logp_M = self.policy.score(batch).logp_M
                term_M = row.term(logp_M, _streams(micro, row, logp_M), whole)
                if backward:
                    term_M.sum().backward()
                sizes = batch.lengths_S().tolist()
                logp += [part.numpy() for part in logp_M.detach().float().cpu().split(sizes)]
                terms += [part.numpy() for part in term_M.detach().float().cpu().split(sizes)]
        passed = Passed(logp, terms, math.fsum(float(part.sum(dtype=np.float64)) for part in terms))
        if backward:
            tokens = float(sum(len(datum.targets) for datum in data))
            for name, value in {"loss": passed.loss, "tokens": tokens, "datums": float(len(data))}.items():
                tenant.pending[name] = tenant.pending.get(name, 0.0) + value
        return passed

    def _checked(self, datum: Datum, row: TinkerLoss, number: int) -> Datum:
        """With every stream that the loss reads. Raises: DataError."""
        where, length = f"datum {number}", len(datum.ids)
        if not 1 <= length <= self.window:
            raise DataError(f"{where}: {length} tokens; expected 1 to {self.window}, the model's window")
        if datum.targets.shape != (length,):
            raise DataError(
                f"{where}: target_tokens has shape {list(datum.targets.shape)}, expected [{length}], one for each input"
            )
        for name, ids in (("model_input", datum.ids), ("target_tokens", datum.targets)):
            if int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary:
                raise DataError(
                    f"{where}: {name} holds {ids.min()} to {ids.max()}; expected ids 0 to {self.vocabulary - 1}"
                )
        if extra := sorted(datum.streams.keys() - set(row.reads)):
            raise DataError(f"{where}: loss_fn_inputs has {extra[0]}; expected target_tokens, {', '.join(row.reads)}")
        streams = dict(datum.streams)
        if "weights" in row.reads:
            streams.setdefault("weights", np.ones(length, np.float32))
        for name in row.reads:
            if name not in streams:
                raise DataError(f"{where}: loss_fn_inputs lacks {name}; expected target_tokens, {', '.join(row.reads)}")
            if streams[name].shape != (length,) or not np.isfinite(streams[name]).all():
                raise DataError(
                    f"{where}: {name} has shape {list(streams[name].shape)}; expected {length} finite numbers, one for each input"
                )
        return replace(datum, streams=streams)

    def step(self, tenant: Tenant, adam: AdamStep) -> dict[str, float]:
        """One step with the gradients that were added up, which are gone then. Raises: TrainingError; then no step is made."""
        if tenant.spoiled:
            why = tenant.spoiled
            tenant.forget_gradients()
            raise TrainingError(f"no step was made, and the gradients added up for it were dropped: {why}")
        if not tenant.gradients:
            raise TrainingError("no step was made: no forward_backward came since the last one")
        parameters = list(self._parameters.values())
        with self.holding(tenant):
            norm = self.policy.sharding.clip_grad_norm(parameters, adam.max_grad_norm)
            if math.isfinite(norm):
                for group in tenant.optimizer.param_groups:
                    group |= {"lr": adam.lr, "betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay}
                tenant.optimizer.step()
            tenant.optimizer.zero_grad(set_to_none=True)
        pending = tenant.pending
        tenant.forget_gradients()
        if not math.isfinite(norm):
            raise TrainingError(f"no step was made: the norm of the gradients is {norm}; they were dropped")
        tenant.step, tenant.tokens = tenant.step + 1, tenant.tokens + int(pending["tokens"])
        return {"loss": pending["loss"], "loss_tokens": pending["tokens"], "grad_norm": norm, "learning_rate": adam.lr}

    # --- sampling ---

    def generate(
        self, tensors: Tensors | None, requests: Sequence[Request], params: SamplingParams, *, ends: bool
    ) -> list[Completion]:
        """Completions in order; `ends`: the model's own stop tokens end one, beside those of `params`."""
        engine = EmbeddedEngine(self.policy, stop_token_ids=self._stops if ends else ())
        with self.sampling_from(tensors):
            return in_order(engine.generate(requests, params))


def _packed(data: Sequence[Datum]) -> Batch:
    """Every input is scored, against the datum's own target: it need not be the next input."""
    rows = [
        [TokenSeq((*datum.ids.tolist(), int(datum.targets[-1])), (False,) + (True,) * len(datum.ids))] for datum in data
    ]
    batch = pack(rows)
    targets = np.concatenate([datum.targets for datum in data])
    return replace(batch, target_M=torch.from_numpy(targets.astype(np.int64)))


def _streams(data: Sequence[Datum], row: TinkerLoss, like: torch.Tensor) -> Streams:
    joined = {name: np.concatenate([datum.streams[name] for datum in data]).astype(np.float32) for name in row.reads}
    return {name: torch.from_numpy(values).to(like.device) for name, values in joined.items()}
