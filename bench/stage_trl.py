"""The same stage through TRL's trainer, on the same rows in the same order, with the same hyperparameters.

As a competent user sets it up on a CPU: float32 as on our side, no gradient checkpointing, no saving but at the end, no reporting. Prompts and answers of SFT and DPO are handed over as text, rendered with
the tokenizer's chat template, because from messages TRL would also train the newline behind the end of a turn.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import workload
from posttrain.files import read_json_lines
from stage_posttrain import keys_of, report

SAME_NAME = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "max_grad_norm", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed",
)  # fmt: skip
SAME_IN_GRPO = (
    "num_generations", "max_completion_length", "temperature", "top_p", "top_k", "beta", "loss_type", "epsilon",
    "num_iterations", "scale_rewards", "use_bias_correction_kl",
)  # fmt: skip


def rows_of(keys: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The stage's rows in the order in which our recipe takes them."""
    rows = [row for _, row in read_json_lines(Path(keys.datasets[0].path))]
    return [as_text(rows[index], tokenizer) for index in workload.training_order(len(rows), keys.seed)]


def as_text(row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Prompt and answers rendered; rows of RL stay conversations, as the reward wants them."""

    def prompt(messages: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    if "messages" in row:
        *before, answer = row["messages"]
        return {"prompt": prompt(before), "completion": answer["content"] + tokenizer.eos_token}
    if "chosen" in row:
        answers = {side: row[side][0]["content"] + tokenizer.eos_token for side in ("chosen", "rejected")}
        return {"prompt": prompt(row["prompt"]), **answers}
    return dict(row)


def reward_of(spec: str) -> Any:
    path, name = spec.rsplit(":", 1)
    loaded = importlib.util.spec_from_file_location("quickstart_rewards", path)
    assert loaded is not None and loaded.loader is not None
    module = importlib.util.module_from_spec(loaded)
    loaded.loader.exec_module(module)
    return getattr(module, name)


def config_of(kind: str, keys: Any, folder: Path) -> tuple[type, Any, dict[str, Any]]:
    """Trainer, its config and what else it is made with."""
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    options: dict[str, Any] = {name: getattr(keys, name) for name in SAME_NAME} | {
        "output_dir": str(folder / "trainer"), "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1,
    }  # fmt: skip
    in_order: dict[str, Any] = {"max_length": keys.sequence_len, "train_sampling_strategy": "sequential"}
    if kind == "sft":
        return SFTTrainer, SFTConfig(**options | in_order), {}
    if kind == "dpo":
        losses: dict[str, Any] = {
            "loss_type": [keys.loss_type, "sft"],
            "loss_weights": [1.0, keys.rpo_alpha],
            "beta": keys.beta,
        }
        return DPOTrainer, DPOConfig(**options | in_order | losses), {}
    completions = keys.num_prompts_per_step * keys.num_generations
    own: dict[str, Any] = {name: getattr(keys, name) for name in SAME_IN_GRPO} | {"shuffle_dataset": False}
    own["gradient_accumulation_steps"] = completions // keys.per_device_train_batch_size
    rewards = [reward_of(spec) for spec in keys.reward_funcs]
    return GRPOTrainer, GRPOConfig(**options | own), {"reward_funcs": rewards}


def main() -> None:
    import torch
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoModelForCausalLM, AutoTokenizer

    disable_progress_bar()
    job = json.loads(sys.argv[1])
    folder, keys = Path(job["folder"]), keys_of(job)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    trainer_type, config, more = config_of(job["kind"], keys, folder)

    class Recorded(trainer_type):
        micro_losses: list[float] = []  # noqa: RUF012 - one trainer per process

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            self.micro_losses.append(float(loss))
            return loss

    trainer = Recorded(
        model=model, args=config, train_dataset=Dataset.from_list(rows_of(keys, tokenizer)), processing_class=tokenizer, **more
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    call_s = time.perf_counter() - start
    trainer.save_model(str(folder / "model"))
    each = config.gradient_accumulation_steps
    losses = [sum(trainer.micro_losses[i : i + each]) for i in range(0, len(trainer.micro_losses), each)]
    names = ("reward", "completions/mean_length", "completions/clipped_ratio")
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    report(folder, call_s=call_s, losses=losses, metrics={n: [e[n] for e in logged[:5] if n in e] for n in names})


if __name__ == "__main__":
    main()
