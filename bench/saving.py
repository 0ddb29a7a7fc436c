"""What a checkpoint costs a run: how long a step waits for it, how long writing takes, and the share of the run's time.

    python bench/saving.py                     models of 1 M, 5 M and 42 M parameters, saving every step, every 10th, never
    python bench/saving.py --sizes 1M --steps 20

A step waits for the copy of the tensors; a thread writes them. A save that is due while the one before is still being
written waits for it: that part is shown by itself. Full fine-tuning in float32 with AdamW, so a checkpoint is 12 bytes a
parameter; 512 tokens a step. Times are medians; "overhead" is the pause of one step in so many, as a share of their time;
CPU time counts the writing thread too and does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import workload

SHAPES = {"1M": (128, 384, 4), "5M": (256, 768, 6), "42M": (640, 1920, 9)}
"""Name → hidden, intermediate, layers."""
EVERY = (0, 10, 1)
TOKENS = 512


def model_dir(size: str) -> Path:
    folder = workload.OUT / f"model-saving-{size}"
    if not folder.exists():
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        hidden, intermediate, layers = SHAPES[size]
        tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer_dir())
        config = AutoConfig.for_model(
            "qwen3", vocab_size=workload.VOCAB, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, num_key_value_heads=hidden // 64, head_dim=32, max_position_embeddings=1024,
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def rows_file() -> Path:
    """Four rows, each about a quarter of a step's tokens."""
    path = workload.OUT / "saving.jsonl"
    if not path.exists():
        rng, language = random.Random("saving"), workload.words()
        rows = [{"prompt": "Say:", "completion": workload.draw_text(rng, language, TOKENS // 4 - 4)} for _ in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Costs:
    """Seconds, one entry per save (or per step)."""

    copy: list[float] = field(default_factory=list)
    wait: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    num_bytes: int = 0


def measure(size: str, every: int, steps: int) -> tuple[Costs, float]:
    """The costs, and the CPU seconds of a step, all threads together."""
    from posttrain.config.stages import SFTKeys
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes import sft
    from posttrain.recipes.run.stage import Stage
    from posttrain.recipes.run.train_state import Checkpoints, TrainState

    costs, ends = Costs(), list[float]()

    class Timed(Checkpoints):
        def flush(self) -> None:
            started = time.perf_counter()
            super().flush()
            costs.wait.append(time.perf_counter() - started)

        def save(self, state: TrainState, *, wait: bool = True) -> None:
            num_waits, started = len(costs.wait), time.perf_counter()
            super().save(state, wait=wait)
            taken = time.perf_counter() - started
            if wait:  # the last one, which nothing follows
                del costs.wait[num_waits:]
            else:
                costs.copy.append(taken - costs.wait[-1])

    class Watcher:
        def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
            if kind == "checkpoint":
                costs.write.append(details["seconds"])
                costs.num_bytes = details["bytes"]

        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            costs.step.append(metrics["step_time"])
            ends.append(time.process_time())

        def close(self) -> None:
            pass

    keys = SFTKeys.model_validate({
        "base_model": str(model_dir(size)), "datasets": [{"path": str(rows_file())}], "max_steps": steps, "save_steps": every,
        "per_device_train_batch_size": 4, "sequence_len": 256, "learning_rate": 1e-5, "bf16": False, "device": "cpu",
    })  # fmt: skip
    folder = workload.OUT / "saving-run"
    shutil.rmtree(folder, ignore_errors=True)
    stage = Stage("sft", folder, keys, SingleProcess(), watchers=lambda *_: [Watcher()])
    stage.checkpoints = Timed(stage.checkpoints.store, stage.ranks, stage.run)
    sft.run(keys, stage)
    shutil.rmtree(folder)
    # Warm-up steps and the last save, which every run makes and waits for, are left out.
    return costs, (ends[-1] - ends[2]) / (len(ends) - 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=23)
    options = parser.parse_args()
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    for size in options.sizes:
        cpu_alone = 0.0
        for every in EVERY:
            costs, cpu = measure(size, every, options.steps)
            cpu_alone = cpu_alone or cpu
            print("| " + " | ".join(row(size, every, costs, cpu / cpu_alone)) + " |", flush=True)


HEAD = [
    "parameters", "save_steps", "checkpoint MB", "step ms", "copy ms", "wait for the write before ms", "overhead",
    "written in ms", "CPU time",
]  # fmt: skip


def row(size: str, every: int, costs: Costs, cpu_ratio: float) -> list[str]:
    step, copy, wait, write = (
        statistics.median(values) if values else 0.0
        for values in (costs.step, costs.copy, costs.wait, costs.write[:-1] or costs.write)
    )
    pauses = (
        [f"{1000 * copy:.1f}", f"{1000 * wait:.1f}", f"{100 * (copy + wait) / (step * every):.2f} %"]
        if every
        else 3 * ["–"]
    )
    return [
        size, str(every or "end only"), f"{costs.num_bytes / 1e6:.0f}", f"{1000 * step:.0f}", *pauses, f"{1000 * write:.0f}",
        f"{100 * (cpu_ratio - 1):+.1f} %" if every else "–",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
