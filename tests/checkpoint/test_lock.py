import os
import signal
import subprocess
import sys

import pytest

from posttrain.checkpoint.lock import run_lock
from posttrain.errors import RunLockedError

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
