"""Stopped after two of four steps and continued in a fresh process: the same weights, bit by bit, and the same metrics."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LORA = {"adapter": "lora", "lora_r": 4}
SHARED = {"save_steps": 1}
ROWS = {
    "sft": ("sft", {}),
    "sft packed, accumulated, over epochs": ("sft", {"packing": True, "sequence_len": 64, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
    "sft with an adapter and its dropout": ("sft", {**LORA, "lora_dropout": 0.2}),
    "sft on 4 bits": ("sft", {"adapter": "qlora", "load_in_4bit": True, "lora_r": 4}),
    "sft with 8-bit adam": ("sft", {"optim": "adamw_8bit"}),
    "sft with a schedule and the best checkpoint": ("sft", {"warmup_steps": 2, "eval_steps": 1, "load_best_model_at_end": True, "eval": "dev-sft"}),
    "dpo": ("dpo", {}),
    "dpo with an adapter": ("dpo", LORA),
    "ipo, live reference": ("dpo", {"loss_type": "ipo", "precompute_ref_log_probs": False}),
    "orpo": ("dpo", {"loss_type": "orpo"}),
    "kto": ("dpo", {"loss_type": "kto", "data": "kto"}),
    "grpo": ("grpo", {}),
    "grpo, a batch used four times": ("grpo", {"num_iterations": 2, "steps_per_generation": 2}),
    "grpo with an adapter and kl": ("grpo", {**LORA, "beta": 0.1, "num_iterations": 2}),
    "grpo, refilled": ("grpo", {"dynamic_sampling": True, "reward_funcs": ["last_digit"], "num_prompts_per_step": 3}),
    "gspo": ("grpo", {"loss_type": "gspo", "steps_per_generation": 2}),
    "rloo with kl in the reward": ("grpo", {"loss_type": "rloo", "beta": 0.1, "kl_in_reward": True}),
}  # fmt: skip


QUICK = (
    "sft packed, accumulated, over epochs", "sft with an adapter and its dropout", "sft with 8-bit adam",
    "sft with a schedule and the best checkpoint", "dpo with an adapter", "kto", "grpo, a batch used four times",
    "grpo, refilled",
)  # fmt: skip
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ROWS]


def options_of(name, data_dir):
    kind, options = ROWS[name]
    options = {**SHARED, **options}
    if "data" in options:
        options["datasets"] = [{"path": str(data_dir / f"{options.pop('data')}.jsonl")}]
    if "eval" in options:
        options["eval_datasets"] = [{"path": str(data_dir / f"{options.pop('eval')}.jsonl")}]
    return kind, options


@pytest.fixture(scope="module")
def resumed(request, runner, model_dir, data_dir, tmp_path_factory):
    """The rows that are asked for, run through; and stopped here and continued together in one fresh process."""
    folder, model, jobs = tmp_path_factory.mktemp("resume"), model_dir("llama"), []
    asked = {
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    }
    for number, name in enumerate(ROWS):
        if name not in asked | {"grpo, refilled"}:
            continue
        kind, options = options_of(name, data_dir)
        keys = runner.keys_of(kind, model, data_dir, **options)
        runner.run_stage(kind, folder / f"{number}-straight", keys)
        assert runner.run_stage(kind, folder / f"{number}-stopped", keys, stop_after=2) is None
        jobs.append(
            {
                "kind": kind,
                "model": str(model),
                "data": str(data_dir),
                "folder": str(folder / f"{number}-stopped"),
                "options": options,
            }
        )
    script = Path(runner.__file__)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(jobs)], check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_continued_run_is_the_uninterrupted_one(name, resumed, runner):
    straight, stopped = (resumed / f"{list(ROWS).index(name)}-{part}" for part in ("straight", "stopped"))
    assert runner.rows(stopped) == runner.rows(straight)
    expected, found = runner.weights(straight), runner.weights(stopped)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    results = [json.loads((folder / "result.json").read_text()) for folder in (straight, stopped)]
    for result in results:
        result.pop("wall_s")
    assert results[0] == results[1]


def test_the_rollouts_are_issued_and_trained_once(resumed):
    """The ledger of a stopped run is that of an uninterrupted one."""
    number = list(ROWS).index("grpo, refilled")
    ledgers = []
    for part in ("straight", "stopped"):
        lines = (resumed / f"{number}-{part}/events.jsonl").read_text().splitlines()
        ledgers.append([event["prompts"] for event in map(json.loads, lines) if event["kind"] == "rollouts"])
    assert ledgers[0] == ledgers[1]
    issued = [prompt for ledger in ledgers[0] for prompt in ledger["issued"]]
    assert issued == list(range(len(issued)))
