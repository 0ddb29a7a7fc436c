"""Every record of a run, damaged in every way, under every verb that reads it: one line, exit code 64, nothing lost."""

import json
import shutil

import pytest

from posttrain.cli import doctor
from posttrain.cli.app import main
from posttrain.files import file_digests

WAYS = {
    "empty": lambda body: b"",
    "cut": lambda body: body[: len(body) // 2],
    "binary": lambda body: b"\xff\xfe\x00" + body,
    "null": lambda body: b"null",
    "a list": lambda body: b"[]",
    "no keys": lambda body: b"{}",
    "another value": lambda body: body.replace(b'": ', b'_": ', 1),
}
QUICK = [way if way in ("cut", "null", "another value") else pytest.param(way, marks=pytest.mark.slow) for way in WAYS]
RECORDS = {
    "pipeline.json": "start again",
    "gates/final/verdict.json": "judge again",
    "stages/02-grpo/certificate.json": "put the files back from a copy",
    "stages/01-sft/model/tokenizer.json": "put the files back from a copy",
    "stages/01-sft/result.json": "put the files back from a copy",
}
"""What a start reads of a finished run → how to go on."""


@pytest.fixture(scope="module")
def done(make_project, tmp_path_factory):
    """SFT → GRPO with a certificate → gate → register."""
    sft = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, "per_device_train_batch_size": 8}
    grpo = {
        "datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["number"], "max_steps": 1, "num_generations": 4,
        "num_prompts_per_step": 2, "max_completion_length": 6, "per_device_train_batch_size": 8,
    }  # fmt: skip
    gate = {"guards": [{"suite": "yes", "margin": 0.4}]}
    rows = [{"sft": sft}, {"grpo": grpo}]
    made = make_project(tmp_path_factory.mktemp("damage"), rows, gate=gate, register={"name": "yes"})
    assert made.command() == 0
    return made


@pytest.fixture
def damaged(done, capsys):
    """`damaged(name, way)`; the file is put back afterwards."""
    kept = {}

    def damage(name, way):
        path = done.out / name
        kept[path] = path.read_bytes()
        path.write_bytes(WAYS[way](kept[path]))
        capsys.readouterr()
        return path

    yield damage
    for path, body in kept.items():
        path.write_bytes(body)


