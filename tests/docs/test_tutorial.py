"""The tutorial as its lines stand there, in a copy of the quickstart."""

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

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
BLOCKS = [text for language, text in re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.M | re.S) if not language]
COMMANDS = re.findall(r"^posttrain .*$", "\n".join(BLOCKS), re.M)
FILES = dict(re.findall(r"`(\w+\.yaml)`:\n\n```yaml\n(.*?)^```", PAGE, re.M | re.S))
ASKED = re.search(r"^  -d '(.*)'$", PAGE, re.M)[1]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The quickstart as a clone has it, with the page's files."""
    for name in ("base", "data", "evals"):
        shutil.copytree(ROOT / "examples" / "quickstart" / name, tmp_path / name)
    shutil.copy(ROOT / "examples" / "quickstart" / "rewards.py", tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line):
    return _run(shlex.split(line)[1:])


def test_its_files_plan_and_its_keys_are_explained(project, capsys):
    assert set(FILES) == {"first.yaml", "second.yaml"} and len(COMMANDS) == 12
    light = [line for line in COMMANDS if line.split()[1] in ("data", "plan", "explain")]
    assert len(light) == 3 and [run(line) for line in light] == [0, 0, 0], capsys.readouterr().err
    assert "⟦" in capsys.readouterr().out


@pytest.mark.slow
def test_every_command_does_what_the_page_says(project, capsys):
    outputs = {}
    for line in COMMANDS[:-1]:
        expected = 1 if line.startswith("posttrain diff") else 0  # as `diff` says that two differ
        assert run(line) == expected, f"{line}: {capsys.readouterr()}"
        outputs[line] = capsys.readouterr()
    told = "\n".join(shown.out for shown in outputs.values())
    assert r"<think>34+12=46</think>\boxed{46}" in told and "PASS" in told and "tutorial@1" in told
    assert "files and" in told and "are intact" in told
    if find_spec("fastapi") is None or find_spec("llguidance") is None:
        return
    serve = subprocess.Popen(
        [sys.executable, "-m", "posttrain", *shlex.split(COMMANDS[-1].replace("8000", "0"))[1:]],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        address = next(line.split()[-1] for line in serve.stderr if line.startswith("listening at "))
        request = urllib.request.Request(f"{address}/chat/completions", ASKED.encode(), {"Content-Type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request, timeout=120) as answer:
            assert r"\boxed{46}" in json.load(answer)["choices"][0]["message"]["content"]
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(60) == 0
    finally:
        serve.kill()
        serve.stderr.close()
