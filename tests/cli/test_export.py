import json

import pytest

from posttrain.cli.app import main
from posttrain.files import digest_tree
from posttrain.registry.manifest import Manifest
from posttrain.registry.registry import Registry


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


@pytest.fixture
def suite(tmp_path):
    rows = [{"id": str(n), "prompt": f"What is {n}?", "target": "e", "scorer": "contains"} for n in range(60)]
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_registered_version_is_exported_with_its_own_suites_and_tagged(model_dir, suite, tmp_path, capsys):
    book = Registry(tmp_path / "registry")
    made = Manifest("sft", {"model": "sha256:base"}, {"model": digest_tree(model_dir("qwen3"))})
    book.register("words", model_dir("qwen3"), made, evidence={"suite.sums": suite})
    book.close()
    argv = (
        "export",
        "words@1",
        "--to",
        "gguf",
        "--registry",
        tmp_path / "registry",
        "--margin",
        0.3,
        "--max-tokens",
        4,
    )
    assert run(*argv, "--out", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "ok    chat template" in shown and "PASS  scores" in shown
    book = Registry(tmp_path / "registry")
    tags = dict(book.show("words", 1).tags)
    book.close()
    assert tags == {"export.gguf.q8_0": digest_tree(tmp_path / "out")}
    record = json.loads((tmp_path / "out" / "form.json").read_text())
    assert record["version"] == "words@1" and record["manifest"] == made.digest and record["ready"]


def test_wrong_usage_is_one_line(model_dir, suite, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert run("export", model_dir("qwen3"), "--to", "gguf", *out) == 64
    assert "add --suite FILE, or --without-scores" in capsys.readouterr().err
    assert run("export", model_dir("qwen3"), "--to", "gguf", "--type", "bfloat16", *out) == 64
    assert "gguf holds numbers as q8_0, f16" in capsys.readouterr().err
    assert run("export", model_dir("qwen3"), "--to", "int8", "--suite", suite, "--without-scores", *out) == 64
    assert run("export", tmp_path / "none", "--to", "int8", "--without-scores", *out) == 64
    assert "no such folder" in capsys.readouterr().err
    assert run("export", model_dir("mistral"), "--to", "gguf", "--without-scores", *out) == 64
    assert "a sliding window of 6 tokens" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_model_is_exit_code_1(model_dir, tmp_path, capsys, monkeypatch):
    from posttrain.forms.export import export as module

    monkeypatch.setattr(module, "bound_of", lambda tensor, kind: tensor.abs() * 1e-9)
    assert run("export", model_dir("qwen3"), "--to", "gguf", "--without-scores", "--out", tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert "FAIL  tensors" in shown.out and "refused: it would be another model" in shown.err
    assert not (tmp_path / "out").exists() and (tmp_path / "out.refused.json").is_file()
