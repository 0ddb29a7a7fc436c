"""How much memory a stage needs on one device, part by part, before a weight is loaded.

An estimate: it counts tensors, not the allocator. It leans to the high side, so that "fits" can be relied on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.planner.shape import ModelShape

GIB = float(1 << 30)
# NF4 keeps 4 bits a weight, and per 64 weights one constant: a float32, or under double quantisation 8 bits and
# per 256 of them a float32. Source: QLoRA, arXiv 2305.14314 §3.
_BYTES_NF4, _BYTES_NF4_DOUBLE = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
_BYTES_MASTER = 4
_BYTES_GRADIENT = 4
_BYTES_OPTIMIZER = {"adamw": 8, "adamw_8bit": 2.07}
# Logits, their log-softmax and the gradient, in float32, of one tile: the head never holds more than that.
_LOGIT_COPIES = 3
_TILE_BYTES, _MIN_TILE_ROWS = 512 << 20, 64
_DEPENDS_ON_DATA = ("activations", "logits", "kv_cache")
_RUNTIME_BYTES = int(0.6 * GIB)
_MARGIN = 1.05


@dataclass(frozen=True, slots=True)
class Workload:
    """The keys of a stage that decide its memory, under the names the configuration uses."""

    kind: str = "sft"
    adapter: str = "none"
    load_in_4bit: bool = False
    bnb_4bit_use_double_quant: bool = True
    lora_r: int = 16
    lora_target: Sequence[str] | str = "all-linear"
    bf16: bool = True
    gradient_checkpointing: bool = False
    optim: str = "adamw"
    sequence_len: int = 2048
    per_device_train_batch_size: int = 8
    precompute_ref_log_probs: bool = False
    beta: float = 0.0
    loss_type: str = ""
    rollout_batch_size: int = 0

    @classmethod
    def from_keys(cls, kind: str, keys: Mapping[str, Any], *, device_has_bf16: bool) -> Workload:
        """From the dumped keys of a stage; `bf16: auto` is decided by the device."""
        known: dict[str, Any] = {name: keys[name] for name in cls.__dataclass_fields__ if name in keys}
        bf16 = device_has_bf16 if keys.get("bf16", "auto") == "auto" else bool(keys["bf16"])
        known |= {"kind": kind, "bf16": bf16}
        return cls(**known)

    def longest(self, shape: ModelShape) -> int:
        """Longest sequence in tokens; no model sees more than it has positions."""
        return min(self.sequence_len, shape.max_positions or self.sequence_len)

    def tokens(self, shape: ModelShape) -> int:
        """Tokens of a micro-batch at its longest; a preference row is two sequences."""
        return self.per_device_train_batch_size * self.longest(shape) * (2 if self.kind == "dpo" else 1)

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy is held; with an adapter the reference is the model with the adapter off."""
        if self.adapter != "none" or self.precompute_ref_log_probs:
            return False
        free = {"simpo", "cpo", "orpo", "sft"}
        return (self.kind == "dpo" and self.loss_type not in free) or (self.kind == "grpo" and self.beta > 0)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per part. Activations, logits and cache are for rows as long as `sequence_len`; shorter rows need less."""

    parts: Mapping[str, int]
    shape: ModelShape
    workload: Workload
    trained_params: int = field(default=0)

    @property
    def total_bytes(self) -> int:
        """With rows as long as `sequence_len`."""
        return int(sum(self.parts.values()) * _MARGIN)

    @property
    def floor_bytes(self) -> int:
        """What no data, however short, makes smaller."""
        return sum(size for name, size in self.parts.items() if name not in _DEPENDS_ON_DATA)


def estimate_memory(shape: ModelShape, workload: Workload) -> MemoryPlan:
    """Peak memory of one device that holds the whole model."""
    trained = (
        shape.num_params if workload.adapter == "none" else adapter_params(shape, workload.lora_r, workload.lora_target)
    )
    training = {
        "gradients": trained * _BYTES_GRADIENT,
        "optimizer": int(trained * _BYTES_OPTIMIZER[workload.optim]),
        "activations": _activation_bytes(shape, workload),
        "logits": _LOGIT_COPIES * _tile_bytes(shape, workload),
    }
    rollout = {"kv_cache": _kv_bytes(shape, workload)} if workload.rollout_batch_size else {}
    parts = {
        "weights": _weight_bytes(shape, workload),
        "adapter": trained * _BYTES_MASTER if workload.adapter != "none" else 0,
        "reference": shape.num_params * shape.stored_bytes if workload.has_reference else 0,
        **training,
        **rollout,
        "runtime": _RUNTIME_BYTES,
    }
    return MemoryPlan({name: size for name, size in parts.items() if size}, shape, workload, trained)


def adapter_params(shape: ModelShape, rank: int, target: Sequence[str] | str) -> int:
    """Parameters of a LoRA adapter: rank · (inputs + outputs) of every module it is put on."""
    shapes = shape.linear_shapes
    if isinstance(target, str):
        pattern = re.compile(target) if target != "all-linear" else None
        names = [n for n in shapes if pattern is None or any(pattern.fullmatch(path) for path in _paths(n))]
    else:
        names = [n for n in shapes if any(entry.split(".")[-1] == n for entry in target)]
    return shape.num_layers * sum(rank * (shapes[n][0] + shapes[n][1]) * shapes[n][2] for n in names)


def _paths(name: str) -> tuple[str, ...]:
    parent = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return name, f"model.layers.0.{parent}.{name}"


def _bytes_per_value(workload: Workload) -> int:
    return 2 if workload.bf16 else 4


def _weight_bytes(shape: ModelShape, workload: Workload) -> int:
    """Trained weights are float32 masters; frozen ones keep their own type, or 4 bits in the linear modules."""
    if workload.adapter == "none":
        return shape.num_params * _BYTES_MASTER
    if not workload.load_in_4bit:
        return shape.num_params * shape.stored_bytes
    packed = _BYTES_NF4_DOUBLE if workload.bnb_4bit_use_double_quant else _BYTES_NF4
    return int(shape.linear_params * packed + (shape.num_params - shape.linear_params) * shape.stored_bytes)


def _activation_bytes(shape: ModelShape, workload: Workload) -> int:
    """What the backward pass needs of each token: per layer two norms, attention and the MLP, without a score matrix."""
    attention = (3 * shape.num_heads + 4 * shape.num_kv_heads) * shape.head_dim
    mlp = 4 * shape.intermediate * max(1, shape.experts_per_token)
    per_layer = (6 * shape.hidden + attention + mlp) * _bytes_per_value(workload)
    kept = shape.hidden * _bytes_per_value(workload)
    per_token = shape.num_layers * kept + per_layer if workload.gradient_checkpointing else shape.num_layers * per_layer
    return workload.tokens(shape) * per_token


def _tile_bytes(shape: ModelShape, workload: Workload) -> int:
    row = 4 * shape.vocab
    return min(workload.tokens(shape) * row, max(_MIN_TILE_ROWS * row, _TILE_BYTES))


def _kv_bytes(shape: ModelShape, workload: Workload) -> int:
    """The embedded engine's preallocated cache, at its longest."""
    return workload.rollout_batch_size * workload.longest(shape) * shape.kv_bytes_per_token(_bytes_per_value(workload))


