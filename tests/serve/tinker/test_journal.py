"""What a full disk, or a hand, does to a journal."""

import subprocess
import sys

import pytest

from posttrain.errors import DamagedFileError, DataError
from posttrain.serve.tinker.journal import Journal

_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from posttrain.serve.tinker.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
journal = Journal(path)
journal.accept(1, "optim_step", "sha256:1")
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, resource.RLIM_INFINITY))
try:
    journal.accept(2, "optim_step", "sha256:2")
except OSError:
    print("refused", sorted(journal.entries))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.accept(2, "save_weights", "sha256:3", "one")
"""


def test_a_line_that_a_full_disk_cuts_short_is_refused_and_leaves_nothing(tmp_path):
    """A file-size limit stands for the full disk: the kernel takes five bytes of the line, then refuses."""
    path = tmp_path / "journal.jsonl"
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "[1]"]
    assert [str(entry) for entry in Journal(path).entries.values()] == ["1 optim_step", "2 save_weights"]


@pytest.mark.parametrize(
    ("line", "error"), [('{"seq": 7, "result": {}, "failure": ""}', DamagedFileError), ("no JSON", DataError)]
)
def test_a_line_that_is_none_of_ours_is_said_with_its_file(tmp_path, line, error):
    path = tmp_path / "journal.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(error, match=r"journal\.jsonl"):
        Journal(path)
