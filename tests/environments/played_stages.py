"""A short grpo stage with each kind of environment: our own file, a Python of verifiers, a server of OpenEnv, tools of an MCP server.

`with played(kind, …) as stage` gives what `stage_runner.keys_of` takes; a kind whose packages are not here skips its test.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
TOOL_USE = HERE.parents[1] / "examples" / "tool-use"
VERIFIERS_PYTHON = HERE.parents[1] / ".venv-verifiers" / "bin" / "python"
GUESS = f"verifiers:{VERIFIERS_PYTHON} {HERE / 'verifiers_envs' / 'guess_env.py'}"
CALCULATOR = f"mcp:{sys.executable} {HERE / 'mcp_server.py'} calc"
ASKED = [{"role": "user", "content": "Guess a number from 0 to 9."}]
REWARD = """
def by_text(prompts, completions, env_reward, **columns):
    said = [[m["content"] for m in c if m["role"] == "assistant"] for c in completions]
    return [(paid or 0.0) + sum(map(len, texts)) % 7 / 7 + len(texts) for texts, paid in zip(said, env_reward)]
"""


@dataclass(frozen=True)
class PlayedStage:
    """Model, folder of data, and keys; `row_key` is the metric that says that something was played."""

    model: Path
    data: Path
    options: dict[str, Any] = field(default_factory=dict)
    row_key: str = "env/turns"


@contextmanager
def played(kind: str, folder: Path, model: Path, calling_model: Path | None = None) -> Iterator[PlayedStage]:
    """`calling_model` is one that calls the calculator; only `mcp` needs it."""
    folder.mkdir()
    (folder / "rewards.py").write_text(REWARD)
    common = {"reward_funcs": ["by_text"], "max_completion_length": 60, "sequence_len": 200, "env_timeout_s": 120.0}
    with KINDS[kind](folder) as (rows, options):
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if kind == "mcp":
            assert calling_model is not None
            yield PlayedStage(calling_model, folder, common | options, "tools/call_frequency")
        else:
            yield PlayedStage(model, folder, common | options)


@contextmanager
def _own(folder):
    rows = [{"prompt": [{"role": "user", "content": f"Talk. {n}"}], "answer": str(n)} for n in range(12)]
    yield rows, {"env": f"{HERE / 'own_env.py'}:AsyncEcho"}


@contextmanager
def _verifiers(folder):
    if not VERIFIERS_PYTHON.is_file():
        pytest.skip("needs make setup-verifiers")
    yield [{"prompt": ASKED, "task": task} for task in range(12)], {"env": GUESS, "max_turns": 2}


@contextmanager
def _openenv(folder):
    if not all(map(find_spec, ("websockets", "fastapi", "uvicorn"))):
        pytest.skip("needs posttrain[openenv], and posttrain[serve] for the server")
    command = [sys.executable, str(HERE / "openenv_protocol.py"), "echo", "64"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        rows = [{"prompt": [{"role": "user", "content": f"Talk. {n}"}], "seed": n} for n in range(12)]
        yield rows, {"env": f"openenv:http://127.0.0.1:{int(process.stdout.readline())}"}
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _mcp(folder):
    if find_spec("mcp") is None:
        pytest.skip("needs posttrain[mcp]")
    rows = [json.loads(line) for line in (TOOL_USE / "data" / "prompts.jsonl").read_text().splitlines()[:12]]
    yield rows, {"tools": [CALCULATOR], "max_turns": 3}


KINDS = {"own": _own, "verifiers": _verifiers, "openenv": _openenv, "mcp": _mcp}


def make_calling_model(runner: Any, folder: Path) -> Path:
    """The base of examples/tool-use, after so much SFT that it mostly calls the calculator."""
    keys = runner.keys_of(
        "sft", TOOL_USE / "base", TOOL_USE / "data", max_steps=50, learning_rate=2e-3, per_device_train_batch_size=32
    )
    runner.run_stage("sft", folder, keys)
    return folder / "model"
