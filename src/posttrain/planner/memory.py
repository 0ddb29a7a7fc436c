"""How much memory a stage needs on one device, part by part, before a weight is loaded.

An estimate: it counts tensors, not the allocator. It leans to the high side, so that "fits" can be relied on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from posttrain.planner.engine import SamplingEngine, engine_parts, laid_out_bytes
from posttrain.planner.shape import ModelShape
from posttrain.planner.trained import trained_params
from posttrain.planner.workload import Workload

GIB = float(1 << 30)
# NF4 keeps 4 bits a weight, and per 64 weights one constant: a float32, or under double quantisation 8 bits and
# per 256 of them a float32. Source: QLoRA, arXiv 2305.14314 §3.
_BYTES_NF4, _BYTES_NF4_DOUBLE = 0.5 + 4 / 64, 0.5 + 1 / 64 + 4 / (64 * 256)
_BYTES_MASTER = 4
_BYTES_GRADIENT = 4
_BYTES_OPTIMIZER = {
    "adamw": 8, "adamw_8bit": 2.07, "paged_adamw": 8, "paged_adamw_8bit": 2.07,
    "lion": 4, "lion_8bit": 1.04, "paged_lion_8bit": 1.04, "adafactor": 0.1, "muon": 8, "sgd": 0,
}  # fmt: skip
"""Of states, a trained weight. Muon keeps 4 for matrices and 8 for the rest; Adafactor a row and a column of each matrix."""
_PAGED = ("paged_adamw", "paged_adamw_8bit", "paged_lion_8bit")
"""Optimizers whose states leave a GPU while others need the room."""
# float32 logits of one tile and what their gradient is made in; a soft cap and an entropy bonus make two more of each.
_TILES, _TILES_CURVED = 2, 4
_TILE_BYTES, _TILE_BYTES_CPU, _MIN_TILE_ROWS = 512 << 20, 64 << 20, 64
_EXPORT_PROBE = 64
_LAYERS_AT_ONCE = 2
_CACHE_GROWTH = 65
MOST_COPIED = 256 << 20
ENCODED_AT_ONCE = 8192
"""Bytes of a model up to which decoding adds a LoRA adapter to a copy of its matrices."""
_PHASES = {
    "training": ("autocast", "gathered", "gradients", "activations", "logits"),
    "rollout": ("autocast", "decode_weights", "kv_cache", "prefill"),
    "export": ("export",),
}
"""What is held while a stage does this, beside what it always holds."""
_AHEAD = {"training": _PHASES["training"] + _PHASES["rollout"], "export": _PHASES["export"]}
"""The same where an engine samples on its own copy while the stage trains; autocast is of both."""
_GATHERING = {**_PHASES, "rollout": ("gathered", *_PHASES["rollout"])}
"""The same where it decodes with the shares."""
HELD: Mapping[str, tuple[str, ...]] = {
    "weights": ("weights", "adapter", "reference"),
    "gradients": ("gradients",),
    "optimizer": ("optimizer",),
}
"""What can be counted on a running stage → the parts of its plan. The rest of its memory is activations, logits and caches."""
_DEPENDS_ON_DATA = ("activations", "logits", "kv_cache", "prefill")
_RUNTIME_BYTES = int(0.6 * GIB)
_MARGIN = 1.05


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes per part. Activations, logits and cache are for rows as long as `sequence_len`; shorter rows need less."""

    parts: Mapping[str, int]
    shape: ModelShape
    workload: Workload
    trained_params: int = field(default=0)
    shards: int = 1
    host: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes of the machine's memory: frozen layers and inputs of layers that a GPU copies from, what a batch of rollouts brings along."""

    @property
    def copied_bytes(self) -> int:
        """Of offloaded layers, in one pass through the model."""
        return _layer_bytes(self.shape, self.workload) * self.shape.num_layers if "layers" in self.host else 0

    @property
    def copied_to_train_bytes(self) -> int:
        """In a micro-batch, forward and backward: the two layers at which a pass turns round are still there."""
        turned = max(0, self.shape.num_layers - _LAYERS_AT_ONCE)
        return 2 * self.copied_bytes * turned // self.shape.num_layers

    @property
    def total_bytes(self) -> int:
        """With rows as long as `sequence_len`."""
        return int(self._peak(self.parts) * _MARGIN)

    @property
    def floor_bytes(self) -> int:
        """What no data, however short, makes smaller."""
        return self._peak({name: size for name, size in self.parts.items() if name not in _DEPENDS_ON_DATA})

    @property
    def passing_bytes(self) -> int:
        """The most that a phase adds to what is always held: activations, logits, caches."""
        return self._peak(self.parts) - sum(sum(self.part(name) for name in names) for names in HELD.values())

    def part(self, name: str) -> int:
        return self.parts.get(name, 0)

    def _peak(self, parts: Mapping[str, int]) -> int:
        """What is always held, and the most that a phase adds; phases follow each other, but for sampling ahead."""
        phases = _phases(self.workload.rollout, self.shards).values()
        passing = {name for names in phases for name in names}
        always = sum(size for name, size in parts.items() if name not in passing)
        return always + max(sum(parts.get(name, 0) for name in names) for names in phases)


