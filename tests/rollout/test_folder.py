"""What a killed run has left is swept; what a living one has is not."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from posttrain.rollout import folder
from posttrain.rollout.folder import OwnFolder


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def old(path):
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_what_a_killed_process_left_is_swept_and_what_lives_is_not(temporary):
    program = (
        "import os; from posttrain.rollout.folder import OwnFolder; made = OwnFolder(); "
        "(made.path / 'weights').touch(); print(made.path, flush=True); os.kill(os.getpid(), 9)"
    )
    left = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    mine, other, young = OwnFolder(), temporary / "another", temporary / f"{folder._PREFIX}young"
    other.mkdir()
    young.mkdir()
    assert old(left) and old(mine.path) and old(other)
    OwnFolder()
    names = {path.name for path in temporary.iterdir()}
    assert Path(left).name not in names
    assert {mine.path.name, other.name, young.name} <= names


def test_only_this_user_can_enter_it():
    assert OwnFolder().path.stat().st_mode & 0o077 == 0


def test_a_link_is_not_followed(temporary, tmp_path):
    target = temporary / "precious"
    target.mkdir()
    (target / "file").touch()
    link = temporary / f"{folder._PREFIX}link"
    link.symlink_to(target)
    os.utime(link, (1, 1), follow_symlinks=False)
    OwnFolder()
    assert (target / "file").exists()


def test_removing_twice_is_harmless():
    made = OwnFolder()
    made.remove()
    made.remove()
    assert not made.path.exists()
