"""A registered version repeated: its verdict, its answers, its training; and what is said where that is not possible."""

import shutil
from dataclasses import replace

import pytest

from posttrain.cli.app import main
from posttrain.config.load_pipeline import load_pipeline
from posttrain.evals.run import PLAYED_WITH
from posttrain.pipeline import reproduce
from posttrain.pipeline.reproduce import Comparison, Version, exit_code


def command(run, level, *words):
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", "yes@1", "--level", str(level), "--registry", str(run.folder / "registry"), *words])
    return caught.value.code


@pytest.fixture
def version(promoted, tmp_path):
    book = promoted.registry()
    yield Version(book, book.resolve("yes@1"), tmp_path / "scratch", lambda line: None)
    book.close()


def found(checks):
    return {check.what: check.found for check in checks}


@pytest.mark.parametrize(
    ("level", "lines"),
    [
        (0, ["same     stored bytes: ", "same     verdict: PASS again, sha256:"]),
        (1, ["same     answers on yes: 40 of 40 answers and 40 of 40 scores are equal"]),
        (2, ["same     weights of sft: sha256:", "same     weights of dpo: sha256:"]),
    ],
)
def test_a_version_is_reproduced_on_every_level(promoted, capsys, level, lines):
    assert command(promoted, level) == 0
    said = capsys.readouterr().out
    for line in lines:
        assert line in said
    assert said.splitlines()[-1] == f"yes@1 level {level}: reproduced"


def test_the_verdict_does_not_need_the_run_folder(promoted, tmp_path):
    shutil.copytree(promoted.folder / "registry", tmp_path / "registry")
    with pytest.raises(SystemExit) as caught:
        main(["reproduce", "alias:champion", "--registry", str(tmp_path / "registry"), "--out", str(tmp_path / "out")])
    assert caught.value.code == 0
    assert (tmp_path / "out/evals/base/yes-gate/items.jsonl").exists()


def test_other_weights_give_other_answers_and_are_told(version, promoted):
    base = replace(version.entry, path=promoted.values["base_model"])
    checks = list(reproduce.repeat_answers(replace(version, entry=base)))
    (answers,) = [check for check in checks if check.what == "answers on yes"]
    assert answers.found == "differs"
    assert answers.detail.startswith("0 of 40 answers and 0 of 40 scores are equal; mean 1.0000 → 0.0000")
    assert exit_code(checks) == 1


def test_data_that_changed_or_went_is_named_and_nothing_is_trained(version, promoted, tmp_path):
    path, kept = promoted.folder / "pairs.jsonl", tmp_path / "pairs.jsonl"
    shutil.copy(path, kept)
    try:
        path.write_text(path.read_text().replace("No 7", "Nope"))
        checks = list(reproduce.repeat_training(version))
        assert found(checks) == {"pin stages.2.dpo.data.pairs.jsonl": "missing"}
        path.unlink()
        (gone,) = reproduce.repeat_training(version)
    finally:
        shutil.copy(kept, path)
    assert "pairs.jsonl" in gone.detail
    assert exit_code([gone]) == 2
    assert not (version.scratch / "run").exists()


@pytest.mark.parametrize(("notes", "weights"), [([], "differs"), ([Comparison("pin code", "note", "")], "note")])
def test_where_bytes_cannot_be_equal_the_scores_are_tested_for_equivalence(version, promoted, notes, weights):
    """Another seed stands for another machine."""
    keys = load_pipeline(version.config(), ["seed=7"], project=promoted.folder).keys
    checks = list(reproduce._retrained(version, keys, version.chain, notes, 0.4))
    assert found(checks) == {"weights of sft": weights, "weights of dpo": weights, "scores on yes": "same"}
    assert exit_code(checks) == (0 if notes else 1)


def test_what_was_not_registered_is_said(promoted, version, tmp_path):
    entry = version.book.register("bare", version.entry.path, version.chain)
    bare = replace(version, entry=entry)
    assert found(reproduce.repeat_verdict(bare)) == {"stored bytes": "same", "verdict": "missing"}
    assert found(reproduce.repeat_answers(bare)) == {"answers": "missing"}
    assert found(reproduce.repeat_training(bare)) == {"pins": "missing"}


def test_a_suite_that_was_played_with_tools_is_not_asked_again_and_that_is_said(version):
    (stored,) = (report for name, report in reproduce._judged_reports(version).items() if name == "yes")
    played = replace(stored, decoding={**stored.decoding, PLAYED_WITH: ["a digest", 8]})
    check = reproduce._answers(version, "yes", played, {}, "")
    assert (check.found, check.detail) == ("missing", "yes was played with env or tools, which are not registered")


def test_a_scratch_folder_must_be_empty(promoted, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert command(promoted, 0, "--out", str(tmp_path)) == 64
    assert "expected a new or an empty one" in capsys.readouterr().err


def test_a_project_that_was_moved_is_reproduced_and_its_run_found_healthy(promoted, tmp_path, capsys):
    """The whole project under another name; and the registry alone elsewhere, with `--project` for the rest."""
    aside, moved = promoted.folder.with_name("aside"), tmp_path / "moved"
    shutil.copytree(promoted.folder, moved)
    promoted.folder.rename(aside)
    try:
        assert not any(str(promoted.folder) in path.read_text() for path in (moved / "runs/yes").rglob("config.yaml"))
        registry = ["--registry", str(moved / "registry")]
        assert call("reproduce", "yes@1", "--level", "2", *registry) == 0
        assert "same     weights of dpo" in capsys.readouterr().out
        call("doctor", str(moved / "runs/yes"))
        said = capsys.readouterr().out
        assert "config.yaml: a valid pipeline for this version" in said
        shutil.move(moved / "registry", tmp_path / "elsewhere")
        registry = ["--registry", str(tmp_path / "elsewhere")]
        assert call("reproduce", "yes@1", "--level", "2", *registry) == 2
        assert "--project DIR names another place" in capsys.readouterr().out
        assert call("reproduce", "yes@1", "--level", "2", *registry, "--project", str(moved)) == 0
    finally:
        aside.rename(promoted.folder)


def call(*words):
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    return caught.value.code


def test_a_suite_with_a_scorer_of_its_own_is_repeated_without_the_project(project, tmp_path, monkeypatch):
    """The scorer lies in another folder than the suite and imports a neighbour: all three are registered with the version."""
    sft = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, "per_device_train_batch_size": 8}
    gate = {"guards": [{"suite": "yes", "margin": 0.4}]}
    made = project([{"sft": sft}], gate=gate, register={"name": "yes"})
    (made.folder / "graders").mkdir()
    (made.folder / "graders/words.py").write_text("def length(text):\n    return len(text) / 100\n")
    (made.folder / "graders/own.py").write_text(
        "from words import length\n\n\ndef score(completions, **columns):\n"
        "    return [length(c[-1]['content']) for c in completions]\n"
    )
    suite = made.folder / "yes.jsonl"
    suite.write_text(suite.read_text().replace('"scorer": "exact"', '"scorer": "graders/own.py:score"'))
    assert made.command() == 0
    book = made.registry()
    assert sorted(book.store.tree(book.evidence("yes", 1)["suite.yes"][1])) == [
        "graders/own.py",
        "graders/words.py",
        "yes.jsonl",
    ]
    book.close()
    shutil.move(made.folder / "registry", tmp_path / "registry")
    shutil.rmtree(made.folder)
    monkeypatch.chdir(tmp_path)
    for level in (0, 1):
        with pytest.raises(SystemExit) as caught:
            main(["reproduce", "yes@1", "--level", str(level), "--registry", str(tmp_path / "registry")])
        assert caught.value.code == 0