def _phases(rollout: SamplingEngine, shards: int) -> Mapping[str, tuple[str, ...]]:
    return _AHEAD if rollout.is_ahead else _GATHERING if rollout.gathers(shards) else _PHASES


def estimate_memory(shape: ModelShape, workload: Workload, shards: int = 1) -> MemoryPlan:
    """Peak memory of one device that holds a model, or its share where there are `shards` processes to hold it between them."""
    trained = trained_params(shape, workload)
    paged_out = workload.optim in _PAGED and not workload.on_cpu
    is_copied = workload.on_cpu and workload.save_steps > 0
    optimizer = 0 if paged_out else int(trained * _BYTES_OPTIMIZER[workload.optim])
    # One after the other, so that the larger of them counts.
    whole = replace(workload, adapter="none", load_in_4bit=False, load_in_8bit=False, layer_offloading=False)
    in_training = [(shape, workload), *((critic, whole) for critic in workload.critics_held)]
    parts = {
        "weights": _weight_bytes(shape, workload) + (_offloaded_bytes(shape, workload) if shards == 1 else 0),
        "adapter": trained * _BYTES_MASTER if workload.adapter != "none" else 0,
        "reference": _reference_bytes(shape, workload, trained),
        "teachers": sum(teacher.num_params * _frozen_bytes(teacher, workload) for teacher in workload.teachers_held),
        "critic": _critic_bytes(workload),
        "judges": sum(judge.num_params * _frozen_bytes(judge, workload) for judge in workload.judges_held),
        "autocast": max(_autocast_bytes(of, how) for of, how in in_training),
        "gradients": trained * _BYTES_GRADIENT,
        "optimizer": optimizer,
        "activations": max(_activation_bytes(of, how, shards) for of, how in in_training),
        "logits": _logit_bytes(shape, workload),
        # With save_steps, a thread writes copies while the run goes on; they are made on the host.
        "checkpoint": (trained * _BYTES_MASTER + optimizer + _critic_bytes(workload, 0)) * is_copied,
        **_engine_bytes(shape, workload, min(shards, workload.sharding.per_node or shards)),
        "replica": _replica_bytes(shape, workload, trained)
        if workload.samples and workload.rollout.takes_copy(shards)
        else 0,
        "export": _export_bytes(shape, workload, shards),
        "routed_experts": _routed_bytes(shape, workload) if workload.on_cpu else 0,
        "runtime": _RUNTIME_BYTES,
    }
    if shards > 1:
        parts |= _shared_out(parts, shape, workload, shards)
    host = {} if workload.on_cpu else _host_bytes(shape, workload, shards)
    return MemoryPlan({name: size for name, size in parts.items() if size}, shape, workload, trained, shards, host)


_SHARDED = ("weights", "adapter", "reference", "teachers", "critic", "gradients", "optimizer", "checkpoint")


