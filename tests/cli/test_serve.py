"""The command as a shell sees it: models first, then the port, and a graceful end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import pytest

from posttrain.files import digest_tree

pytestmark = pytest.mark.skipif(
    find_spec("fastapi") is None or find_spec("llguidance") is None, reason="serving needs posttrain[serve]"
)


def command(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", "from posttrain.cli.app import main; main()", "serve", *map(str, arguments)],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip


def address_of(process):
    for line in process.stderr:
        if line.startswith("listening at "):
            return line.split()[-1]
    raise AssertionError(f"it ended with {process.wait()}")


def test_it_listens_answers_and_ends_with_0_on_sigterm(model_dir):
    process = command(model_dir("qwen3"), "--port", 0, "--name", "tiny")
    try:
        address = address_of(process)
        body = json.dumps({"model": "tiny", "prompt": "What", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{address}/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] >= 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stderr.close()


def test_a_stages_model_that_was_changed_opens_no_port(model_dir, tmp_path):
    from posttrain.errors import ModelError
    from posttrain.serve.backends import of_folder

    folder = tmp_path / "01-sft" / "model"
    shutil.copytree(model_dir("qwen3"), folder)
    (folder.parent / "result.json").write_text(json.dumps({"model_digest": digest_tree(folder)}))
    assert of_folder("x", folder).digest == digest_tree(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(ModelError, match=r"result.json says that the stage made sha256"):
        of_folder("x", folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing/here",), "no config.json there; expected a model's folder"),
        (("math", "--lora", "a"), "expected NAME=FOLDER"),
        (("math", "--host", "0.0.0.0"), "give a token: --token-file FILE, or the variable POSTTRAIN_SERVE_TOKEN"),
        (("math", "--registry", "none"), "got no registry here"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, said, capsys, monkeypatch, tmp_path):
    from posttrain.cli.app import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POSTTRAIN_SERVE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as end:
        main(["serve", *arguments, "--port", "0"])
    assert end.value.code == 64
    assert said in capsys.readouterr().err
