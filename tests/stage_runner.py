"""Runs stages for tests: in this process, in a fresh one, or under torchrun.

As a script it takes a JSON list of jobs `{kind, model, data, folder, stop_after, options}` and runs them in order.
"""

import json
import sys
from pathlib import Path

import torch

from posttrain.config.kinds import STAGE_KINDS
from posttrain.distributed.ranks import join_ranks
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.run.stage import Stage, run_recipe
from posttrain.recipes.run.stop import StopFlag, StoppedPolitely

FILES = {
    "sft": "sft",
    "dpo": "pairs",
    "reward_model": "pairs",
    "process_reward_model": "steps",
    "grpo": "prompts",
    "ppo": "prompts",
    "online_dpo": "prompts",
    "distill": "prompts",
    "ebft": "sft",
}
COMMON = {"learning_rate": 3e-3, "max_steps": 4, "per_device_train_batch_size": 4, "sequence_len": 128, "seed": 7}
OWN = {
    "sft": {},
    "dpo": {},
    "reward_model": {},
    "process_reward_model": {},
    "grpo": {
        "num_generations": 4, "num_prompts_per_step": 2, "max_completion_length": 6, "reward_check": "off",
        "reward_funcs": ["spread"],
    },
    "ppo": {
        "num_generations": 2, "num_prompts_per_step": 4, "max_completion_length": 6, "reward_check": "off",
        "reward_funcs": ["spread"], "critic_learning_rate": 3e-3,
    },
    "online_dpo": {
        "num_generations": 4, "num_prompts_per_step": 2, "max_completion_length": 6, "reward_check": "off",
        "reward_funcs": ["spread"],
    },
    "distill": {
        "num_generations": 4, "num_prompts_per_step": 2, "max_completion_length": 6,
        "teachers": [{"model": "policy", "prompt": "{prompt} A correct solution: {answer}"}],
    },
    "ebft": {"num_generations": 4, "num_prompts_per_step": 2, "max_completion_length": 6},
}  # fmt: skip


def keys_of(kind: str, model: Path, data: Path, **options):
    """Keys of a short stage on a tiny model; `spread` among the rewards means that function of `data/rewards.py`."""
    values = {**COMMON, **OWN[kind], **options}
    values.setdefault("datasets", [{"path": str(data / f"{FILES[kind]}.jsonl")}])
    if "reward_funcs" in values:
        values["reward_funcs"] = [
            name if ":" in name else f"{data / 'rewards.py'}:{name}" for name in values["reward_funcs"]
        ]
    return STAGE_KINDS[kind].keys.model_validate({"base_model": str(model), **values})


class StopAfter:
    """A sink that wishes the run to stop politely while step `number` is in hand."""

    def __init__(self, number: int, flag: StopFlag) -> None:
        self.number, self.flag = number, flag

    def log(self, step, metrics) -> None:
        if step == self.number:
            self.flag._event.set()

    def event(self, kind, step, details) -> None:
        pass

    def close(self) -> None:
        pass


def run_stage(kind: str, folder: Path, keys, stop_after: int | None = None, ranks=None):
    """The stage's result, or None if it was stopped politely."""
    flag = StopFlag()

    def watchers(kind, total):
        return [StopAfter(stop_after, flag)] if stop_after else []

    if ranks is None:
        with join_ranks() as single:
            return run_stage(kind, folder, keys, stop_after, single)

    def begun():
        return Stage(kind, Path(folder), keys, ranks, watchers=watchers, stop=flag)

    try:
        return run_recipe(LOOPS[kind], keys, begun)
    except StoppedPolitely:
        return None


def rows(folder: Path) -> list[dict]:
    """The logged metrics without what no other run repeats: times, speeds, memory, and what is said of ranks."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not _unrepeatable(k)} for line in lines]


def _unrepeatable(name: str) -> bool:
    return (
        name in ("time", "step_time")
        or name.startswith(("time/", "memory", "ranks/", "sync/moved"))
        or name.endswith(("_s", "_bytes"))
    )


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The trained model, or the adapter where there is one; with the critic where there is one."""
    from safetensors.torch import load_file

    adapter, critic = Path(folder) / "adapter/adapter_model.safetensors", Path(folder) / "critic/model.safetensors"
    beside = {f"critic.{name}": tensor for name, tensor in load_file(critic).items()} if critic.exists() else {}
    return load_file(adapter if adapter.exists() else Path(folder) / "model/model.safetensors") | beside


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    with join_ranks() as ranks:
        for job in jobs:
            keys = keys_of(job["kind"], Path(job["model"]), Path(job["data"]), **job["options"])
            run_stage(job["kind"], Path(job["folder"]), keys, job.get("stop_after"), ranks)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