def _shared_out(parts: Mapping[str, int], shape: ModelShape, workload: Workload, shards: int) -> dict[str, int]:
    """What each of several processes holds instead: a share, and of the rest one layer after another, as a whole.

    A 4-bit base is whole on every one.
    """
    how = workload.sharding
    whole = ("weights",) if workload.load_in_4bit and workload.adapter != "none" else ()
    over = how.num_shards(shards)
    shares = {name: math.ceil(parts[name] / over) for name in _SHARDED if name in parts and name not in whole}
    inner = (shape.num_params - shape.embedding_params) // how.layer_parts(shards)
    layer = shape.linear_params // shape.num_layers // how.layer_parts(shards)
    held = _BYTES_MASTER if (trained := workload.adapter == "none") else _frozen_bytes(shape, workload)
    gathered_bytes = min(held, how.param_bytes)
    # Autocast's copy of what is gathered in float32, and the gradients of what is trained.
    value = gathered_bytes + (2 if workload.bf16 and gathered_bytes > 2 else 0) + (gathered_bytes if trained else 0)
    # The next layer is gathered while one is computed, and embedding and head stay until the pass is over.
    gathered = (2 * layer + shape.embedding_params) * value
    if not how.reshard_after_forward:
        gathered += max(0, inner - 2 * layer) * gathered_bytes
    if trained and not how.sync_each_batch:
        shares["gradients"] = shares.get("gradients", 0) + (inner + shape.embedding_params) * _BYTES_GRADIENT
    shares["activations"] = math.ceil(parts["activations"] / how.token_parts(shards))
    return {**shares, "autocast": 0, "gathered": 0 if whole else gathered}


def _replica_bytes(shape: ModelShape, workload: Workload, trained: int) -> int:
    """A second policy that our engine decodes on, loaded as the one in training is."""
    adapter = trained * _BYTES_MASTER if workload.adapter != "none" else 0
    return _weight_bytes(shape, workload) + adapter


def _reference_bytes(shape: ModelShape, workload: Workload, trained: int) -> int:
    """A float32 copy of the trained model, or of the adapter that is trained on as it started."""
    if workload.adapter != "none" and (
        workload.adapter_start == "continue" or workload.adapter_name_or_path is not None
    ):
        return trained * _BYTES_MASTER
    return shape.num_params * _BYTES_MASTER if workload.has_reference else 0


def _bytes_per_value(workload: Workload) -> int:
    return 2 if workload.bf16 else 4


def _weight_bytes(shape: ModelShape, workload: Workload) -> int:
    """Trained weights are float32 masters; frozen ones have the type that is computed in, or 4 or 8 bits in the linear modules."""
    if workload.adapter == "none":
        return shape.num_params * _BYTES_MASTER
    if not (workload.load_in_4bit or workload.load_in_8bit):
        return shape.num_params * _frozen_bytes(shape, workload)
    packed = 1 if workload.load_in_8bit else _BYTES_NF4_DOUBLE if workload.bnb_4bit_use_double_quant else _BYTES_NF4
    return int(shape.linear_params * packed + (shape.num_params - shape.linear_params) * _frozen_bytes(shape, workload))


def _offloaded_bytes(shape: ModelShape, workload: Workload) -> int:
    """What offloading of layers adds to the weights: less than nothing on a GPU, on a CPU a second copy of those that are computed with."""
    if not workload.layer_offloading:
        return 0
    there = min(_LAYERS_AT_ONCE, shape.num_layers)
    return _layer_bytes(shape, workload) * (there if workload.on_cpu else there - shape.num_layers)


def _layer_bytes(shape: ModelShape, workload: Workload) -> int:
    """A frozen layer that is copied; the constants of 4 bits stay on the device."""
    rest = shape.num_params - shape.linear_params - shape.embedding_params
    linear = 0.5 if workload.load_in_4bit else _frozen_bytes(shape, workload)
    return int(shape.linear_params * linear + rest * _frozen_bytes(shape, workload)) // shape.num_layers