def said(capsys, *words):
    """Exit code, and the lines of the error."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    lines = capsys.readouterr().err.splitlines()
    start = next((place for place, line in enumerate(lines) if line.startswith("error:")), len(lines))
    return caught.value.code, "\n".join(lines[start:])


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("way", QUICK)
def test_a_start_names_a_damaged_record_and_how_to_go_on(done, damaged, capsys, name, way):
    path = damaged(name, way)
    before = file_digests(done.out, ignore=(".lock", "pipeline.json", "environment.json"))
    code, error = said(capsys, "run", str(done.path), "--quiet")
    assert code == 64
    assert "Traceback" not in error
    assert str(path) in error
    assert RECORDS[name] in error
    assert file_digests(done.out, ignore=(".lock", "pipeline.json", "environment.json")) == before, "nothing is lost"


@pytest.mark.parametrize("way", WAYS)
def test_recompute_names_a_damaged_verdict(done, damaged, capsys, way):
    path = damaged("gates/final/verdict.json", way)
    code, error = said(capsys, "gate", "--recompute", str(path.parent))
    assert (code, len(error.splitlines())) == (64, 1)
    assert str(path) in error


@pytest.mark.parametrize("name", ["spec.json", "evidence.json"])
def test_recompute_names_damaged_evidence(done, damaged, capsys, name):
    path = damaged(f"gates/final/{name}", "cut")
    code, error = said(capsys, "gate", "--recompute", str(path.parent))
    assert (code, len(error.splitlines())) == (64, 1)
    assert str(path) in error


EXAMINED = [*RECORDS, "gates/final/spec.json", "gates/final/evidence.json", "evals/base/yes-gate/report.json",
            "environment.json", "config.yaml", "stages/01-sft/model/model.safetensors"]  # fmt: skip
"""What the doctor holds against what was written."""


@pytest.mark.parametrize("name", EXAMINED)
@pytest.mark.parametrize("way", ["empty", "cut", "binary", "null", "no keys"])
def test_doctor_names_a_damaged_file_in_one_line_and_exits_with_1(done, damaged, capsys, monkeypatch, name, way):
    monkeypatch.setattr(doctor, "CHECKS", ())
    before = file_digests(done.out)
    path = damaged(name, way)
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(done.out)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("broken  ")]
    assert caught.value.code == 1
    assert any(path.name in line or str(path.parent) in line for line in lines), lines
    assert {name for name, digest in file_digests(done.out).items() if before.get(name) != digest} == {name}


def test_doctor_finds_nothing_broken_in_a_whole_run(done, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", ())
    with pytest.raises(SystemExit) as caught:
        main(["doctor", str(done.out)])
    assert (caught.value.code, "what 2 finished stage(s) made is as it was made" in capsys.readouterr().out) == (
        0,
        True,
    )


@pytest.mark.parametrize("way", ["empty", "cut", "binary", "no keys"])
@pytest.mark.parametrize("verb", [("chat",), ("eval", "--suite")])
def test_a_model_with_a_damaged_tokenizer_is_named(done, damaged, capsys, way, verb):
    path = damaged("stages/01-sft/model/tokenizer.json", way)
    name, *options = verb
    words = [name, str(path.parent), *options, *([str(done.folder / "yes.jsonl")] if options else [])]
    code, error = said(capsys, *words)
    assert code == 64
    assert "tokenizer" in error


def test_a_damaged_verdict_that_is_moved_away_is_decided_again(done, damaged, tmp_path):
    path = damaged("gates/final/verdict.json", "cut")
    aside = tmp_path / "aside"
    shutil.move(path.parent, aside)
    assert done.command() == 0
    again = json.loads((path.parent / "verdict.json").read_text())
    assert again["verdict"] == "PASS"


@pytest.mark.parametrize("way", ["null", "cut"])
def test_a_damaged_eval_report_is_measured_again(done, damaged, way):
    path = damaged("evals/01-sft/yes-gate/report.json", way)
    assert done.command() == 0
    assert json.loads(path.read_text())["suite"] == "yes"


def test_a_damaged_state_that_is_moved_away_costs_nothing(done, damaged, capsys):
    path = damaged("pipeline.json", "cut")
    path.rename(path.with_name("aside.json"))
    models = file_digests(done.out / "stages")
    assert done.command() == 0
    again = {
        name: digest for name, digest in file_digests(done.out / "stages").items() if not name.endswith("lint.json")
    }
    assert {name: digest for name, digest in models.items() if not name.endswith("lint.json")} == again


def test_what_a_registry_that_is_gone_held_is_registered_anew(done, tmp_path, capsys):
    """As the message about a damaged one says; a start never claims a version that is not there."""
    registry = done.folder / "registry"
    shutil.move(registry, tmp_path / "aside")
    try:
        assert done.command() == 0
        book = done.registry()
        assert [(entry.version, entry.digest, entry.aliases) for entry in book.entries()] == [
            (1, done.state.stages[-1].output_digest, ("champion",))
        ]
        book.verify("yes", 1)
        book.close()
    finally:
        shutil.rmtree(registry, ignore_errors=True)
        shutil.move(tmp_path / "aside", registry)


SHOWN = ["pipeline.json", "gates/final/verdict.json", "stages/01-sft/result.json", "stages/02-grpo/certificate.json"]
"""What a report is made of."""


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("way", ["empty", "cut", "binary"])
def test_report_shows_the_rest_of_a_damaged_run_and_diff_compares_nothing(done, damaged, capsys, name, way):
    path = damaged(name, way)
    code, error = said(capsys, "report", str(done.out))
    assert (code, len(error.splitlines())) == (64, 1)
    assert path.name in error and "the page shows the rest" in error
    code, error = said(capsys, "diff", str(done.out), str(done.out))
    assert (code, len(error.splitlines())) == (64, 1)
    assert path.name in error and "cannot be compared" in error
