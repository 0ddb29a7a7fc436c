"""The comparisons, one row each: what is trained, how TRL is set up for it, and what ratio is aimed for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import workload


@dataclass(frozen=True)
class Row:
    """`trl` and `ours` are options beside those both sides share. A pair is `unit_steps` steps, or an epoch if None.

    `same_batches` says that step n trains the same rows on both sides, so that tokens and losses must be equal.
    `four_bits`: the base of the adapter is in NF4, its constants quantised too.
    `least` and `aim` are ratios of speed; for `task="startup"` of time.
    """

    name: str
    title: str
    task: str
    least: float | None = None
    aim: float | None = None
    model: str = "nano"
    lora: bool = False
    four_bits: bool = False
    bf16: bool = False
    num_prompts: int = 4
    unit_steps: int | None = 2
    trl: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    setup: str = "padded batches"
    same_batches: bool = True
    longest: int = workload.LONGEST
    extra: bool = False


GROUPED = {"train_sampling_strategy": "group_by_length"}
TRL_PACKED = {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
OURS_PACKED = {"packing": True, "per_device_train_batch_size": 1}
EIGHT_K = {"per_device_train_batch_size": 4}
RECOMPUTED = {"gradient_checkpointing": True}
"""TRL's own default, which side_trl.py turns off elsewhere."""
DEFAULTS = "its defaults, bf16"
SHIPPED = "as shipped"

