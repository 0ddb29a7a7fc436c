"""Two ranks play the episodes of one process, and learn the same from them."""

from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from stage_runner import main, rows

(job,) = jobs = json.loads(sys.argv[1])
main(jobs)
if os.environ.get("RANK", "0") == "0":
    open(os.environ["FOUND"], "w").write(json.dumps(rows(job["folder"])))
"""
ENV = Path(__file__).parents[1] / "environments" / "own_env.py"


@pytest.mark.slow
def test_two_ranks_play_and_learn_as_one_process(found_by, model_dir, data_dir, tmp_path):
    options = {
        "env": f"{ENV}:Echo",
        "max_completion_length": 60,
        "sequence_len": 200,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    found = []
    for ranks in (1, 2):
        job = {
            "kind": "grpo",
            "model": str(model_dir("qwen3")),
            "data": str(data_dir),
            "folder": str(tmp_path / f"run-{ranks}"),
        }
        found.append(found_by(ranks, SCRIPT, [job | {"options": options}]))
    alone, both = found
    assert len(alone) == len(both) == 2
    assert any(row["env/turns"] > 1 for row in alone)
    for one, two in zip(alone, both, strict=True):
        for name in ("env/turns", "env/failed_ratio", "reward", "completions/mean_length", "loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
