"""What surrounds a loop: polite stops, full disks, and one process per folder."""

import errno
import json
import os
import signal
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

from posttrain import files
from posttrain.checkpoint.store import CheckpointStore
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import CheckpointError
from posttrain.recipes.run.run_folder import RunFolder, mask_segments
from posttrain.recipes.run.stop import StopFlag, StoppedPolitely
from posttrain.recipes.run.train_state import Checkpoints
from posttrain.types import TokenSeq


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_in_training_leaves_the_last_good_checkpoint(code, train, runner, tmp_path, monkeypatch):
    replace, saved = os.replace, []

    def fail_at_the_third(source, target):
        if Path(target).name.startswith("step-"):
            saved.append(target)
            if len(saved) == 3:
                raise OSError(code, os.strerror(code))
        return replace(source, target)

    monkeypatch.setattr(files.os, "replace", fail_at_the_third)
    with pytest.raises(CheckpointError, match="The last good checkpoint is intact"):
        train("sft", name="run", save_steps=1)
    assert CheckpointStore(tmp_path / "run/checkpoints").newest_valid().step == 2
    assert not (tmp_path / "run/model").exists()
    train("sft", name="run", save_steps=1)
    straight = train("sft", name="straight", save_steps=1)
    assert runner.rows(tmp_path / "run") == runner.rows(straight)


def test_the_error_that_ends_a_stage_is_not_hidden_by_a_checkpoint_that_it_left_unwritten(tmp_path, caplog):
    def fails():
        raise CheckpointError("weights-00002-of-00002.safetensors was not written by its rank")

    run = RunFolder(tmp_path, "sft", is_main=True)
    with (
        pytest.raises(KeyError, match="the first"),
        closing(Checkpoints(CheckpointStore(tmp_path), SingleProcess(), run)) as checkpoints,
    ):
        checkpoints._writing = checkpoints._writer.submit(fails)
        raise KeyError("the first")
    assert "the checkpoint under way was not written: weights-00002-of-00002" in caplog.text


def test_a_broken_newest_checkpoint_is_skipped_and_the_end_is_the_same(train, runner, tmp_path):
    train("sft", name="run", save_steps=1, stop_after=3)
    weights = tmp_path / "run/checkpoints/step-00000003/weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    train("sft", name="run", save_steps=1)
    assert runner.rows(tmp_path / "run") == runner.rows(train("sft", name="straight", save_steps=1))


def test_every_logged_step_has_the_peak_of_memory(train, tmp_path):
    train("sft", name="run")
    peaks = [
        row["memory_peak_bytes"] for row in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    ]
    assert peaks == sorted(peaks)
    assert all(10**8 < peak < 10**11 for peak in peaks), "bytes: an interpreter with torch is some hundred MB"


def test_the_first_signal_is_a_wish_and_the_second_an_end():
    flag = StopFlag()
    before = signal.getsignal(signal.SIGTERM)
    with flag.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert flag.is_set
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_inside_what_is_done_again_whole_the_wish_is_an_end():
    flag = StopFlag()
    with flag.listening():
        with (
            pytest.raises(StoppedPolitely, match="stopped during the evals of base; start again"),
            flag.ending("the evals of base"),
        ):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            raise AssertionError("it went on")
        with pytest.raises(StoppedPolitely, match="the check of the rewards"), flag.ending("the check of the rewards"):
            raise AssertionError("it began")


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_stop_within_the_export_leaves_no_model_and_the_next_start_exports(adapter, train, runner, tmp_path):
    keys = {"max_steps": 2, "save_steps": 1, "adapter": adapter, "learning_rate": 1e-3}
    folder = train("sft", name="stopped", stop_after=2, **keys)
    assert not (folder / "result.json").exists()
    assert not (folder / "model").exists()
    train("sft", name="stopped", **keys)
    train("sft", name="whole", **keys)
    digests = [
        json.loads((tmp_path / name / "result.json").read_text())["model_digest"] for name in ("stopped", "whole")
    ]
    assert digests[0] == digests[1]


def test_another_thread_does_not_listen():
    seen = []

    def work():
        with StopFlag().listening():
            seen.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]


def _command(config, *arguments):
    """`posttrain sft CONFIG` in a forked child, so that nothing is imported twice; its process id."""
    child = os.fork()
    if child:
        return child
    from posttrain.cli import app

    sys.stdout = sys.stderr = config.with_suffix(".log").open("a", buffering=1)
    try:
        app.main(["sft", str(config), "--quiet", *arguments])
    except SystemExit as ended:
        os._exit(ended.code if isinstance(ended.code, int) else 1)
    finally:
        os._exit(99)


@pytest.fixture
def config(model_dir, data_dir, tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(
        f"base_model: {model_dir('llama')}\ndatasets: [{{path: {data_dir / 'sft.jsonl'}}}]\noutput_dir: {tmp_path / 'run'}\n"
        "sequence_len: 128\nper_device_train_batch_size: 4\nlearning_rate: 1e-3\nsave_steps: 1\nmax_steps: 12\n"
    )
    return path


def _wait_for_steps(folder, number, limit_s=60.0):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        found = [line for path in folder.rglob("metrics.jsonl") for line in path.read_text().splitlines()]
        if len(found) >= number:
            return
        time.sleep(0.005)
    raise AssertionError(f"{folder} has no {number} steps after {limit_s} s")


def _code(child):
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_sigterm_ends_with_75_and_the_next_start_goes_on(config, runner, tmp_path):
    child = _command(config)
    _wait_for_steps(tmp_path / "run", 2)
    os.kill(child, signal.SIGTERM)
    assert _code(child) == 75, config.with_suffix(".log").read_text()
    [metrics] = (tmp_path / "run").rglob("metrics.jsonl")
    done = len(runner.rows(metrics.parent))
    assert 2 <= done < 12
    assert _code(_command(config)) == 0, config.with_suffix(".log").read_text()
    assert [row["step"] for row in runner.rows(metrics.parent)] == list(range(1, 13))
    assert json.loads((metrics.parent / "result.json").read_text())["steps"] == 12


def test_a_second_process_in_the_folder_is_refused(config, tmp_path):
    child = _command(config, "--set", "max_steps=2000")
    try:
        _wait_for_steps(tmp_path / "run", 1)
        assert _code(_command(config)) not in (0, 75)
        assert f"in use by process {child}" in config.with_suffix(".log").read_text().replace("\n", " ")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_segments_of_the_mask_in_reading_order():
    sequence = TokenSeq((1, 2, 3, 4), (False, False, True, True))
    assert mask_segments(sequence, lambda ids: ",".join(map(str, ids))) == [("1,2", False), ("3,4", True)]
