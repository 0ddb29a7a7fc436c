"""The run's record: torn lines, non-finite numbers, cutting back to a checkpoint, a full disk."""

import json
import subprocess
import sys

import numpy as np

from posttrain.tracking.jsonl import JsonlSink, read_jsonl
from posttrain.tracking.multi import MultiSink


def test_lines_can_be_read_while_the_file_is_written(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.log(1, {"loss": 0.5, "num_tokens": 12})
    sink.log(2, {"loss": np.float32(0.25)})
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0.5), (2, 0.25)]
    assert records[0]["num_tokens"] == 12 and records[0]["time"] > 0
    sink.close()


def test_non_finite_numbers_are_null_and_named(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.log(1, {"loss": float("nan"), "grad_norm": float("inf"), "reward": 1.0})
    sink.event("finding", 1, {"evidence": {"loss": float("nan")}, "rule": "nonfinite"})
    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=refuse)
    assert record["loss"] is None and record["grad_norm"] is None and record["reward"] == 1.0
    assert record["nonfinite"] == ["loss", "grad_norm"]
    assert read_jsonl(tmp_path / "events.jsonl")[0]["nonfinite"] == ["evidence.loss"]


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def test_samples_have_a_file_of_their_own(tmp_path):
    sink = JsonlSink(tmp_path)
    sink.event("sample", 3, {"prompt": "1+1", "completion": "2\u2028\ud800", "reward": 1.0})
    sink.event("checkpoint", 3, {"digest": "sha256:0"})
    (sample,) = read_jsonl(tmp_path / "samples.jsonl")
    assert (sample["completion"], sample["step"]) == ("2\u2028\ud800", 3)
    assert [event["kind"] for event in read_jsonl(tmp_path / "events.jsonl")] == ["checkpoint"]


def test_a_torn_last_line_is_repaired_when_the_run_starts_again(tmp_path):
    first = JsonlSink(tmp_path)
    first.log(1, {"loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 2, "lo')
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1]
    again = JsonlSink(tmp_path)
    again.log(2, {"loss": 0.5})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_torn_line_longer_than_one_read_is_repaired(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "x": "' + "y" * 200_000)
    JsonlSink(tmp_path).log(2, {})
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]


def test_truncate_to_forgets_what_came_after_the_checkpoint(tmp_path):
    sink = JsonlSink(tmp_path)
    for step in range(1, 6):
        sink.log(step, {"loss": 1 / step})
        sink.event("sample", step, {"prompt": "p", "completion": "c"})
    sink.event("start", 0, {})
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    sink.truncate_to(3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(before[:3])
    sink.log(4, {"loss": 9.0})
    assert [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")][-1] == (4, 9.0)
    assert [r["step"] for r in read_jsonl(tmp_path / "samples.jsonl")] == [1, 2, 3]
    assert [r["kind"] for r in read_jsonl(tmp_path / "events.jsonl")] == ["start"]


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from posttrain.tracking.jsonl import JsonlSink
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = JsonlSink(Path(sys.argv[1]))
sink.log(1, {"loss": 1.0})
size = (Path(sys.argv[1]) / "metrics.jsonl").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
sink.log(2, {"loss": 2.0})
sink.log(3, {"loss": 3.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sink.log(4, {"loss": 4.0})
print(sink.num_lost)
"""


def test_a_write_that_fails_loses_whole_lines_and_never_raises(tmp_path):
    """A file-size limit stands for the full disk: the kernel takes ten bytes of the line, then refuses."""
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2"
    assert done.stderr.count("could not be written") == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]


def test_a_multi_sink_hands_everything_to_each(tmp_path):
    sink = MultiSink([JsonlSink(tmp_path / "a"), JsonlSink(tmp_path / "b")])
    sink.log(1, {"loss": 1.0})
    sink.event("notice", 1, {"message": "m"})
    sink.close()
    for name in "ab":
        assert read_jsonl(tmp_path / name / "metrics.jsonl")[0]["loss"] == 1.0
        assert read_jsonl(tmp_path / name / "events.jsonl")[0]["message"] == "m"