# --- does it fit? --------------------------------------------------------------------------------------------------


def fits(plan: MemoryPlan, available: int) -> bool:
    """Whether it fits even when every row is as long as `sequence_len`."""
    return plan.total_bytes <= available


def cannot_fit(plan: MemoryPlan, available: int) -> bool:
    """Whether it is too large whatever the data: a reason to refuse before any work."""
    return plan.floor_bytes > available


def shortfall(plan: MemoryPlan, available: int, model: str, where: str = "this machine") -> str:
    """One clear line: what it needs, what there is, and the smallest change that would fit."""
    certain = cannot_fit(plan, available)
    largest = sorted(plan.parts.items(), key=lambda part: -part[1])[:3]
    shares = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    says, needs = ("does not fit", plan.floor_bytes) if certain else ("may not fit", plan.total_bytes)
    how = "whatever the data" if certain else "when rows are as long as sequence_len"
    return (
        f"{model} ({plan.shape.num_params / 1e9:.1f}B) {says}: {_method(plan.workload)} needs {needs / GIB:.1f} GiB {how} "
        f"({shares}) and {where} has {available / GIB:.1f} GiB free; {_remedy(plan, available)}"
    )


def _method(workload: Workload) -> str:
    return {"none": "full fine-tuning", "lora": "LoRA", "qlora": "QLoRA"}.get(workload.adapter, workload.adapter)


_CHANGES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("gradient_checkpointing: true", {"gradient_checkpointing": True}),
    ("per_device_train_batch_size: 1", {"per_device_train_batch_size": 1}),
    ("adapter: lora", {"adapter": "lora"}),
    ("adapter: qlora", {"adapter": "qlora", "load_in_4bit": True}),
    ("sequence_len: 512", {"sequence_len": 512, "rollout_batch_size": 8}),
)
_ORDER = {"none": 0, "lora": 1, "qlora": 2}


def _remedy(plan: MemoryPlan, available: int) -> str:
    """Add one change after another, each only if it saves something, until it fits."""
    named: list[str] = []
    best = plan
    for text, change in _CHANGES:
        if _ORDER.get(change.get("adapter", "qlora"), 2) <= _ORDER[best.workload.adapter] and "adapter" in change:
            continue
        changes = {
            name: min(value, best.workload.rollout_batch_size) if name == "rollout_batch_size" else value
            for name, value in change.items()
        }
        smaller = estimate_memory(plan.shape, replace(best.workload, **changes))
        if smaller.total_bytes < best.total_bytes:
            named = [name for name in named if not ("adapter" in change and name.startswith("adapter"))] + [text]
            best = smaller
        if fits(best, available):
            return f"it would fit with {', '.join(named)} ({best.total_bytes / GIB:.1f} GiB)"
    return f"no setting makes it fit (at least {best.total_bytes / GIB:.1f} GiB): use a smaller base_model or a larger machine"
