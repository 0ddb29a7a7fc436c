"""The pipeline as something to kill: SFT, DPO, GRPO, evals, a gate, a registration and a promotion."""

import json
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.load_pipeline import load_pipeline
from posttrain.distributed.ranks import SingleProcess
from posttrain.pipeline.run import Watch, run_pipeline
from posttrain.pipeline.state import RunState
from posttrain.registry.registry import Registry
from posttrain.report.records import read_run

STAGES = [
    {"sft": {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 3, "save_steps": 1,
             "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}},
    {"dpo": {"datasets": [{"path": "pairs.jsonl"}], "learning_rate": 1e-4, "max_steps": 2, "save_steps": 1,
             "per_device_train_batch_size": 4}},
    {"grpo": {"datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:spread"], "reward_check": "off",
              "learning_rate": 1e-4, "max_steps": 4, "num_generations": 4, "num_prompts_per_step": 2, "save_steps": 1,
              "max_completion_length": 6, "temperature": 2.0, "steps_per_generation": 2, "num_iterations": 2,
              "per_device_train_batch_size": 8}},
]  # fmt: skip


def pipeline_driver(harness: Any, projects: Any, runner: Any, model: Path) -> Any:
    """A `Driver`. `projects` is the module that writes the files of a small project."""

    def prepare(folder: Path) -> None:
        if (folder / "pipeline.yaml").exists():
            return
        folder.mkdir(parents=True)
        projects.make_files(folder, num_items=36)
        values = {
            "name": "yes", "base_model": str(model), "sequence_len": 64, "seed": 1, "stages": STAGES,
            "evals": {"yes": {"path": "yes.jsonl", "max_tokens": 6}},
            "gate": {"guards": [{"suite": "yes", "margin": 0.4}]}, "register": {"name": "yes"},
        }  # fmt: skip
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(values, sort_keys=False))

    def run(folder: Path) -> None:
        keys = load_pipeline(folder / "pipeline.yaml", ()).keys
        outcome = run_pipeline(keys, SingleProcess(), watch=Watch(say=lambda line: None))
        assert outcome.status == "passed", outcome

    return harness.Driver("pipeline", run, lambda folder: trace_of(folder, harness, runner), prepare)


def trace_of(folder: Path, harness: Any, runner: Any) -> dict[str, Any]:
    out = folder / "runs/yes"
    record, state, book = read_run(out), RunState.load(out), Registry(folder / "registry")
    assert state is not None
    try:
        entries = [(entry.version, entry.digest, tuple(entry.aliases)) for entry in book.entries()]
        events = [(event.action, event.version) for event in book.rows.events()]
    finally:
        book.close()
    prompts = harness.ledger(out / "stages/03-grpo")
    return {
        "problems": record.problems,
        "status": state.status,
        "models": [(entry.index, entry.attempt, entry.status, entry.output_digest) for entry in state.stages],
        "verdicts": [(entry.after, entry.verdict, entry.candidate, entry.baseline) for entry in state.gates],
        "metrics": {path.parent.name: runner.rows(path.parent) for path in sorted(out.glob("stages/*/metrics.jsonl"))},
        "result": [json.loads(path.read_text())["metrics"] for path in sorted(out.glob("stages/*/result.json"))],
        "items": {
            name: {str(key): report.digest for key, report in reports.items()} for name, reports in record.evals.items()
        },
        "registered": entries,
        "promotions": events,
        "ledger": prompts,
        "exactly once": harness.is_exactly_once(prompts),
    }
