"""The stranger's path of docs/switching.md, as its lines stand there: from an Axolotl YAML to a served adapter."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.cli.app import _run

PAGE = (Path(__file__).parents[2] / "docs" / "switching.md").read_text(encoding="utf-8")
COMMANDS = [line for line in re.search(r"Eight commands.*?```\n(.*?)```", PAGE, re.DOTALL)[1].splitlines() if line]
FILES = {
    "axolotl.yaml": re.search(r"```axolotl\n(.*?)```", PAGE, re.DOTALL)[1],
    "gate.yaml": re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1],
}


def ask(number):
    return [{"role": "user", "content": f"Is {number} a number?"}]


@pytest.fixture
def project(tmp_path, model_dir, monkeypatch):
    """The stranger's folder: a base, rows of one lesson, and questions that are in none of them."""
    shutil.copytree(model_dir("qwen3"), tmp_path / "base")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    rows = [{"messages": [*ask(n), {"role": "assistant", "content": "Yes."}]} for n in range(96)]
    items = [{"id": f"q{n}", "messages": ask(n), "target": "Yes.", "scorer": "exact"} for n in range(100, 200)]
    for name, lines in (("rows.jsonl", rows), ("heldout.jsonl", items)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_fewer_than_ten_commands_and_each_is_ours():
    assert len(COMMANDS) == 8
    assert [line.split()[:2] for line in COMMANDS] == [["posttrain", verb] for verb in ("import", "data", "plan", "sft", "eval", "eval", "gate", "serve")]  # fmt: skip


def test_the_file_imports_and_plans_as_it_stands(project, capsys):
    for line in COMMANDS[:3]:
        assert _run(shlex.split(line)[1:]) in (0, 1), capsys.readouterr().err
    assert "trained" in capsys.readouterr().out
    text = (project / "axolotl.posttrain.yaml").read_text()
    assert "# flash_attention: left out because" in text and "lora_target: all-linear" in text


@pytest.mark.slow
@pytest.mark.skipif(find_spec("fastapi") is None or find_spec("llguidance") is None, reason="serving needs posttrain[serve]")  # fmt: skip
def test_the_adapter_is_trained_passes_its_gate_and_answers(project, capsys):
    for line in COMMANDS[:-1]:
        assert _run(shlex.split(line)[1:]) == 0, f"{line}: {capsys.readouterr()}"
    assert "PASS" in capsys.readouterr().out
    serve = subprocess.Popen(
        [sys.executable, "-m", "posttrain", *shlex.split(COMMANDS[-1])[1:], "--port", "0"],
        cwd=project, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        address = next(line.split()[-1] for line in serve.stderr if line.startswith("listening at "))
        body = {"model": "mine", "messages": ask(777), "max_tokens": 8, "temperature": 0}
        request = urllib.request.Request(f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["choices"][0]["message"]["content"] == "Yes."
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0
    finally:
        serve.kill()
        serve.stderr.close()
