"""Several ranks that sample from one engine, which the main one holds, take the steps of one process."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.distributed import one_engine_runner
from tests.distributed.one_engine_runner import copies

from posttrain.recipes.experience import engines

RUNNER = one_engine_runner.__name__
ROOT = Path(__file__).parents[2]
GENTLE = {"learning_rate": 1e-4, "rollout": {"engine": "vllm_server", "max_restarts": 2, "memory_gib": 0.1}}


def torchrun(script, *arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *script, *arguments], check=False, capture_output=True, text=True, timeout=400, cwd=ROOT
    )


@pytest.fixture
def job(model_dir, data_dir, tmp_path):
    def make(folder, **options):
        values = {"kind": "grpo", "model": str(model_dir("qwen3")), "data": str(data_dir)}
        return {**values, "folder": str(tmp_path / folder), "options": GENTLE | options}

    return make


def alone(runner, job):
    keys = runner.keys_of(job["kind"], job["model"], Path(job["data"]), **job["options"])
    runner.run_stage(job["kind"], Path(f"{job['folder']}-alone"), keys)
    return Path(f"{job['folder']}-alone")


def same(runner, one, two):
    mine, theirs = runner.rows(one), runner.rows(two)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6, rel=1e-4)
        assert a == pytest.approx(b, abs=1e-5, rel=1e-4), a["step"]
    found = runner.weights(two)
    for name, tensor in runner.weights(one).items():
        assert (found[name] - tensor).abs().max() < 2e-5, name


def test_ranks_share_an_engine_also_one_that_is_lost_and_comes_back(job, runner, data_dir, monkeypatch):
    """Lost while it samples, and in the middle of a push; a rank without a prompt, held-out prompts, checks of live rewards."""
    held_out = {"eval_datasets": [{"path": str(data_dir / "dev-prompts.jsonl")}], "eval_steps": 2}
    uneven = job("uneven", num_prompts_per_step=3, reward_check_steps=2, **held_out)
    single = job("single", num_prompts_per_step=1, adapter="lora", lora_r=4, max_steps=2)
    done = torchrun(["-m", RUNNER], json.dumps([uneven, single]))
    assert done.returncode == 0, done.stderr[:12000]
    assert "gone in generate; it is started again" in done.stderr
    assert "gone in update; it is started again" in done.stderr
    monkeypatch.setitem(engines.ENGINES, "vllm_server", copies())
    for one in (uneven, single):
        same(runner, alone(runner, one), Path(one["folder"]))


@pytest.mark.slow
def test_ranks_share_two_engines_which_each_get_all_weights(job, runner, monkeypatch):
    """The second one after the canary of the first has scored, without a step between them."""
    two = job("two", max_steps=2)
    done = torchrun(["-m", RUNNER], json.dumps([two]), "two")
    assert done.returncode == 0, done.stderr[:12000]
    monkeypatch.setitem(engines.ENGINES, "vllm_server", copies())
    same(runner, alone(runner, two), Path(two["folder"]))


@pytest.mark.slow
def test_an_error_of_the_engine_ends_every_rank(job):
    done = torchrun(["-m", RUNNER], json.dumps([job("refused")]), "refusing")
    assert done.returncode != 0
    assert done.stderr.count("EngineError: these weights are refused") >= 2, done.stderr[-6000:]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm")
@pytest.mark.xdist_group("vllm")
def test_two_ranks_with_a_server_of_vllm_take_the_steps_of_one_process(job, runner):
    one = job("vllm")
    done = torchrun([runner.__file__], json.dumps([one]))
    assert done.returncode == 0, done.stderr[:12000]
    same(runner, alone(runner, one), Path(one["folder"]))
