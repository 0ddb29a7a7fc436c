"""A home, a project or a registry that cannot be written to: it works without, or says in one line what to do."""

import os
import shutil
import subprocess
import sys

import pytest

from posttrain.cli.app import main
from posttrain.files import file_digests

SFT = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, "per_device_train_batch_size": 8}
NOT_WORSE = {"guards": [{"suite": "yes", "margin": 0.4}]}


@pytest.fixture(scope="module")
def frozen(promoted, tmp_path_factory):
    """A finished project on a read-only mount."""
    folder = tmp_path_factory.mktemp("frozen") / "mount"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        shutil.copytree(promoted.folder, folder, dirs_exist_ok=True)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def said(capsys, *words):
    """Exit code, standard output, and the lines of the error."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    shown = capsys.readouterr()
    return caught.value.code, shown.out, [line for line in shown.err.splitlines() if not line.startswith("gate:")]


NEED_NO_WRITING = (
    "data {0}/pipeline.yaml",
    "diff {0}/runs/yes {0}/runs/yes",
    "gate --recompute {0}/runs/yes/gates/final",
    "registry list --registry {0}/registry",
    "registry show alias:champion --registry {0}/registry",
    "registry verify yes@1 --registry {0}/registry",
    "reproduce yes@1 --registry {0}/registry",
)
WRITE = {
    "run {0}/pipeline.yaml --quiet": "registry.sqlite cannot be opened",
    "run {0}/pipeline.yaml --quiet --set register.registry={1}/book": "set output_dir to a folder that can be written",
    "report {0}/runs/yes": "Read-only file system; let this user read and write it, or name another place",
    "registry remove yes@1 --reason old --registry {0}/registry": "make its folder writable",
    "registry gc --registry {0}/registry": "make its folder writable",
    "run {1}/pipeline.yaml --quiet --set register.registry={0}/new": "Read-only file system; let this user",
}
"""Verb → what its one line says."""


@pytest.mark.parametrize("verb", NEED_NO_WRITING)
def test_what_only_reads_works_on_a_read_only_mount(frozen, capsys, verb):
    code, out, errors = said(capsys, *verb.format(frozen).split())
    assert (code, errors) == (0, [])
    assert out


@pytest.mark.parametrize("verb", WRITE)
def test_what_must_write_says_in_one_line_where_it_cannot(frozen, promoted, tmp_path, capsys, verb):
    other = promoted.copy_to(tmp_path / "other")
    assert other.path.exists()
    code, _, errors = said(capsys, *verb.format(frozen, other.folder).split())
    assert (code, len(errors)) == (64, 1), errors
    assert WRITE[verb] in errors[0]
    assert str(frozen) in errors[0]
    assert not other.out.exists(), "nothing was begun"


def test_a_read_only_project_is_run_with_its_results_elsewhere(frozen, tmp_path, capsys):
    """The evals, the stages and the registry go where they are told."""
    before = file_digests(frozen)
    sets = [f"--set=output_dir={tmp_path / 'out'}", f"--set=register.registry={tmp_path / 'book'}"]
    code, out, _ = said(capsys, "run", str(frozen / "pipeline.yaml"), "--quiet", *sets)
    assert code == 0
    assert f"report  {tmp_path / 'out/report.html'}" in out
    assert file_digests(frozen) == before


def test_a_home_that_cannot_be_written_is_no_news(project):
    """No cache of ours, of the hub or of matplotlib: the run says nothing of it, and ends as it should."""
    made = project([{"sft": SFT}], gate=NOT_WORSE, register={"name": "yes"})
    kept = {
        name: value for name, value in os.environ.items() if name not in ("POSTTRAIN_CACHE", "MPLCONFIGDIR", "HF_HOME")
    }
    environment = kept | {"HOME": "/dev/null/none", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "posttrain.cli.app", "run", str(made.path), "--quiet"]
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in ("atplotlib", "Traceback", "arning", "/dev/null"):
        assert word not in done.stderr + done.stdout
    assert (made.out / "report.html").exists()
