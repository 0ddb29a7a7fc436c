"""A disk that fills, fails, goes away or forgets: a clear error, the last good checkpoint intact, and on from there."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

from posttrain.checkpoint.store import CheckpointStore
from posttrain.errors import CheckpointError
from posttrain.recipes.run import stage, train_state
from posttrain.recipes.run.stage import Stage

OPTIONS = {"save_steps": 1, "max_steps": 4, "save_total_limit": 4}


@pytest.fixture
def run(runner, model_dir, data_dir):
    """`run(folder)` is the SFT stage that the tests here disturb."""
    keys = runner.keys_of("sft", model_dir("llama"), data_dir, **OPTIONS)
    return lambda folder, stop_after=None: runner.run_stage("sft", folder, keys, stop_after)


@pytest.fixture(scope="module")
def straight(runner, model_dir, data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    runner.run_stage("sft", folder, runner.keys_of("sft", model_dir("llama"), data_dir, **OPTIONS))
    return folder


def same(runner, found, expected):
    assert runner.rows(found) == runner.rows(expected)
    digests = [json.loads((folder / "result.json").read_text())["model_digest"] for folder in (found, expected)]
    assert digests[0] == digests[1]


@contextmanager
def small_disk(folder: Path, size_bytes: int):
    """A file system of its own where that is allowed, and whether it was."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fail_writes(monkeypatch, after: int):
    """Where no disk can be mounted: every write of tensors after so many is refused as a full disk refuses it."""
    real, calls = train_state.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return real(tensors, path)

    monkeypatch.setattr(train_state, "save_file", full)


def test_a_disk_that_fills_up_stops_the_run_and_with_space_it_goes_on(run, runner, straight, tmp_path, monkeypatch):
    """A real file system with room for two checkpoints of three."""
    size = sum(p.stat().st_size for p in (straight / "checkpoints/step-00000001").iterdir())
    with small_disk(tmp_path / "disk", int(4.4 * size)) as mounted:
        folder = tmp_path / "disk/run"
        if not mounted:
            fail_writes(monkeypatch, after=4)
        assert os.path.ismount(tmp_path / "disk") == mounted
        ballast = tmp_path / "disk/ballast"
        if mounted:
            ballast.write_bytes(b"\0" * int(1.6 * size))
        with pytest.raises(
            CheckpointError, match=r"the disk is full; free some space.*The last good checkpoint is intact"
        ):
            run(folder)
        good = CheckpointStore(folder / "checkpoints").newest_valid()
        assert good is not None
        assert good.step == 2
        kept = folder
        if mounted:
            ballast.unlink()
            # The model is exported besides, so the rest needs a larger disk: what was saved is carried there whole.
            kept = tmp_path / "larger"
            shutil.copytree(folder, kept)
        monkeypatch.undo()
        run(kept)
        same(runner, kept, straight)


def test_a_disk_that_is_full_at_the_export_says_so(run, runner, straight, tmp_path, monkeypatch):
    """Room for all checkpoints and not for the model: safetensors reports that in its own way."""
    checkpoints = sum(p.stat().st_size for p in (straight / "checkpoints").rglob("*") if p.is_file())

    def full(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with small_disk(tmp_path / "disk", checkpoints + 300_000) as mounted:
        folder = tmp_path / "disk/run"
        if not mounted:
            monkeypatch.setattr(stage, "save_policy", full)
        assert os.path.ismount(tmp_path / "disk") == mounted
        with pytest.raises(CheckpointError, match="the disk is full; free some space"):
            run(folder)
        monkeypatch.undo()
        assert not (folder / "result.json").exists()
        assert CheckpointStore(folder / "checkpoints").newest_valid().step == 4
        shutil.copytree(folder, tmp_path / "larger")
    run(tmp_path / "larger")
    same(runner, tmp_path / "larger", straight)


def test_a_folder_that_goes_away_is_not_made_anew(run, runner, straight, tmp_path, monkeypatch):
    """Moved while the third step is in hand; moved back, it goes on."""
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    real = Stage.begin_step

    def begin(self, step):
        if step == 2:
            self.checkpoints.flush()
            folder.rename(elsewhere)
        real(self, step)

    monkeypatch.setattr(Stage, "begin_step", begin)
    with pytest.raises(CheckpointError, match=r"run is gone; bring it back \(was its disk unmounted"):
        run(folder)
    monkeypatch.undo()
    assert not folder.exists()
    assert CheckpointStore(elsewhere / "checkpoints").newest_valid().step == 2
    elsewhere.rename(folder)
    run(folder)
    same(runner, folder, straight)


def test_a_disk_that_is_unmounted_is_missed(tmp_path):
    """The empty folder below a mount is not taken for the run."""
    with small_disk(tmp_path / "disk", 1 << 20) as mounted:
        store = CheckpointStore(tmp_path / "disk/run/checkpoints")
        store.folder.parent.mkdir()
        store.save(1, lambda folder: (folder / "a").write_text("a") and None)
        if mounted:
            subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)
        else:
            shutil.rmtree(tmp_path / "disk/run")
        with pytest.raises(CheckpointError, match="is gone; bring it back"):
            store.save(2, lambda folder: (folder / "a").write_text("b") and None)
        with pytest.raises(CheckpointError, match="is gone; bring it back"):
            store.mark_best(2, 1.0)
        assert list((tmp_path / "disk").iterdir()) == []
        if mounted:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], check=True)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_a_kill_between_the_last_checkpoint_and_the_result_loses_no_validation(kind, train, data_dir, tmp_path):
    """`result.json` of a run that is resumed at its end holds the last validation all the same."""
    dev = {"sft": "dev-sft", "dpo": "dev-pairs", "grpo": "dev-prompts"}[kind]
    options = {"max_steps": 2, "eval_steps": 2, "eval_datasets": [{"path": str(data_dir / f"{dev}.jsonl")}]}
    whole, killed = train(kind, name="whole", **options), tmp_path / "killed"
    shutil.copytree(whole, killed)
    (killed / "result.json").unlink()
    train(kind, name="killed", **options)
    results = [json.loads((folder / "result.json").read_text())["metrics"] for folder in (whole, killed)]
    assert results[0] == results[1]
    assert set(results[0]) & {"eval_loss", "eval_reward"}
