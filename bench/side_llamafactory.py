"""LLaMA-Factory's side, run by the Python of its own environment: nothing of posttrain is imported here."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turns import Turns, recorded_trainer

NAME = "rows"


def dataset_info(job: Mapping[str, Any], folder: Path) -> None:
    columns = {"prompt": "prompt", "response": "completion"}
    info = {NAME: {"file_name": job["data"], "formatting": "alpaca", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def options(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """As its documentation writes an SFT; what is said beside is what makes it the same work as ours."""
    adapter = {"finetuning_type": "lora", "lora_target": "all", "lora_rank": job["rank"], "lora_alpha": job["alpha"]}
    packed = {"packing": True, "neat_packing": True, "per_device_train_batch_size": 1}
    return {
        "stage": "sft", "do_train": True, "model_name_or_path": job["model"], "dataset": NAME, "dataset_dir": str(folder),
        # The rows' texts end with the token that ends a turn.
        "template": "empty", "cutoff_len": job["longest"], "disable_shuffling": True, "overwrite_cache": True,
        "output_dir": str(folder / "out"), "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "per_device_train_batch_size": job["batch"], "learning_rate": job["learning_rate"], "lr_scheduler_type": "constant",
        "max_steps": job["max_steps"], "num_train_epochs": job["epochs"], "seed": job["seed"],
        "bf16": False, "disable_gradient_checkpointing": True, "dataloader_pin_memory": False,
    } | (adapter if job["lora"] else {"finetuning_type": "full"}) | (packed if job["packing"] else {})  # fmt: skip


def main() -> None:
    job = json.loads(sys.argv[1])
    turns = Turns(job["unit_steps"])
    import torch
    from llamafactory.model import adapter
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    workflow.CustomSeq2SeqTrainer, callback = recorded_trainer(workflow.CustomSeq2SeqTrainer, turns)
    get_peft_model = adapter.get_peft_model

    def seeded(*args: Any, **more: Any) -> Any:
        torch.manual_seed(job["seed"])  # the adapter's matrices are drawn as ours are
        return get_peft_model(*args, **more)

    adapter.get_peft_model = seeded
    with tempfile.TemporaryDirectory() as folder:
        dataset_info(job, Path(folder))
        run_exp(options(job, Path(folder)), callbacks=[callback])


if __name__ == "__main__":
    main()
