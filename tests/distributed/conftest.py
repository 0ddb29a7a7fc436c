"""The command on several processes, `torchrun(2, "sft", yaml)`, and a script on them, `found_by(2, SCRIPT, job)`."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

COMMON = {"learning_rate": 1e-4, "max_steps": 6, "sequence_len": 128, "seed": 7, "save_steps": 1}
OWN = {
    "sft": {"per_device_train_batch_size": 2},
    "dpo": {"per_device_train_batch_size": 2, "allow_raw_base": True},
    "grpo": {
        "per_device_train_batch_size": 4, "allow_raw_base": True, "reward_check": "off", "num_generations": 4,
        "num_prompts_per_step": 4, "max_completion_length": 6,
    },
}  # fmt: skip
FILES = {"sft": "sft", "dpo": "pairs", "grpo": "prompts"}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture
def write_yaml(model_dir, data_dir, tmp_path):
    """`write_yaml("sft", max_steps=2)` writes a stage's YAML beside the folder `run` that it trains into."""

    def write(kind, *, architecture="llama", name="stage.yaml", **options):
        keys = {"base_model": str(model_dir(architecture)), "output_dir": str(tmp_path / "run"), **COMMON, **OWN[kind]}
        keys["datasets"] = [{"path": str(data_dir / f"{FILES[kind]}.jsonl")}]
        if kind == "grpo":
            keys["reward_funcs"] = [f"{data_dir / 'rewards.py'}:spread"]
        path = tmp_path / name
        path.write_text(yaml.safe_dump(keys | options))
        return path

    return write


def environment(**changes):
    return {**os.environ, **ENVIRONMENT, **changes}


def command(num_processes, *arguments):
    alone = [sys.executable, "-m", "posttrain.cli.app"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    return [*(alone if num_processes == 1 else [*launcher, "-m", "posttrain.cli.app"]), *map(str, arguments)]


def run(num_processes, *arguments, timeout=300, **changes):
    return subprocess.run(
        command(num_processes, *arguments), check=False, capture_output=True, text=True, timeout=timeout,
        env=environment(**changes),
    )  # fmt: skip


@pytest.fixture
def torchrun():
    """`torchrun(2, "sft", yaml)`: the command on so many processes; with 1, alone. It must succeed."""

    def call(num_processes, *arguments, **changes):
        done = run(num_processes, *arguments, **changes)
        assert done.returncode == 0, done.stderr[-6000:]
        return done

    return call


@pytest.fixture
def refused():
    """The same where it must not succeed."""

    def call(num_processes, *arguments, **changes):
        done = run(num_processes, *arguments, **changes)
        assert done.returncode != 0, done.stdout[-6000:]
        return done

    return call


@pytest.fixture
def found_by(runner, tmp_path):
    """`found_by(2, SCRIPT, job)`: what a script, given the job, writes to the file FOUND, both as JSON; with 1 it runs alone. It must succeed."""
    path, found = tmp_path / "script.py", tmp_path / "found.json"

    def call(num_processes, script, job, **changes):
        path.write_text(script)
        found.unlink(missing_ok=True)
        beside = [str(Path(runner.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        changes |= {"PYTHONPATH": os.pathsep.join(beside), "FOUND": str(found)}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
        done = subprocess.run(
            [sys.executable, *(launcher if num_processes > 1 else []), str(path), json.dumps(job)], check=False,
            capture_output=True, text=True, timeout=300, env=environment(**changes),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(found.read_text())

    return call


def ranks_of(launcher):
    """Process ids of a launcher's ranks."""
    with suppress(FileNotFoundError):  # the launcher, or one of them, has just ended
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        return [int(pid) for pid in children if "posttrain" in Path(f"/proc/{pid}/cmdline").read_text()]
    return []


@pytest.fixture
def killed():
    """`killed(2, folder, steps, "sft", yaml)`: SIGKILLs everything once so many steps are logged."""

    def call(num_processes, stage, steps, *arguments):
        launcher = subprocess.Popen(
            command(num_processes, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
        metrics = stage / "metrics.jsonl"
        while launcher.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= steps):
            time.sleep(0.01)
        ranks = ranks_of(launcher)
        for pid in (launcher.pid, *ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        launcher.wait(60)
        assert not (stage / "result.json").exists(), "it was faster than the kill"

    return call
