"""TRL's side, set up as its documentation advises for this work: bf16 said explicitly, no gradient checkpointing."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import workload
from posttrain.files import read_json_lines
from rewards import vowels
from rows import BY_NAME, Row
from side_posttrain import SEED, recorded
from turns import Turns, recorded_trainer


def load(job: Mapping[str, Any], row: Row) -> tuple[Any, Any]:
    """Model and tokenizer; the adapter is drawn from the same seed as ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    more = {"quantization_config": quantised, "device_map": job["device"]} if row.four_bits else {}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, **more)
    if row.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(SEED)
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
    return model, AutoTokenizer.from_pretrained(job["model"])


def training_rows(job: Mapping[str, Any], row: Row) -> Any:
    """The rows, in the order in which our recipe takes them."""
    from datasets import Dataset

    rows = [row for _, row in read_json_lines(Path(job["data"]))]
    return Dataset.from_list([rows[index] for index in workload.training_order(len(rows), SEED)])


def shared_options(row: Row, job: Mapping[str, Any], folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "use_cpu": job["device"] == "cpu", "bf16": row.bf16, "gradient_checkpointing": False,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant",
        "dataloader_pin_memory": job["device"] != "cpu", "max_steps": job["max_steps"], "num_train_epochs": job["epochs"],
        "seed": SEED,
    }  # fmt: skip


def train(row: Row, job: Mapping[str, Any], turns: Turns) -> None:
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    model, tokenizer = load(job, row)
    with tempfile.TemporaryDirectory() as folder:
        options = shared_options(row, job, folder)
        trainer_type, args, more = _CONFIGS[row.task](row, job, options, tokenizer)
        recorded_type, callback = recorded_trainer(trainer_type, turns)
        trainer = recorded_type(
            model=model, args=args, train_dataset=training_rows(job, row), processing_class=tokenizer,
            callbacks=[callback], **more,
        )  # fmt: skip
        trainer.train()


def _sft(row: Row, job: Mapping[str, Any], options: dict[str, Any], tokenizer: Any) -> tuple[type, Any, dict[str, Any]]:
    from trl import SFTConfig, SFTTrainer

    own = {"max_length": row.longest, "per_device_train_batch_size": 8, "learning_rate": 1e-4}
    return SFTTrainer, SFTConfig(**options | own | {"train_sampling_strategy": "sequential"} | row.trl), {}


def _dpo(row: Row, job: Mapping[str, Any], options: dict[str, Any], tokenizer: Any) -> tuple[type, Any, dict[str, Any]]:
    from trl import DPOConfig, DPOTrainer

    own = {"max_length": row.longest, "per_device_train_batch_size": 4, "learning_rate": 1e-5}
    return DPOTrainer, DPOConfig(**options | own | {"train_sampling_strategy": "sequential"} | row.trl), {}


def _grpo(
    row: Row, job: Mapping[str, Any], options: dict[str, Any], tokenizer: Any
) -> tuple[type, Any, dict[str, Any]]:
    from trl import GRPOConfig, GRPOTrainer

    own = {
        "per_device_train_batch_size": workload.GROUP, "gradient_accumulation_steps": row.num_prompts, "learning_rate": 1e-9,
        "num_generations": workload.GROUP, "max_completion_length": workload.MAX_COMPLETION, "shuffle_dataset": False,
    }  # fmt: skip
    more: dict[str, Any] = {"reward_funcs": vowels}
    if row.task == "grpo_train":
        kept = {tokenizer.decode(prompt): (prompt, group) for prompt, group in recorded(job, tokenizer)}

        def replay(prompts: list[str], trainer: Any) -> dict[str, Any]:
            left = {prompt: iter(kept[prompt][1]) for prompt in set(prompts)}
            completions = [list(next(left[prompt])) for prompt in prompts]
            return {"prompt_ids": [list(kept[p][0]) for p in prompts], "completion_ids": completions, "logprobs": None}

        more["rollout_func"] = replay
    return GRPOTrainer, GRPOConfig(**options | own | row.trl), more


def patch_vllm() -> None:
    """TRL hands vLLM its parameters one by one, which the build for CPUs, whose linears are packed, refuses: they go by vLLM's own reload, and the head that
    is tied to the embedding is packed again. vLLM computes in float32 and without compiling, as on our side.
    """
    from functools import partial

    from posttrain.rollout.vllm.options import environment

    # Read when vLLM is imported: in this process, with as much for keys and values as our side gives it.
    os.environ |= environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from trl.generation import vllm_generation
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    def pack_heads(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def sync_weights(self: Any) -> None:
        weights = ((name, parameter.detach()) for name, parameter in self._iter_named_params())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self.llm.apply_model(pack_heads)
        self.llm.reset_prefix_cache()

    vllm_generation.VLLMGeneration.sync_weights = sync_weights
    vllm_generation.LLM = partial(vllm_generation.LLM, dtype="float32", enforce_eager=True)


_CONFIGS = {"sft": _sft, "dpo": _dpo, "grpo": _grpo, "grpo_train": _grpo}
MOST_ROWS = 32


def roll_out(row: Row, job: Mapping[str, Any], turns: Turns) -> None:
    """`generate` as TRL calls it: left-padded prompts, each repeated for its group, at most 32 rows a call."""
    import torch

    device = "cuda" if job["device"] == "cuda" else "cpu"
    model, tokenizer = load(job, row)
    model.to(device).eval()
    prompts = [row["prompt"] for _, row in read_json_lines(Path(job["data"]))]
    torch.manual_seed(SEED)
    for step in range(job["max_steps"]):
        batch = [prompts[(step * row.num_prompts + i) % len(prompts)] for i in range(row.num_prompts)]
        repeated = [prompt for prompt in batch for _ in range(workload.GROUP)]
        tokens = 0
        for start in range(0, len(repeated), MOST_ROWS):
            inputs = tokenizer(
                repeated[start : start + MOST_ROWS], return_tensors="pt", padding=True, padding_side="left"
            )
            with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=row.bf16):
                output = model.generate(
                    input_ids=inputs["input_ids"].to(device), attention_mask=inputs["attention_mask"].to(device),
                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=workload.MAX_COMPLETION,
                )  # fmt: skip
            ended = (output[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id).int()
            tokens += int((ended.cumsum(1) - ended == 0).sum())
        turns.step_done(tokens)


def main() -> None:
    job = json.loads(sys.argv[1])
    row = BY_NAME[job["row"]]
    turns = Turns(job["unit_steps"])
    if row.trl.get("use_vllm"):
        patch_vllm()
    (roll_out if row.task == "rollout" else train)(row, job, turns)


if __name__ == "__main__":
    main()
