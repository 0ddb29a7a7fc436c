"""Inputs that changed since the last start: refused with a list, run again from there, or run elsewhere."""

import json
import shutil

import pytest

from posttrain.errors import ChangedInputsError
from posttrain.files import file_digests, read_json
from posttrain.pipeline.pins import changes, pins_of
from posttrain.pipeline.state import RunState


@pytest.fixture
def copied(finished, tmp_path):
    """The finished run with its project, to be changed: every file where it was."""
    aside = tmp_path / "aside"
    shutil.copytree(finished.folder, aside)
    yield finished
    shutil.rmtree(finished.folder)
    shutil.move(aside, finished.folder)


@pytest.fixture
def changed(copied):
    """`changed(what)` changes one thing of the project and returns it; the YAML is put back afterwards."""
    before = json.dumps(copied.values)

    def change(what):
        folder, values = copied.folder, copied.values
        if what == "data":
            text = (folder / "pairs.jsonl").read_text()
            (folder / "pairs.jsonl").write_text(text.replace("No 7", "Nope"))
        elif what == "key":
            values["stages"][1]["dpo"]["learning_rate"] = 2e-4
        elif what == "reward":
            (folder / "rewards.py").write_text((folder / "rewards.py").read_text() + "\n# another thought\n")
        elif what == "suite":
            text = (folder / "yes.jsonl").read_text()
            (folder / "yes.jsonl").write_text(
                text.replace('"id": "q139", "messages": [', '"id": "q139", "kind": "sum", "messages": [')
            )
        elif what == "gate":
            values["gate"]["primary"][0]["min_delta"] = 0.4
        return copied

    yield change
    copied.values = json.loads(before)


WHAT = {
    "data": ("stages.2.dpo.data.pairs.jsonl", [2, 3]),
    "key": ("stages.2.dpo.keys", [2, 3]),
    "reward": ("stages.3.grpo.rewards", [3]),
    "suite": ("evals.yes", []),
    "gate": ("gate", []),
}
"""What changes → its pin, and the stages that depend on it."""
NAMED = {"key": ("stages.2.dpo.learning_rate", "→ 0.0002"), "gate": ("gate.primary.1.min_delta", "→ 0.4")}
"""Keys are listed by name and value, not by the digest of them all."""


@pytest.mark.parametrize("what", WHAT)
def test_a_change_is_refused_with_a_list_of_what_moved(changed, what):
    run = changed(what)
    state, files = read_json(run.out / "pipeline.json"), file_digests(run.out)
    with pytest.raises(ChangedInputsError) as refusal:
        run.run()
    pin, _ = WHAT[what]
    lines = str(refusal.value).splitlines()
    assert lines[0] == f"{run.out} was started with other inputs:"
    name, end = NAMED.get(what) or (pin, pins_of_now(run, pin))
    assert [line.split(":")[0] for line in lines[1:-1]] == [f"  - {name}"]
    assert lines[1].endswith(end)
    assert "--on-change rerun" in lines[-1]
    assert "--on-change new-run" in lines[-1]
    assert read_json(run.out / "pipeline.json") == state
    assert file_digests(run.out) == files


def pins_of_now(run, name):
    from posttrain.config.load_pipeline import load_pipeline

    return pins_of(load_pipeline(run.path).keys)[name].removeprefix("sha256:")[:12]


@pytest.mark.parametrize("what", WHAT)
def test_rerun_runs_again_only_what_depends_on_it(changed, what):
    run = changed(what)
    before = {entry.index: entry.attempt for entry in run.state.stages}
    verdicts = len(run.state.gates)
    assert run.run(on_change="rerun").status == "passed"
    pin, again = WHAT[what]
    newest = {index: run.state.stage(index) for index in before}
    assert {index: entry.attempt for index, entry in newest.items()} == {
        index: attempt + (index in again) for index, attempt in before.items()
    }
    assert any(NAMED.get(what, (pin,))[0] in line for line in run.said)
    # A comment in the reward changes no weight, so the verdict on that very model stands.
    assert len(run.state.gates) == verdicts + (what != "reward")
    state = read_json(run.out / "pipeline.json")
    run.run()
    assert read_json(run.out / "pipeline.json") == state


