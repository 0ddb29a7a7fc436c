"""The same questions asked by our evaluator or by lm-eval: `python bench/side_eval.py JOB`, all items a turn, the model loaded in each.

JOB's `side` is a row of `SIDES`. What was answered is kept, item by item, with its score.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turns import Turns

Answers = Sequence[tuple[str, float]]
"""Of each item: what was said or chosen, and its score."""
_ROWS = 128
"""Of a batch, as our evaluator takes."""


def suite(job: Mapping[str, Any]) -> Answers:
    """Our own, on a suite of JSON lines."""
    return _reported(job, job["suite"])


def task(job: Mapping[str, Any]) -> Answers:
    """Our engine under lm-eval's task, as `lm-eval:TASK.yaml` in a pipeline."""
    chat = "?apply_chat_template=true" if job["chat"] else ""
    return _reported(job, f"lm-eval:{job['task']}{chat}")


def _reported(job: Mapping[str, Any], path: str) -> Answers:
    from posttrain.config.pipeline import SuiteKeys
    from posttrain.config.stages import ModelKeys
    from posttrain.evals.suite import load_suite
    from posttrain.recipes.measure.evaluate import evaluate

    keys = SuiteKeys(path=path, max_tokens=job["max_tokens"])
    with tempfile.TemporaryDirectory() as folder:
        asked = [(load_suite("asked", Path(path)), keys)]
        [report] = evaluate(ModelKeys(base_model=job["model"], device="cpu"), asked, "gate", Path(folder)).values()
    return [(item.completions[0] if item.completions else "", item.score) for item in report.items]


def lm_eval(job: Mapping[str, Any]) -> Answers:
    """lm-eval with its own `hf` model."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found: Any = simple_evaluate(
        model="hf", model_args={"pretrained": job["model"], "dtype": "float32"}, tasks=[job["task"]], device="cpu", batch_size=_ROWS,
        apply_chat_template=job["chat"], task_manager=TaskManager(include_defaults=False), log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    [samples] = found["samples"].values()
    return [
        (_said(sample), float(sample[sample["metrics"][0]])) for sample in sorted(samples, key=lambda s: s["doc_id"])
    ]


def _said(sample: Mapping[str, Any]) -> str:
    if "choices" not in sample["doc"]:
        return sample["resps"][0][0]
    logps = [float(answer[0]) for answer in sample["filtered_resps"]]
    return sample["doc"]["choices"][logps.index(max(logps))]


SIDES = {"suite": suite, "task": task, "lm_eval": lm_eval}


def main() -> None:
    job = json.loads(sys.argv[1])
    turns = Turns(1)
    for _ in range(job["max_steps"]):
        answers = SIDES[job["side"]](job)
        Path(job["answers"]).write_text(json.dumps(answers))
        turns.step_done(len(answers), sum(score for _, score in answers) / len(answers))


if __name__ == "__main__":
    main()