ROWS = (
    Row("sft", "SFT full f32", "sft", 2.5, 3.5),
    Row("sft-small", "SFT full f32, 42 M", "sft", 2.8, 4.0, model="small", unit_steps=1),
    Row("sft-grouped", "SFT full f32", "sft", 1.8, 2.5, unit_steps=None, trl=GROUPED, setup="group_by_length", same_batches=False),
    Row("sft-packed", "SFT full f32, packed", "sft", 1.5, 2.0, unit_steps=None, trl=TRL_PACKED, ours=OURS_PACKED, setup="packing bfd, 1 × 1024", same_batches=False),
    Row("sft-bf16", "SFT full, bf16 autocast", "sft", 3.0, 4.0, bf16=True),
    Row("sft-lora", "SFT LoRA r16 all-linear", "sft", 3.2, 4.0, lora=True),
    Row("sft-qlora", "SFT QLoRA r16 all-linear", "sft", 3.2, 4.5, lora=True, four_bits=True),
    Row("dpo", "DPO full, frozen reference", "dpo", 3.0, 4.0, setup=SHIPPED),
    Row("dpo-lora", "DPO LoRA, adapter off", "dpo", 3.1, 4.0, lora=True, setup=SHIPPED),
    Row("rollout", "GRPO rollouts, 4 × 8", "rollout", 2.5, 4.0, unit_steps=1, setup="transformers generate", same_batches=False),
    Row("rollout-12", "GRPO rollouts, 12 × 8", "rollout", 4.3, 6.0, num_prompts=12, unit_steps=1, setup="generate in calls of 32", same_batches=False),
    Row("grpo-train", "GRPO training half, 4 × 8", "grpo_train", 3.5, 4.5, unit_steps=1, setup=SHIPPED),
    Row("grpo", "GRPO whole step, 4 × 8", "grpo", 2.5, 4.0, unit_steps=1, setup=SHIPPED, same_batches=False),
    Row("grpo-12", "GRPO whole step, 12 × 8", "grpo", 3.2, 4.0, num_prompts=12, unit_steps=1, setup=SHIPPED, same_batches=False),
    Row("startup", "process start to the end of step 1", "startup", 0.8, 0.5, setup="trl sft", same_batches=False),
    # The rest of the grid, with --all.
    Row("sft-lora-bf16", "SFT LoRA, bf16 autocast", "sft", lora=True, bf16=True, extra=True),
    Row("sft-defaults", "SFT full, bf16", "sft", bf16=True, trl={"gradient_checkpointing": True}, setup="its defaults: recomputes", extra=True),
    Row("sft-small-bf16", "SFT full, bf16, 42 M", "sft", model="small", bf16=True, unit_steps=1, extra=True),
    Row("sft-small-lora", "SFT LoRA, 42 M", "sft", model="small", lora=True, unit_steps=1, extra=True),
    Row("sft-llama", "SFT full f32, Llama", "sft", model="llama", extra=True),
    Row("sft-wide", "SFT full f32, vocabulary 151,936", "sft", model="wide", unit_steps=1, ours={"per_device_train_batch_size": 2}, trl={"per_device_train_batch_size": 2}, extra=True),
    Row("dpo-bf16", "DPO full, bf16 autocast", "dpo", bf16=True, setup=SHIPPED, extra=True),
    Row("dpo-lora-bf16", "DPO LoRA, bf16 autocast", "dpo", lora=True, bf16=True, setup=SHIPPED, extra=True),
    Row("dpo-lora-cached", "DPO LoRA, reference cached by both", "dpo", lora=True, trl={"precompute_ref_log_probs": True}, ours={"precompute_ref_log_probs": True}, setup="precompute_ref_log_probs", extra=True),
    Row("dpo-llama", "DPO full f32, Llama", "dpo", model="llama", setup=SHIPPED, extra=True),
    Row("rollout-small", "GRPO rollouts, 4 × 8, 42 M", "rollout", model="small", unit_steps=1, setup="transformers generate", same_batches=False, extra=True),
    Row("grpo-train-lora", "GRPO training half, LoRA", "grpo_train", lora=True, unit_steps=1, setup=SHIPPED, extra=True),
    Row("grpo-train-bf16", "GRPO training half, bf16 autocast", "grpo_train", bf16=True, unit_steps=1, setup=SHIPPED, extra=True),
    Row("grpo-lora", "GRPO whole step, LoRA, 4 × 8", "grpo", lora=True, unit_steps=1, setup=SHIPPED, same_batches=False, extra=True),
    # Of make gpu-bench.
    Row("gpu-sft", "SFT full 0.6 B, bf16", "sft", model="0.6b", bf16=True, ours=EIGHT_K, trl=EIGHT_K | RECOMPUTED, setup=DEFAULTS, same_batches=False, longest=8192, extra=True),
    Row("gpu-sft-kept", "SFT full 0.6 B, bf16", "sft", model="0.6b", bf16=True, ours=EIGHT_K, trl=EIGHT_K, setup="without recomputing", same_batches=False, longest=8192, extra=True),
    Row("gpu-sft-lora", "SFT LoRA 0.6 B, bf16", "sft", model="0.6b", lora=True, bf16=True, ours=EIGHT_K, trl=EIGHT_K | RECOMPUTED, setup=DEFAULTS, same_batches=False, longest=8192, extra=True),
    Row("gpu-dpo", "DPO full 0.6 B, bf16", "dpo", model="0.6b", bf16=True, trl=RECOMPUTED, setup=DEFAULTS, extra=True),
    Row("gpu-grpo-train", "GRPO training half 0.6 B, bf16", "grpo_train", model="0.6b", bf16=True, unit_steps=1, trl=RECOMPUTED, setup=DEFAULTS, extra=True),
    Row("gpu-grpo", "GRPO whole step 0.6 B, bf16", "grpo", model="0.6b", bf16=True, unit_steps=1, trl=RECOMPUTED, setup=DEFAULTS, same_batches=False, extra=True),
    Row("gpu-rollout", "GRPO rollouts 0.6 B, bf16", "rollout", model="0.6b", bf16=True, unit_steps=1, setup="transformers generate", same_batches=False, extra=True),
    Row("grpo-bf16", "GRPO whole step, bf16 autocast, 4 × 8", "grpo", bf16=True, unit_steps=1, setup=SHIPPED, same_batches=False, extra=True),
)  # fmt: skip
VLLM = {"rollout": {"engine": "vllm"}}
PEER_ROWS = (
    Row("rollout-12-vllm", "GRPO rollouts, 12 × 8", "rollout", num_prompts=12, unit_steps=1, ours=VLLM, same_batches=False),
    Row("grpo-vllm", "GRPO whole step, 4 × 8, both with vLLM", "grpo", unit_steps=1, ours=VLLM, trl={"use_vllm": True, "vllm_mode": "colocate"}, same_batches=False),
)  # fmt: skip
"""Of bench/peers.py."""
BY_NAME = {row.name: row for row in (*ROWS, *PEER_ROWS)}
