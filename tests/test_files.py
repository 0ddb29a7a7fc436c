"""The one reader of JSON lines, and every place that reads them."""

import fcntl
import json
import multiprocessing
import os
import signal
from contextlib import ExitStack

import pytest

from posttrain import files
from posttrain.cli.rewards import read_samples
from posttrain.config.datasets import DatasetKeys
from posttrain.data.opened import read_rows
from posttrain.errors import DataError, PosttrainError, RunLockedError
from posttrain.evals.suite import load_suite
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.files import nobody_reading, read_json_lines, reading, write_folder
from posttrain.rewards.cases import Case
from posttrain.tracking.jsonl import read_jsonl

BREAKS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh"
"""Everything that `str.splitlines` cuts at, other than a newline."""


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_line_separator_inside_a_string_is_no_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": BREAKS}, {"text": "next"})
    assert list(read_json_lines(path)) == [(1, {"text": BREAKS}), (2, {"text": "next"})]


def test_reports_suites_samples_data_and_metrics_survive_line_separators(tmp_path):
    item = ItemRecord("1", "digest", (1.0,), completions=(BREAKS,), finishes=("stop",), num_tokens=(3,))
    report = EvalReport("suite", "gate", "s", "m", "exact", (item,))
    report.save(tmp_path / "report")
    assert EvalReport.load(tmp_path / "report") == report
    row = {"id": "1", "prompt": BREAKS, "completion": BREAKS, "target": BREAKS, "index": 0, "step": 1}
    path = write(tmp_path / "rows.jsonl", row)
    assert load_suite("suite", path).items[0].target == BREAKS
    assert read_samples(path, [Case(BREAKS, {}, "gold", None)])[0].text == BREAKS
    assert read_rows(DatasetKeys(path=str(path)))[0][1] == row
    assert read_jsonl(path) == [row]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": ', r"rows\.jsonl:2: not JSON: .* at column \d+; expected one JSON object per line"),
        (b"[1]", r"rows\.jsonl:2: (got|a row is) a list; expected"),
        (b'{"a": "\xff"}', r"rows\.jsonl:2: not UTF-8: byte 0xff"),
        (b"[" * 200_000, r"rows\.jsonl:2: not JSON: nested too deeply"),
        (b'{"id": "1", "a": 1, "a": 2}', r'rows\.jsonl:2: the key "a" stands twice in one object; expected it once'),
        (b'{"id": "1", "a": {"b": 1, "b": 1}}', r'rows\.jsonl:2: the key "b" stands twice'),
    ],
)
@pytest.mark.parametrize(
    "read",
    [
        lambda path: list(read_json_lines(path)),
        lambda path: load_suite("suite", path),
        lambda path: read_samples(path, [Case("p", {}, "gold", None)]),
        lambda path: read_rows(DatasetKeys(path=str(path))),
        read_jsonl,
    ],
    ids=["lines", "suite", "samples", "data", "metrics"],
)
def test_damage_is_named_with_file_and_line(tmp_path, read, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "1", "prompt": "p", "target": "t", "completion": "c", "step": 1}\n' + line + b"\n")
    with pytest.raises(PosttrainError, match=message):
        read(path)


def test_a_growing_file_may_end_in_half_a_line_and_no_other_may(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"step": 1}\n\n{"step": 2', encoding="utf-8")
    assert list(read_json_lines(path, growing=True)) == [(1, {"step": 1})]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: not JSON"):
        list(read_json_lines(path))


@pytest.mark.parametrize("keep", [False, True])
def test_processes_that_write_one_folder_at_once_all_can(tmp_path, keep):
    """Four of them, forty times, each its own contents: what is there at the end is whole, and one of theirs."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)

    def work(writer):
        def fill(folder):
            for name in "ab":
                (folder / name).write_text(str(writer))

        for number in range(40):
            barrier.wait()
            write_folder(tmp_path / str(number), fill, keep=keep)
        os._exit(0)

    writers = [fork.Process(target=work, args=(writer,)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(40))), "nothing else is left"
    for folder in tmp_path.iterdir():
        assert (folder / "a").read_text() == (folder / "b").read_text()


def test_a_folder_that_somebody_reads_is_not_taken_away_and_who_reads_it_is_named(tmp_path):
    read = f"is read by process {os.getpid()}; stop that first"
    with reading(tmp_path), reading(tmp_path), pytest.raises(RunLockedError, match=read):
        nobody_reading(tmp_path).__enter__()
    with nobody_reading(tmp_path), pytest.raises(RunLockedError, match="is being taken away by process"):
        reading(tmp_path).__enter__()
    with reading(tmp_path):
        pass
    with reading(tmp_path / "of the hub"), nobody_reading(tmp_path / "of the hub"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_who_reads_a_folder_of_another_file_system_with_the_same_inode_is_not_named():
    with ExitStack() as opened:
        found = {}
        for path in ("/proc", "/sys", "/dev/shm"):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            opened.callback(os.close, descriptor)
            found[os.fstat(descriptor).st_dev] = descriptor
        held, other, *_ = found.values()
        if os.fstat(held).st_ino != os.fstat(other).st_ino:
            pytest.skip("the roots of /proc and /sys have inodes of their own here")
        fcntl.flock(held, fcntl.LOCK_SH)
        assert files._lock_holders(held) == f"process {os.getpid()}"
        assert files._lock_holders(other) == "another process"


def test_a_reader_that_is_killed_holds_nothing(tmp_path):
    told, tells = os.pipe()
    child = os.fork()
    if child == 0:
        with reading(tmp_path):
            os.write(tells, b"held")
            signal.pause()
    try:
        assert os.read(told, 4) == b"held"
        with pytest.raises(RunLockedError, match=f"is read by process {child};"), nobody_reading(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tells)
    with nobody_reading(tmp_path):
        pass