def _host_bytes(shape: ModelShape, workload: Workload, shards: int) -> dict[str, int]:
    """Of a process: layers where it is the only one. torch's allocator of pinned memory rounds each tensor up to a power of two."""
    found: dict[str, int] = {}
    if workload.layer_offloading and shards == 1:
        size = 0.5 if workload.load_in_4bit else _frozen_bytes(shape, workload)
        found["layers"] = sum(n * _pinned(int(rows * out * size)) for rows, out, n in shape.linear_shapes.values())
    if workload.gradient_checkpointing == "offload":
        found["activations"] = shape.num_layers * _pinned(
            math.ceil(workload.tokens(shape) / workload.sharding.token_parts(shards)) * shape.hidden * 4
        )
    if routed := _routed_bytes(shape, workload):
        found["routed_experts"] = routed
    return found


def _routed_bytes(shape: ModelShape, workload: Workload) -> int:
    """The experts that a generation batch was computed with: of each token of each completion, and of all layers; every process has all of them."""
    if workload.rollout.routed_experts == "off" or not shape.num_experts:
        return 0
    tokens = workload.num_prompts_per_step * workload.num_generations * workload.completion(shape)
    return tokens * shape.num_layers * shape.experts_per_token * (1 if shape.num_experts <= 256 else 2)


def _pinned(num_bytes: int) -> int:
    return 1 << (num_bytes - 1).bit_length()


def _critic_bytes(workload: Workload, of_gradients: int = _BYTES_GRADIENT) -> int:
    """Masters, gradients and optimizer of what is trained whole beside the policy."""
    paged_out = workload.optim in _PAGED and not workload.on_cpu
    each = _BYTES_MASTER + of_gradients + (0 if paged_out else _BYTES_OPTIMIZER[workload.optim])
    return int(sum(critic.num_params for critic in workload.critics_held) * each)


def _frozen_bytes(shape: ModelShape, workload: Workload) -> int:
    """Of a value of a frozen base: as in its file under autocast, else float32."""
    return shape.stored_bytes if workload.bf16 else 4


def _autocast_bytes(shape: ModelShape, workload: Workload) -> int:
    """The bf16 copies of float32 matrices that autocast makes and the backward pass needs."""
    if not workload.bf16 or (
        workload.adapter != "none" and (workload.load_in_4bit or workload.load_in_8bit or shape.stored_bytes == 2)
    ):
        return 0
    return 2 * (shape.linear_params + shape.vocab * shape.hidden)


def _activation_bytes(shape: ModelShape, workload: Workload, shards: int = 1) -> int:
    """What the backward pass needs of each token, without a score matrix unless a soft cap needs one on a CPU.

    A norm keeps its input and its output, in float32, and if it is trained the normalised input too. The input of a
    layer is the first norm's. With checkpointing a layer at a time is computed again, once the logits are gone.
    """
    per_norm = (3 if workload.adapter == "none" else 2) * shape.hidden * 4
    inner = 3 * (shape.num_heads + shape.num_kv_heads) * shape.head_dim + 4 * shape.widest_mlp
    inner += shape.mixer.kept_values if shape.mixer is not None else 0
    scores = 2 * shape.num_heads * workload.family(shape) * 4 if shape.attention_softcap and workload.on_cpu else 0
    casts = 2 * shape.hidden if workload.bf16 else 0
    inner //= workload.sharding.layer_parts(shards)
    per_layer = shape.norms_per_layer * per_norm + scores + (inner + casts) * _bytes_per_value(workload)
    tokens = workload.tokens(shape)
    if not workload.gradient_checkpointing:
        return tokens * (shape.num_layers * per_layer + per_norm)
    # Their inputs go to the host one after the other; a CPU has them as before.
    inputs = 1 if workload.gradient_checkpointing == "offload" and not workload.on_cpu else shape.num_layers
    kept = tokens * (inputs * shape.hidden * 4 + per_norm)
    return kept + max(0, tokens * per_layer - _logit_bytes(shape, workload))


