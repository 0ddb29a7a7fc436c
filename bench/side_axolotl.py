"""Axolotl's side, run by the Python of its own environment: nothing of posttrain is imported here."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turns import Turns, recorded_trainer


def segments(job: Mapping[str, Any], folder: Path) -> Path:
    """The rows as its `input_output` wants them: texts as they stand, the prompt's without a loss."""
    with Path(job["data"]).open(encoding="utf-8") as rows:
        asked = [[(False, row["prompt"]), (True, row["completion"])] for row in map(json.loads, rows)]
    lines = [json.dumps({"segments": [{"label": label, "text": text} for label, text in row]}) for row in asked]
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def options(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """As its documentation writes an SFT; what is said beside is what makes it the same work as ours, and what a CPU needs."""
    adapter = {
        "adapter": "lora", "lora_r": job["rank"], "lora_alpha": job["alpha"], "lora_dropout": 0.0, "lora_target_linear": True,
        # Its Triton kernels, on by themselves, ask for CUDA.
        "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
    }  # fmt: skip
    return {
        "base_model": job["model"], "datasets": [{"path": str(segments(job, folder)), "ds_type": "json", "type": "input_output"}],
        "dataset_prepared_path": str(folder / "prepared"), "output_dir": str(folder / "out"), "val_set_size": 0.0,
        "sequence_len": job["longest"], "sample_packing": job["packing"], "shuffle_merged_datasets": False, "curriculum_sampling": True,
        "micro_batch_size": 1 if job["packing"] else job["batch"], "gradient_accumulation_steps": 1,
        "learning_rate": job["learning_rate"], "lr_scheduler": "constant", "optimizer": "adamw_torch", "warmup_steps": 0, "weight_decay": 0.0,
        "max_grad_norm": 1.0, "num_epochs": job["epochs"], "seed": job["seed"], "save_strategy": "no", "logging_steps": 1,
        "bf16": False, "fp16": False, "tf32": False, "flash_attention": False, "sdp_attention": True, "gradient_checkpointing": False,
    } | ({"max_steps": job["max_steps"]} if job["max_steps"] > 0 else {}) | (adapter if job["lora"] else {})  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[1])
    turns = Turns(job["unit_steps"])
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.core.builders import causal
    from axolotl.loaders import adapter

    causal.AxolotlTrainer, callback = recorded_trainer(causal.AxolotlTrainer, turns)
    get_callbacks, get_peft_model = causal.HFCausalTrainerBuilder.get_callbacks, adapter.get_peft_model
    causal.HFCausalTrainerBuilder.get_callbacks = lambda self: [*get_callbacks(self), callback]

    def seeded(*args: Any, **more: Any) -> Any:
        torch.manual_seed(job["seed"])  # the adapter's matrices are drawn as ours are
        return get_peft_model(*args, **more)

    adapter.get_peft_model = seeded
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(json.dumps(options(job, Path(folder))))  # JSON is YAML
        do_train(load_cfg(str(config)), TrainerCliArgs())


if __name__ == "__main__":
    main()
