"""What of a stage decides how much memory it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.planner.engine import OURS, SamplingEngine
from posttrain.planner.shape import ModelShape
from posttrain.planner.sharding import FULLY, ShardingPlan


@dataclass(frozen=True, slots=True)
class Workload:
    """What decides the memory of a stage: its traits, and its keys under the names the configuration uses.

    `samples`: trains on completions of its own, which share their prompts; `pairs`: a row is two sequences;
    `holds_reference`: full fine-tuning keeps a frozen copy; `scores_reference`: each row is scored under the reference too;
    `selects_tokens`: the step of an optimizer begins with a pass over its tokens.
    """

    samples: bool = False
    pairs: bool = False
    holds_reference: bool = False
    scores_reference: bool = False
    selects_tokens: bool = False
    base_model: str = ""
    adapter: str = "none"
    adapter_start: str = "fresh"
    adapter_name_or_path: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_use_double_quant: bool = True
    lora_r: int = 16
    lora_target: Sequence[str] | str = "all-linear"
    unfrozen_parameters: Sequence[str] = ()
    unfrozen_layers: int = 0
    unfrozen_layer_modules: Sequence[str] = ()
    bf16: bool = True
    gradient_checkpointing: bool | Literal["offload"] = False
    layer_offloading: bool = False
    torch_compile: bool | Literal["auto"] = False
    optim: str = "adamw"
    sequence_len: int = 2048
    per_device_train_batch_size: int = 8
    entropy_coef: float = 0.0
    save_steps: int = 0
    rollout_batch_size: int = 0
    num_prompts_per_step: int = 0
    num_generations: int = 1
    steps_per_generation: int = 1
    num_iterations: int = 1
    max_completion_length: int | None = 0
    save_dtype: str = "auto"
    on_cpu: bool = False
    rollout: SamplingEngine = OURS
    teachers_held: Sequence[ModelShape] = ()
    """Frozen models besides: those that teach, where they are other weights than the policy's."""
    judges_held: Sequence[ModelShape] = ()
    """Those whose opinion is a reward; whole on every process."""
    critics_held: Sequence[ModelShape] = ()
    """Those that are trained beside the policy, with all their weights."""
    sharding: ShardingPlan = FULLY

    @classmethod
    def from_keys(
        cls, keys: Mapping[str, Any], *, device_has_bf16: bool, on_cpu: bool, teachers: Sequence[ModelShape] = (),
        judges: Sequence[ModelShape] = (), critics: Sequence[ModelShape] = (), **traits: bool,
    ) -> Workload:  # fmt: skip
        """From the dumped keys of a stage and its traits; `bf16: auto` is decided by the device."""
        known: dict[str, Any] = {name: keys[name] for name in cls.__dataclass_fields__ if name in keys}
        bf16 = device_has_bf16 if keys.get("bf16", "auto") == "auto" else bool(keys["bf16"])
        known |= {
            "bf16": bf16,
            "on_cpu": on_cpu,
            "teachers_held": teachers,
            "judges_held": judges,
            "critics_held": critics,
            **traits,
        }
        if "rollout" in known:
            known["rollout"] = SamplingEngine.from_keys(known["rollout"])
        if "sharding" in known:
            known["sharding"] = ShardingPlan.from_keys(known["sharding"])
        return cls(**known)

    def longest(self, shape: ModelShape) -> int:
        """Longest sequence in tokens; no model sees more than it has positions."""
        return min(self.sequence_len, shape.max_positions or self.sequence_len)

    def completion(self, shape: ModelShape) -> int:
        """Longest completion of RL, in tokens; none where a stage that samples nothing sets no limit."""
        return min(self.max_completion_length or 0, self.longest(shape))

    def tokens(self, shape: ModelShape) -> int:
        """Tokens of a micro-batch at its longest; a preference pair is two sequences, a group of RL has one prompt."""
        rows, longest, completion = self.per_device_train_batch_size, self.longest(shape), self.completion(shape)
        if self.samples:
            return rows * completion + math.ceil(rows / self.num_generations) * (longest - completion)
        return rows * longest * (2 if self.pairs else 1)

    def scored_tokens(self, shape: ModelShape) -> int:
        """Tokens of a micro-batch that may need logits."""
        scored = self.per_device_train_batch_size * self.completion(shape)
        return scored if self.samples else self.tokens(shape)

    def family(self, shape: ModelShape) -> int:
        """Tokens of the sequences that share a prompt within a micro-batch, at their longest."""
        if self.samples:
            members = min(self.num_generations, self.per_device_train_batch_size)
            return self.longest(shape) + (members - 1) * self.completion(shape)
        return self.tokens(shape) // self.per_device_train_batch_size

    def prompts(self) -> int:
        """Different prompts among the completions that are decoded at once."""
        return math.ceil(self.rollout_batch_size / self.num_generations)

    @property
    def has_reference(self) -> bool:
        """Whether a frozen copy is held; with an adapter the reference is the model with the adapter off."""
        return self.holds_reference and self.adapter == "none"
