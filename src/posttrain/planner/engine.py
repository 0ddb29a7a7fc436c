"""What the engine that samples needs in memory beside the trainer, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.cards import ServerCards
from posttrain.planner.shape import ModelShape

_GIB = 1 << 30
_KV_GIB = {True: 1.0, False: 8.0}
"""vLLM's keys and values where nobody says how much, on a CPU and on a GPU."""
_RUNTIME_GIB = {("vllm", True): 0.5, ("vllm_server", True): 2.0, ("vllm", False): 1.0, ("vllm_server", False): 1.0}
"""Of vLLM itself, by engine and whether it is on a CPU: there a server is three processes. On a GPU a guess."""
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class SamplingEngine:
    """The keys of `rollout` that decide an engine's memory."""

    engine: str = "embedded"
    dtype: str = "auto"
    memory_gib: float | None = None
    url: str | None = None
    transfer: str = "auto"
    tensor_parallel_size: int = 1
    replicas: int = 1
    max_staleness: int = 0
    placement: str = "auto"
    prepack: bool = False
    routed_experts: str = "off"

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> SamplingEngine:
        return cls(**{name: keys[name] for name in cls.__dataclass_fields__})

    @property
    def is_ours(self) -> bool:
        """Whether it decodes in the process that trains, by the model's own modules."""
        return self.engine == "embedded"

    @property
    def starts_servers(self) -> bool:
        return self.engine == "vllm_server" and self.url is None

    @property
    def num_cards(self) -> int:
        """Of a machine, over which the servers that a run starts are split."""
        return self.replicas * self.tensor_parallel_size if self.starts_servers else 0

    def cards(self, trainers: int) -> ServerCards:
        """Beside so many training processes of a machine."""
        return ServerCards(self.placement == "split", trainers, self.replicas, self.tensor_parallel_size)

    @property
    def is_ahead(self) -> bool:
        """Whether ours decodes while the stage trains."""
        return self.is_ours and self.max_staleness > 0

    def takes_copy(self, shards: int) -> bool:
        """Whether ours decodes on weights of its own beside those that so many processes train."""
        return self.is_ahead or (self.is_ours and (self.transfer == "copy" or (shards > 1 and self.transfer == "auto")))

    def gathers(self, shards: int) -> bool:
        """Whether ours decodes with the shares of so many processes."""
        return self.is_ours and shards > 1 and not self.takes_copy(shards)


OURS = SamplingEngine()


def laid_out_bytes(shape: ModelShape, engine: SamplingEngine, size: int) -> int:
    """The matrices and the head that ours lays out for a CPU's products while it samples; `size` is that of a value."""
    return size * (shape.linear_params + shape.vocab * shape.hidden) if engine.prepack else 0


def engine_parts(
    shape: ModelShape, engine: SamplingEngine, *, bf16: bool, on_cpu: bool, trainers: int = 1
) -> dict[str, int]:
    """Bytes that are held all the while by the fullest of the devices that train, `trainers` of a machine.

    Of a server that runs already only what a transfer adds: it has what it needs.
    """
    if engine.is_ours:
        return {}
    size = _BYTES[engine.dtype] if engine.dtype != "auto" else 2 if bf16 else 4
    cards = engine.cards(trainers)
    here = (
        engine.replicas
        if on_cpu or not engine.starts_servers
        else cards.on_one_card(max(trainers, engine.tensor_parallel_size))
    )
    here = 0 if cards.is_split and not on_cpu else here
    ends = 1 + here
    # What changes of weights are found and applied with: the last version, held by all ends on the host.
    deltas = {"weight_deltas": ends * shape.num_params * size} if engine.transfer == "delta" and on_cpu else {}
    if engine.url is not None:
        return deltas
    # A CPU's kernels keep a packed copy of a head that is tied to the embedding.
    packed = shape.vocab * shape.hidden if on_cpu and shape.tied else 0
    gib = engine.memory_gib if engine.memory_gib is not None else _KV_GIB[on_cpu]
    return {
        "vllm_weights": here * ((shape.num_params + packed) * size // (1 if on_cpu else engine.tensor_parallel_size)),
        "vllm_kv_cache": here * int(gib * _GIB),
        "vllm_runtime": here * int(_RUNTIME_GIB[engine.engine, on_cpu] * _GIB),
        # One tensor on its way, whole, at all ends; the head is the largest.
        "sync_buffers": ends * shape.vocab * shape.hidden * size,
        **deltas,
    }
