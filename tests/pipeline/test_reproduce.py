"""A registered version repeated: its verdict, its answers, its training; and what is said where that is not possible."""

import shutil
from dataclasses import replace

import pytest

from posttrain.cli.app import main
from posttrain.config.load_pipeline import load_pipeline
from posttrain.evals.run import PLAYED_WITH
from posttrain.models.provenance import model_digest
from posttrain.pipeline import reproduce
from posttrain.pipeline.reproduce import Comparison, Version, exit_code
from posttrain.pipeline.taken_over import damage


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


@pytest.fixture(scope="module")
def valued(make_project, tmp_path_factory):
    """sft → a reward model with an adapter → ppo, which both that pays and that its critic begins as → ppo with that critic."""
    quick = {"learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8}
    ppo = {
        "datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["model:stage:reward_model", "rewards.py:spread"], "max_steps": 1,
        "reward_check": "off", "num_prompts_per_step": 2, "max_completion_length": 6, "learning_rate": 1e-6,
    }  # fmt: skip
    rows = [
        {"sft": {"datasets": [{"path": "sft.jsonl"}], **quick}},
        {
            "reward_model": {
                "datasets": [{"path": "pairs.jsonl"}],
                **quick,
                "max_steps": 1,
                "adapter": "lora",
                "lora_r": 4,
            }
        },
        {"ppo": {**ppo, "value_model": "stage:reward_model"}},
        {"ppo": {**ppo, "value_model": "stage:3"}},
    ]
    gate = {"baseline": "stage:base", "primary": [{"suite": "yes", "min_delta": 0.35}]}
    made = make_project(
        tmp_path_factory.mktemp("valued"), rows, gate=gate, register={"name": "yes", "alias": "champion"}
    )
    assert made.run().status == "passed"
    return made


def test_what_earlier_stages_make_is_paid_by_and_begins_critics(valued):
    first, beside, second, last = valued.state.stages
    assert second.inputs["model"] == first.output_digest and last.inputs["model"] == second.output_digest
    assert second.inputs["value_model"] == beside.output_digest
    assert last.inputs["value_model"] == model_digest(valued.out / second.folder / "critic")
    assert valued.run().status == "passed"
    assert len(valued.state.stages) == 4


def test_a_version_that_stages_of_its_run_paid_and_valued_is_trained_again_to_the_bit(valued, capsys):
    assert command(valued, 2) == 0
    said = capsys.readouterr().out
    for line in ("same     weights of reward_model: sha256:", "same     weights of ppo: sha256:"):
        assert line in said
    assert "pin stages" not in said


def test_of_a_reward_beside_a_stage_s_model_another_text_is_noticed(valued, tmp_path):
    book = valued.registry()
    version = Version(book, book.resolve("yes@1"), tmp_path / "scratch", lambda line: None)
    path = valued.folder / "rewards.py"
    before = path.read_text()
    try:
        path.write_text(before.replace("% 17 / 17.0", "% 13 / 13.0"))
        checks = found(reproduce.repeat_training(version))
    finally:
        path.write_text(before)
        book.close()
    assert checks["pin stages.3.ppo.rewards"] == "missing"
    assert checks["pin stages.4.ppo.rewards"] in ("missing", "note")


def test_a_critic_that_a_later_stage_begins_from_is_looked_at_like_a_model(valued, tmp_path):
    entry = valued.state.stages[2]
    stage = tmp_path / "stage"
    shutil.copytree(valued.out / entry.folder, stage)
    assert damage(stage, entry) == []
    (stage / "critic/config.json").unlink()
    assert damage(stage, entry) == [f"{stage / 'critic/config.json'} is gone"]