def test_new_run_leaves_the_old_folder_as_it_is(changed):
    run = changed("reward")
    before = file_digests(run.out)
    outcome = run.run(on_change="new-run")
    assert outcome.folder == run.out.with_name("yes-2")
    assert outcome.status == "passed"
    assert file_digests(run.out) == before
    again = run.run(on_change="new-run")
    assert again.folder == outcome.folder, "the run with these inputs is there: it is gone on with"
    assert sum("not run again" in line for line in run.said) == 3


def test_new_run_without_a_change_goes_on_with_the_run_that_is_there(copied):
    assert copied.run(on_change="new-run").folder == copied.out
    assert not copied.out.with_name("yes-2").exists()


def test_a_change_that_is_taken_back_finds_the_old_results(changed):
    """Models of an earlier attempt at a stage with the same inputs are still there, and so is their verdict."""
    run = changed("reward")
    first = {entry.index: entry for entry in run.state.stages}
    run.run(on_change="rerun")
    text = (run.folder / "rewards.py").read_text()
    (run.folder / "rewards.py").write_text(text.removesuffix("\n# another thought\n"))
    outcome = run.run(on_change="rerun")
    assert {index: run.state.stage(index) for index in first} == first
    assert outcome.model_dir == run.out / "stages/03-grpo/model"
    assert run.state.gates[-1].candidate == first[3].output_digest


def test_how_a_run_is_watched_is_no_change(copied):
    state = read_json(copied.out / "pipeline.json")
    copied.run("logging_steps=2", "save_steps=1", "save_total_limit=5")
    assert read_json(copied.out / "pipeline.json") == state


def test_the_changes_name_what_came_went_and_moved():
    lines = changes(
        {"a": "sha256:" + "1" * 64, "b": "x", "same": "s"}, {"a": "sha256:" + "2" * 64, "c": "y", "same": "s"}
    )
    assert lines == [f"a: {'1' * 12} → {'2' * 12}", "b: x → absent", "c: absent → y"]


def test_two_files_of_one_name_are_two_pins(project):
    """A change in either must be noticed."""
    from posttrain.config.load_pipeline import load_pipeline

    run = project([{"sft": {"datasets": [{"path": "sft.jsonl"}, {"path": "more/sft.jsonl"}], "max_steps": 1}}])
    (run.folder / "more").mkdir()
    shutil.copy(run.folder / "sft.jsonl", run.folder / "more" / "sft.jsonl")
    before = pins_of(load_pipeline(run.path).keys)
    for name in ("sft.jsonl", "more/sft.jsonl"):
        path = run.folder / name
        text = path.read_text()
        path.write_text(text.replace("Yes.", "No.", 1))
        now = pins_of(load_pipeline(run.path).keys)
        assert len(changes(before, now)) == 1, name
        path.write_text(text)


def test_a_project_that_was_moved_is_the_same_project(copied, tmp_path):
    """Paths in the pins are names: the contents have digests of their own."""
    moved = type(copied)(tmp_path / "elsewhere", copied.values)
    shutil.copytree(copied.folder, moved.folder)
    assert moved.run().status == "passed"
    assert sum("not run again" in line for line in moved.said) == 3
    text = (moved.folder / "pairs.jsonl").read_text()
    (moved.folder / "pairs.jsonl").write_text(text.replace("No 7", "Nope"))
    with pytest.raises(ChangedInputsError, match=r"data\.pairs\.jsonl"):
        moved.run()


def test_the_command_says_what_changed_and_exits_64(changed, capsys):
    run = changed("key")
    assert run.command() == 64
    error = capsys.readouterr().err
    assert "stages.2.dpo.learning_rate: 0.0001 → 0.0002" in error
    assert "--on-change rerun" in error


def test_a_run_state_survives_the_way_to_disk(finished, tmp_path):
    finished.state.save(tmp_path)
    assert RunState.load(tmp_path) == finished.state
    assert RunState.load(tmp_path / "nowhere") is None