def _logit_bytes(shape: ModelShape, workload: Workload) -> int:
    """The head computes no more than one tile of logits at once; its gradient is made beside them."""
    row = 4 * shape.vocab
    most = max(_MIN_TILE_ROWS * row, _TILE_BYTES_CPU if workload.on_cpu else _TILE_BYTES)
    curved = shape.logit_softcap or workload.entropy_coef > 0
    gradient = shape.vocab * shape.hidden * (6 if workload.bf16 else 4) if workload.adapter == "none" else 0
    return (_TILES_CURVED if curved else _TILES) * min(workload.scored_tokens(shape) * row, most) + gradient


def _engine_bytes(shape: ModelShape, workload: Workload, trainers: int) -> dict[str, int]:
    """Ours needs memory while it samples, on the weights in training; a foreign one has its own all the while."""
    if not workload.rollout.is_ours:
        return engine_parts(shape, workload.rollout, bf16=workload.bf16, on_cpu=workload.on_cpu, trainers=trainers)
    return {
        "decode_weights": _decode_weight_bytes(shape, workload),
        "kv_cache": _kv_bytes(shape, workload),
        "prefill": _prefill_bytes(shape, workload),
    }


def _decode_weight_bytes(shape: ModelShape, workload: Workload) -> int:
    """The matrices with the adapter added, and those laid out, which decoding multiplies with; not under autocast."""
    size = _frozen_bytes(shape, workload) if shape.decodes_by_weights and not workload.bf16 else 0
    copied = workload.adapter == "lora" and shape.num_params * size <= MOST_COPIED and workload.rollout_batch_size > 0
    return copied * shape.linear_params * size + laid_out_bytes(shape, workload.rollout, size * workload.on_cpu)


def _kv_bytes(shape: ModelShape, workload: Workload) -> int:
    """Keys and values of the completions that are decoded at once, and of their prompts, each held once."""
    prompts = workload.prompts() * (workload.longest(shape) - workload.completion(shape))
    size = _bytes_per_value(workload)
    states = workload.rollout_batch_size * int(shape.cache_bytes(0, size))
    return (_cached_completions(shape, workload) + prompts) * shape.kv_bytes_per_token(size) + states


def _cached_completions(shape: ModelShape, workload: Workload) -> int:
    """Places for tokens of completions: all rows are as wide as the longest, and grow by so many places at a time."""
    return workload.rollout_batch_size * math.ceil(workload.completion(shape) / _CACHE_GROWTH) * _CACHE_GROWTH


def _prefill_bytes(shape: ModelShape, workload: Workload) -> int:
    """The widest point of a forward over as many prompts as go at once, less the cache of completions, which comes after it."""
    size, longest = _bytes_per_value(workload), workload.longest(shape) - workload.completion(shape)
    at_once = min(workload.prompts() * longest, max(longest, ENCODED_AT_ONCE))
    widest = at_once * (3 * shape.widest_mlp * size + 4 * shape.hidden * 4)
    return max(0, widest - _cached_completions(shape, workload) * shape.kv_bytes_per_token(size))


def _export_bytes(shape: ModelShape, workload: Workload, shards: int) -> int:
    """What is written is read back, in the dtype it is cast to; a merge also reads the base, as its file holds it, and has a layer in float32.

    Several processes hold shares of what is written, and merge the base in float32, a matrix at a time; a layer that the probe runs
    through is gathered as a whole, with embedding and head.
    """
    if not workload.on_cpu:
        return 0
    written = shape.num_params * {"auto": shape.stored_bytes, "float32": 4}.get(workload.save_dtype, 2)
    merged = (shape.num_params + shape.linear_params) * 4
    if shards == 1:
        merged = shape.num_params * shape.stored_bytes + shape.linear_params // shape.num_layers * 4
    merged *= workload.adapter != "none"
    gathered = (2 * shape.linear_params // shape.num_layers + shape.embedding_params) * 4 if shards > 1 else 0
    return math.ceil((written + merged) / shards) + gathered + 4 * _EXPORT_PROBE * shape.vocab * 4
