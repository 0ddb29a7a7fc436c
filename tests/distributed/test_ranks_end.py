"""Ranks leave no thread of gloo behind, which could abort an interpreter that is ending."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from contextlib import suppress
from pathlib import Path
import torch
import stage_runner
from posttrain.config.kinds import STAGE_KINDS
from posttrain.distributed.ranks import join_ranks
from posttrain.errors import TrainingError

def threads():
    count = 0
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has just ended
            count += "gloo" in (task / "comm").read_text()
    return count

def trains(job, ranks):
    keys = stage_runner.keys_of("sft", Path(job["model"]), Path(job["data"]), **job["options"])
    stage_runner.run_stage("sft", Path(job["folder"]), keys, None, ranks)

torch.set_num_threads(1)
job, before = json.loads(sys.argv[1]), 0
try:
    with join_ranks() as ranks:
        trains(job, ranks)
        before = threads()
except TrainingError:
    before = 1
(Path(job["found"]) / os.environ["RANK"]).write_text(json.dumps([before, threads()]))
"""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow, id="done"),
        pytest.param(
            {"health": {"gradient_spike": {"times": 0.0, "after": 1, "at_least": 0.0, "action": "stop"}}},
            id="ended by an error",
        ),
    ],
)
def test_no_thread_of_gloo_outlives_the_ranks(options, model_dir, data_dir, runner, tmp_path):
    script = tmp_path / "end.py"
    script.write_text(SCRIPT)
    found = tmp_path / "found"
    found.mkdir()
    job = {
        "model": str(model_dir("llama")), "data": str(data_dir), "folder": str(tmp_path / "run"), "options": options,
        "found": str(found),
    }  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), json.dumps(job)], capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(runner.__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    of_ranks = [json.loads(path.read_text()) for path in found.iterdir()]
    assert len(of_ranks) == 2
    for before, after in of_ranks:
        assert before > 0
        assert after == 0
