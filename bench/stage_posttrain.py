"""One stage of the quickstart as `posttrain run` runs it: `python bench/stage_posttrain.py JOB` for time_to_accuracy.py.

JOB is JSON: kind, model, seed, folder, max_steps (0 leaves it to the YAML), `set`, further keys, and `config`, the YAML of a stage
by itself where it is none of the pipeline's.
Writes `folder/model` and `folder/stage.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.files import read_json_lines

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart"


def pipeline_of(seed: int, changes: Sequence[str] = ()) -> Any:
    from posttrain.config.load_pipeline import load_pipeline

    return load_pipeline(QUICKSTART / "pipeline.yaml", [f"seed={seed}", *changes]).keys


def keys_of(job: Mapping[str, Any]) -> Any:
    """The stage's keys, from the quickstart's YAML: both sides take their hyperparameters from here."""
    from posttrain.config.load import load_stage

    kind, seed, changes = job["kind"], job["seed"], job.get("set", ())
    if config := job.get("config"):
        keys = load_stage(kind, Path(config), [f"seed={seed}", *changes]).keys
    else:
        [keys] = [stage.keys for stage in pipeline_of(seed, changes).stages if stage.kind == kind]
    changed = {"base_model": job["model"], "device": "cpu"}
    if job["max_steps"]:
        changed["max_steps"] = job["max_steps"]
    return keys.model_copy(update=changed)


def report(folder: Path, *, call_s: float, losses: list[float], metrics: Mapping[str, Any]) -> None:
    (folder / "stage.json").write_text(json.dumps({"call_s": call_s, "losses": losses, "metrics": dict(metrics)}))


def main() -> None:
    # Both sides have the model's classes imported when the clock of the training call starts.
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM  # noqa: F401

    from posttrain.config.rl import RLKeys
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes.kinds import LOOPS
    from posttrain.recipes.measure.certify import certify, require
    from posttrain.recipes.run.stage import Stage

    job = json.loads(sys.argv[1])
    folder, keys = Path(job["folder"]), keys_of(job)
    if isinstance(keys, RLKeys) and keys.reward_check == "require":
        require(certify(keys, folder / "certificate.json"))
    start = time.perf_counter()
    LOOPS[job["kind"]](keys, Stage(job["kind"], folder, keys, SingleProcess()))
    call_s = time.perf_counter() - start
    steps = [row for _, row in read_json_lines(folder / "metrics.jsonl")]
    # The parts of an RL step, summed over the run.
    parts = {name: sum(step.get(name, 0.0) for step in steps) for name in ("time/rollout_s", "time/train_s")}
    names = ("reward", "completions/mean_length", "completions/clipped_ratio")
    first = {name: [step[name] for step in steps[:5] if name in step] for name in names}
    metrics = parts | first | {"rows_per_step": keys.rows_per_step(1)}
    report(folder, call_s=call_s, losses=[step["loss"] for step in steps if "loss" in step], metrics=metrics)


if __name__ == "__main__":
    main()
