"""Inputs that changed since the last start: refused with a list, run again from there, or run elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import posttrain
from posttrain import numerics
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


SFT = {"sft": {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1}}
GRPO = {
    "datasets": [{"path": "prompts.jsonl"}], "max_steps": 1, "num_generations": 4, "num_prompts_per_step": 2,
    "max_completion_length": 6, "temperature": 2.0, "per_device_train_batch_size": 8,
}  # fmt: skip
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
    copied.run("logging_steps=2", "save_steps=1", "save_total_limit=5", "sft.advice_off=[lora_rate]")
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


def test_what_moved_lists_no_paths_of_a_project_that_was_moved(copied, tmp_path):
    moved = type(copied)(tmp_path / "elsewhere", json.loads(json.dumps(copied.values)))
    shutil.copytree(copied.folder, moved.folder)
    moved.values["stages"][1]["dpo"]["learning_rate"] = 2e-4
    with pytest.raises(ChangedInputsError) as refusal:
        moved.run()
    listed = [line for line in str(refusal.value).splitlines() if line.startswith("  - ")]
    assert listed == ["  - stages.2.dpo.learning_rate: 0.0001 → 0.0002"]


# --- what a finished stage made ------------------------------------------------------------------------------------

DAMAGE = {
    "flipped": ("stages/01-sft/model/model.safetensors", "has been changed"),
    "tokenizer": ("stages/02-dpo/model/tokenizer.json", "has been changed"),
    "result": ("stages/02-dpo/result.json", "is gone"),
    "model": ("stages/03-grpo/model", "is gone"),
    "added": ("stages/01-sft/model/notes.txt", "was added afterwards"),
}


def damage(path, how):
    if how in ("result", "model"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif how == "added":
        path.write_text("by hand")
    else:
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes(body)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_finished_stage_is_looked_at_before_it_is_used_again(copied, how):
    name, what = DAMAGE[how]
    digests = {entry.index: entry.output_digest for entry in copied.state.stages}
    damage(copied.out / name, how)
    with pytest.raises(ChangedInputsError, match=r"--on-change rerun, which runs this stage again") as refusal:
        copied.run()
    assert f"{copied.out / name}" in str(refusal.value)
    assert what in str(refusal.value)
    copied.run(on_change="rerun")
    stage = next(entry for entry in copied.state.stages if name.startswith(entry.folder))
    assert (stage.status, copied.state.stage(stage.index).attempt) == ("damaged", 2)
    assert {index: copied.state.stage(index).output_digest for index in digests} == digests, "made again, bit for bit"
    assert sum("not run again" in line for line in copied.said) == 2


def test_a_lost_pipeline_json_costs_no_finished_stage_and_mixes_no_inputs(copied):
    digests = [copied.state.stage(index).output_digest for index in (1, 2, 3)]
    (copied.out / "pipeline.json").unlink()
    copied.run("dpo.learning_rate=2e-4")
    assert [entry.folder for entry in copied.state.stages] == ["stages/01-sft", "stages/02-dpo-2", "stages/03-grpo-2"]
    assert [entry.output_digest == old for entry, old in zip(copied.state.stages, digests, strict=True)] == [
        True,
        False,
        False,
    ]


# --- versions ------------------------------------------------------------------------------------------------------


def test_a_comment_in_our_own_source_changes_no_pin(monkeypatch, tmp_path):
    """The source is copied, every file gets a comment, and the pins are taken by a process that imports the copy."""
    package = Path(posttrain.__file__).parent
    shutil.copytree(package, tmp_path / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "posttrain").rglob("*.py"):
        path.write_text(path.read_text() + "\n# a comment\n")
    code = (
        "import json; from posttrain.pipeline.pins import versions; from posttrain.rewards.resolve import reward_digest; "
        "from posttrain.grading.scorers import scorer_digest; "
        "print(json.dumps([versions('grpo'), reward_digest(['number']), scorer_digest('number')]))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        for path in (str(package.parent), str(tmp_path))
    ]
    assert said[0].stdout == said[1].stdout != "", said[1].stderr


def test_an_upgrade_lists_what_could_differ_and_a_person_may_keep_what_is_done(copied, monkeypatch):
    reasons = {**numerics.REVISIONS, "dpo": ("the numbers of 0.1", "the KL is summed in float64")}
    monkeypatch.setattr(numerics, "REVISIONS", reasons)
    monkeypatch.setattr(posttrain, "__version__", "9.9")
    stages = copied.state.stages
    with pytest.raises(ChangedInputsError) as refusal:
        copied.run()
    text = str(refusal.value)
    assert "numbers.dpo: 1 → 2 (other numbers in dpo: the KL is summed in float64)" in text
    assert "posttrain: 0.1.0 → 9.9" in text
    assert "--on-change keep lets finished stages stay as they were made" in text
    copied.run(on_change="keep")
    assert [entry.output_digest for entry in copied.state.stages] == [entry.output_digest for entry in stages]
    (word,) = copied.state.kept
    assert word.by and word.at and any(line.startswith("numbers.dpo") for line in word.changed)
    copied.run()
    assert sum("not run again" in line for line in copied.said) == 3, "the word is remembered"


def test_keep_is_no_word_on_data(changed):
    with pytest.raises(ChangedInputsError, match="--on-change keep is for versions alone"):
        changed("data").run(on_change="keep")


class InterruptedAt(list):
    """What a run says, until the user presses Ctrl-C at a line with `word`."""

    def __init__(self, word):
        super().__init__()
        self.word = word

    def append(self, line):
        if self.word in line:
            raise KeyboardInterrupt
        super().append(line)


def test_inputs_that_nothing_has_used_yet_may_change_freely(project):
    """The first start is interrupted between its stages; the corrected one goes on."""
    run = project([SFT, {"grpo": {**GRPO, "reward_check": "off", "reward_funcs": ["rewards.py:is_in"]}}], evals={})
    run.said = InterruptedAt("reward_check is off")
    with pytest.raises(KeyboardInterrupt):
        run.run()
    run.said = []
    run.values["stages"][1]["grpo"] |= {"reward_funcs": ["rewards.py:spread"], "max_steps": 1}
    assert run.run().status == "done"
    assert any("nothing has used yet" in line for line in run.said)
    assert sum("not run again" in line for line in run.said) == 1


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
