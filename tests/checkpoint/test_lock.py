import os
import signal
import subprocess
import sys

import pytest

from posttrain.checkpoint.lock import run_lock
from posttrain.errors import CheckpointError, RunLockedError

HOLD = """
import sys, time
from pathlib import Path
from posttrain.checkpoint.lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_died(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(RunLockedError, match=f"in use by process {holder.pid}; wait for it, stop it"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with run_lock(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize(("place", "reason"), [("file", "File exists"), ("file/inside", "Not a directory")])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, place, reason):
    (tmp_path / "file").touch()
    with (
        pytest.raises(CheckpointError, match=f"cannot be the folder of a run: {reason}; set output_dir"),
        run_lock(tmp_path / place),
    ):
        pass


def test_spaces_and_other_alphabets_are_fine(tmp_path):
    with run_lock(tmp_path / "läuft gut" / "実行 1"):
        assert (tmp_path / "läuft gut" / "実行 1" / ".lock").is_file()
