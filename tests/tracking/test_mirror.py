"""Copies of a run in each tracker, for real: a step once, whatever is killed; a dead server costs nothing."""

import contextlib
import glob
import io
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from mlflow import MlflowClient

from posttrain.errors import ConfigError, MissingExtraError
from posttrain.tracking import mirror as mirror_module
from posttrain.tracking.jsonl import JsonlSink
from posttrain.tracking.mirror import MirrorState, keep_copy
from posttrain.tracking.mirror_sink import MirrorSink
from posttrain.tracking.trackers import TRACKERS, TrackedRun, require_tracker, tracked_run
from posttrain.tracking.trackers.mlflow_run import name_there

NAMES = tuple(TRACKERS)
ENDED = threading.Event()
ENDED.set()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for variable in ("WANDB_DIR", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    made = TrackedRun(tmp_path / "01-sft", "words", "run1/01-sft", "01-sft", {"seed": "42"}, uri, log_completions=True)
    made.save()
    return made


def record(run, steps, kinds=()):
    """Write rows, and a remark of each kind with the last one, as a run does."""
    sink = JsonlSink(run.folder)
    for step in steps:
        sink.log(step, {"loss": 1.0 / step, "rewards/correct/mean": 0.5, "grad_norm": float("nan")})
    for kind in kinds:
        sink.event(kind, steps[-1], {"message": "KL is high"})
    sink.close()


def losses(run, name):
    """[(step, loss)] as a reader of the tracker finds them."""
    return sorted(_READ[name](run))


def _mlflow(run):
    client = MlflowClient(run.uri, run.uri)
    (there,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    return [(metric.step, metric.value) for metric in client.get_metric_history(there.info.run_id, "loss")]


def _wandb(run):
    return [(items["step"], items["loss"]) for items in _history(run)]


def _history(run):
    """The rows that `wandb sync` would send."""
    rows = [record.history for record in _wandb_records(run) if record.WhichOneof("record_type") == "history"]
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]


def _wandb_records(run):
    from wandb.proto.wandb_internal_pb2 import Record

    from posttrain.tracking.trackers.wandb_run import _log_records

    files = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    return [Record.FromString(data) for file in files for data in _log_records(file.read_bytes())]


def _trackio(run):
    (path,) = glob.glob(os.environ["TRACKIO_DIR"] + "/*.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT step, metrics FROM metrics").fetchall()
    return [(step, json.loads(metrics)["loss"]) for step, metrics in rows]


def _tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, round(event.value, 6)) for event in reader.Scalars("loss")]


_READ = {"mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio, "tensorboard": _tensorboard}


SECRET = "hf_Zq81mmPwT3"


def sampled(run, steps, secret="nothing"):
    """A sample of each step and then its row, as a run writes them."""
    sink = JsonlSink(run.folder)
    for step in steps:
        turns = [{"role": "user", "content": f"key {secret}"}]
        text = f"answer {step}: {secret}, postgres://me:pw@host/db"
        sink.event("sample", step, {"prompt": "a|b?", "completion": text, "reward": step / 4, "messages": turns})
        sink.log(step, {"loss": 1.0 / step})
    sink.close()


def samples(run, name):
    """[(step, completion, reward)] as a reader of the tracker finds them."""
    return [(row["step"], row["completion"], row["reward"]) for row in _SAMPLES[name](run)]


def _mlflow_samples(run):
    client = MlflowClient(run.uri, run.uri)
    (there,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    found = []
    for listed in json.loads(there.data.tags["mlflow.loggedArtifacts"]):
        assert listed["type"] == "table"
        table = json.loads(Path(client.download_artifacts(there.info.run_id, listed["path"])).read_text())
        found += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return found


def _wandb_samples(run):
    found = []
    for items in sorted(_history(run), key=lambda items: items["step"]):
        (file,) = run.folder.glob(f"wandb/offline-run-*/files/{items['samples/path']}")
        table = json.loads(file.read_text())
        found += [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    return found


def _trackio_samples(run):
    (path,) = glob.glob(os.environ["TRACKIO_DIR"] + "/*.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT metrics FROM metrics ORDER BY step").fetchall()
    return [row for (metrics,) in rows for row in json.loads(metrics)["samples"]["_value"]]


def _tensorboard_samples(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"tensors": 0})
    reader.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in reader.Tensors("samples")]
    found = [dict(line.strip().split(": ", 1) for line in text.splitlines()) for text in texts]
    return [one | {"step": int(one["step"]), "reward": float(one["reward"])} for one in found]


_SAMPLES = {
    "mlflow": _mlflow_samples, "wandb": _wandb_samples, "trackio": _trackio_samples, "tensorboard": _tensorboard_samples
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_each_sample_is_there_once_without_secrets(run, name, monkeypatch):
    """Copied in two goes; between them the run went back to its checkpoint of step 2. Nothing that was written holds a secret."""
    pytest.importorskip(TRACKERS[name].module)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    sampled(run, [1, 2, 3], SECRET)
    in_process(run, name)
    JsonlSink(run.folder).truncate_to(2)
    sampled(run, [3, 4, 5], SECRET)
    assert in_process(run, name) == MirrorState(recorded=5, waiting=0)
    assert samples(run, name) == [(step, f"answer {step}: …, …", step / 4) for step in range(1, 6)]
    assert losses(run, name) == expected(range(1, 6))
    recorded = {run.folder / "samples.jsonl"}
    sent = [path for path in run.folder.parent.rglob("*") if path.is_file() and path not in recorded]
    assert len(sent) > 2 and not [path for path in sent if SECRET.encode() in path.read_bytes()]


def test_what_shows_completions_stays_here_unless_it_is_asked_for(run):
    pytest.importorskip("tensorboard")
    (run.folder.parent / "report.html").write_text("<p>answer 1</p>")
    for asked in (False, True):
        quiet = replace(
            run, folder=run.folder.with_name(f"asked-{asked}"), report="../report.html", log_completions=asked
        )
        quiet.save()
        sampled(quiet, [1, 2], "nothing")
        keep_copy(tracked_run(quiet.folder), "tensorboard", ENDED)
        copies = [path for path in quiet.folder.rglob("*") if path.is_file() and path.name != "samples.jsonl"]
        assert any(b"answer 1" in path.read_bytes() for path in copies) == asked


def _mlflow_reports(run):
    client = MlflowClient(run.uri, run.uri)
    (there,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    pages = [found.path for found in client.list_artifacts(there.info.run_id) if not found.is_dir]
    return [Path(client.download_artifacts(there.info.run_id, page)).read_text("utf-8") for page in pages]


def _wandb_reports(run):
    """By name and digest, which are one version there."""
    kept = [record.artifact for record in _wandb_records(run) if record.WhichOneof("record_type") == "artifact"]
    files = {
        (one.name, one.digest): Path(file.local_path).read_text("utf-8")
        for one in kept if one.type == "report" for file in one.manifest.contents
    }  # fmt: skip
    return list(files.values())


def _trackio_reports(run):
    (path,) = glob.glob(os.environ["TRACKIO_DIR"] + "/*.db")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        manifests = connection.execute("SELECT manifest FROM artifact_versions").fetchall()
    digests = [entry["digest"].rpartition(":")[2] for (manifest,) in manifests for entry in json.loads(manifest)]
    kept = {sha256(file.read_bytes()).hexdigest(): file for file in Path(path).parent.rglob("*") if file.is_file()}
    return [kept[digest].read_text("utf-8") for digest in digests]


_REPORTS = {"mlflow": _mlflow_reports, "wandb": _wandb_reports, "trackio": _trackio_reports}


@pytest.mark.parametrize("name", _REPORTS)
def test_the_report_is_there_once_without_secrets(run, name, monkeypatch, tmp_path):
    pytest.importorskip(TRACKERS[name].module)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    (tmp_path / "report.html").write_text(f"<p>größer, {SECRET}</p>", "utf-8")
    reported = replace(run, report="../report.html")
    reported.save()
    assert tracked_run(run.folder) == reported
    record(run, [1])
    for _ in range(2):
        assert in_process(run, name) == MirrorState(1, 0)
    assert _REPORTS[name](run) == ["<p>größer, …</p>"]


def test_samples_that_were_sent_without_their_rows_are_sent_again_and_there_once(run, monkeypatch):
    """The server goes away between a step's table and its numbers; another mirror goes on."""
    from posttrain.tracking.trackers.mlflow_run import MlflowRun

    real = MlflowRun._send_samples
    sampled(run, [1, 2, 3])

    def cut(self, samples):
        real(self, samples)
        raise ConnectionError("away")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowRun, "_send_samples", cut)
        assert keep_copy(run, "mlflow", ENDED, patience_s=0.0) == MirrorState(-1, 3, "away")
    assert [step for step, _, _ in samples(run, "mlflow")] == [1, 2, 3]
    sampled(run, [4])
    assert keep_copy(run, "mlflow", ENDED) == MirrorState(4, 0)
    assert [step for step, _, _ in samples(run, "mlflow")] == [1, 2, 3, 4]


def test_a_store_of_files_that_fails_costs_no_number_and_gets_its_samples_later(run, monkeypatch, caplog):
    monkeypatch.setattr(mirror_module, "_ROWS_PER_CALL", 2)
    sampled(run, [1, 2, 3, 99, 100, 101])
    calls, real = [], MlflowClient.log_dict

    def log_dict(self, *args):
        calls.append(args)
        if len(calls) == 1:
            raise OSError("no such bucket")
        real(self, *args)

    monkeypatch.setattr(MlflowClient, "log_dict", log_dict)
    assert keep_copy(run, "mlflow", ENDED) == MirrorState(101, 0)
    assert "store of files refuses samples/000000.json (no such bucket)" in caplog.text
    assert [step for step, _, _ in samples(run, "mlflow")] == [1, 2, 3, 99, 100, 101]
    assert losses(run, "mlflow") == expected([1, 2, 3, 99, 100, 101])


def test_rows_that_wait_while_their_run_goes_back_are_there_once(run, monkeypatch):
    """A mirror that outlives its run sees the record written anew by the next one."""
    from posttrain.tracking.mirror import _GrowingFile, _Unsent

    files = [_GrowingFile(run.folder / name) for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl")]
    unsent = _Unsent(run, "mlflow")
    sampled(run, [1, 2, 3])
    unsent.take(*files)
    JsonlSink(run.folder).truncate_to(1)
    sampled(run, [2, 3])
    unsent.take(*files)
    assert unsent.state.waiting == 3 and unsent.send()
    assert losses(run, "mlflow") == expected([1, 2, 3])
    assert [step for step, _, _ in samples(run, "mlflow")] == [1, 2, 3]


def expected(steps):
    return [(step, pytest.approx(1.0 / step, abs=1e-6)) for step in steps]


@pytest.mark.parametrize("name", NAMES)
def test_each_step_is_there_once_after_a_resume_that_records_steps_again(run, name):
    """The copy got steps 1 to 4; the run went back to its checkpoint of step 2 and on to step 6."""
    pytest.importorskip(TRACKERS[name].module)
    record(run, [1, 2, 3, 4], kinds=["finding"])
    in_process(run, name)
    JsonlSink(run.folder).truncate_to(2)
    record(run, [3, 4, 5, 6], kinds=["finding"])
    assert in_process(run, name) == MirrorState(recorded=6, waiting=0)
    assert losses(run, name) == expected([1, 2, 3, 4, 5, 6])


def in_process(run, name):
    """The mirror in a process of its own, whose standard input has ended."""
    code = (
        "import sys, threading; from pathlib import Path; from posttrain.tracking.mirror import main; "
        "main(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.folder), name], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return MirrorState.of(run, name)


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlflow", "wandb", "trackio"))]
)
def test_a_mirror_that_is_killed_while_it_sends_leaves_no_gap_and_no_step_twice(run, name):
    """SIGKILL at three moments, while rows are added; then a last one that ends."""
    pytest.importorskip(TRACKERS[name].module)
    written = 0
    if name == "mlflow":
        MlflowClient(run.uri, run.uri).search_experiments()  # its database is its own to make
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "posttrain.tracking.mirror", str(run.folder), name], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until = time.monotonic() + 3.0 + 0.4 * attempt
        while time.monotonic() < until:
            record(run, [written + 1, written + 2])
            written += 2
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
    assert in_process(run, name).recorded == written
    assert losses(run, name) == expected(range(1, written + 1))


def test_findings_and_parameters_arrive_in_mlflow(run):
    record(run, [1, 2], kinds=["finding", "sample"])
    assert keep_copy(run, "mlflow", ENDED) == MirrorState(2, 0)
    client = MlflowClient(run.uri, run.uri)
    (there,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    assert there.info.status == "FINISHED" and there.data.params == {"seed": "42"}
    assert there.data.tags["finding.2"] == "KL is high" and "sample.2" not in there.data.tags
    assert "grad_norm" not in there.data.metrics


def test_a_refused_name_costs_that_name_alone(run, caplog):
    """Two names become one there, with two values, which MLflow refuses together with all that stands in the same call."""
    run = TrackedRun(
        run.folder, "words", "k", "n", {**{f"p{i}": str(i) for i in range(150)}, "why?": "1", "why_": "2"}, run.uri
    )
    record(run, [1, 2, 3])
    assert keep_copy(run, "mlflow", ENDED) == MirrorState(3, 0)
    client = MlflowClient(run.uri, run.uri)
    (there,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    assert len(there.data.params) == 151 and there.data.params["why_"] == "1"
    assert losses(run, "mlflow") == expected([1, 2, 3])
    assert "refuses params 'why_'" in caplog.text


def test_names_are_cleaned_to_what_mlflow_takes():
    from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

    names = {
        "rewards/größe/mean": "rewards/gr__e/mean", "a b:c-d.e": "a b:c-d.e", "../up//x/./y/": "up/x/y", "why?": "why_",
        "/": "_", "x" * 300: "x" * 250,
    }  # fmt: skip
    for name, clean in names.items():
        assert name_there(name) == clean
        assert validate_param_and_metric_name(clean) and not path_not_unique(clean)


def test_a_password_in_the_uri_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        TrackedRun(tmp_path, "x", "y", "z", uri="http://user:s3cret@127.0.0.1:5000").save()
    assert "s3cret" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_a_dead_server_delays_no_step_and_gets_everything_when_it_is_back(run, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dead = TrackedRun(run.folder, "words", run.key, run.name, uri=f"http://127.0.0.1:{port}")
    told = []
    sink = MirrorSink(dead, "mlflow", lambda *failed: told.append(failed))
    started = time.monotonic()
    for step in range(2000):
        sink.log(step, {"loss": 1.0})
    assert time.monotonic() - started < 5.0
    record(run, [1, 2, 3])
    sink.close(timeout_s=0.2)
    assert time.monotonic() - started < 15.0
    assert "metrics.jsonl has all of it" in caplog.text and "posttrain mirror" in caplog.text
    assert [tracker for tracker, why in told] == ["mlflow"]
    sink._process.kill()
    sink._process.wait()
    run.save()
    assert keep_copy(tracked_run(run.folder), "mlflow", ENDED) == MirrorState(3, 0)
    assert losses(run, "mlflow") == expected([1, 2, 3])


def test_a_server_that_hangs_holds_the_process_no_longer_than_its_patience(run):
    """It takes the connection and never answers; the run has ended."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        hangs = TrackedRun(run.folder, "words", run.key, run.name, uri=f"http://127.0.0.1:{server.getsockname()[1]}")
        hangs.save()
        record(run, [1, 2])
        code = "import sys; from posttrain.tracking.mirror import main; main(sys.argv[1], 'mlflow', 1.0)"
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, str(run.folder)], stdin=subprocess.DEVNULL, capture_output=True, check=False,
            timeout=60, env=os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "300"},
        )  # fmt: skip
    assert done.returncode == 75 and time.monotonic() - started < 45
    assert MirrorState.of(run, "mlflow").error


def test_a_tracker_that_fails_half_way_is_asked_again_where_it_stands(run, monkeypatch):
    """The third call raises after it was taken: the rows of that call are there, and are not sent again."""
    monkeypatch.setattr(mirror_module, "_ROWS_PER_CALL", 2)
    monkeypatch.setattr(mirror_module, "_RETRY_AFTER_S", 0.0)
    from posttrain.tracking.trackers.mlflow_run import MlflowRun

    calls, real = [], MlflowRun.rows

    def rows(self, some, samples):
        real(self, some, samples)
        calls.append([row["step"] for row in some])
        if len(calls) == 3:
            raise ConnectionError("cut off before the answer")

    monkeypatch.setattr(MlflowRun, "rows", rows)
    record(run, list(range(1, 9)))
    assert keep_copy(run, "mlflow", ENDED) == MirrorState(8, 0)
    assert calls == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert losses(run, "mlflow") == expected(range(1, 9))


def test_what_was_found_arrives_where_the_tracker_fails_between_two_calls(run, monkeypatch):
    """The second call raises; the copy goes on behind the first, of which the findings are there too."""
    monkeypatch.setattr(mirror_module, "_ROWS_PER_CALL", 4)
    monkeypatch.setattr(mirror_module, "_RETRY_AFTER_S", 0.0)
    from posttrain.tracking.trackers.mlflow_run import MlflowRun

    calls, real = [], MlflowRun.rows

    def rows(self, some, samples):
        calls.append(some)
        if len(calls) == 2:
            raise ConnectionError("away")
        real(self, some, samples)

    monkeypatch.setattr(MlflowRun, "rows", rows)
    record(run, [1, 2], kinds=["finding"])
    record(run, [3, 4, 5, 6, 7, 8], kinds=["finding"])
    assert keep_copy(run, "mlflow", ENDED) == MirrorState(8, 0)
    assert len(calls) == 3
    assert {"finding.2", "finding.8"} <= tags(run).keys()


def tags(run):
    client = MlflowClient(run.uri, run.uri)
    (there,) = client.search_runs([client.get_experiment_by_name("words").experiment_id])
    return there.data.tags


def test_two_rules_that_find_something_at_one_step_are_both_there(run):
    record(run, [1])
    sink = JsonlSink(run.folder)
    for rule in ("kl_drift", "entropy_collapse"):
        sink.event("finding", 1, {"rule": rule, "message": f"{rule} is there"})
    sink.close()
    keep_copy(run, "mlflow", ENDED)
    found = tags(run)
    assert found["finding.kl_drift.1"] == "kl_drift is there"
    assert found["finding.entropy_collapse.1"] == "entropy_collapse is there"


def test_a_database_named_by_a_relative_path_is_the_runs_own_from_every_folder(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TrackedRun(run.folder, "words", run.key, run.name, uri="sqlite:///mlflow.db").save()
    record(run, [1, 2])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert keep_copy(tracked_run(run.folder), "mlflow", ENDED) == MirrorState(2, 0)
    assert not list(Path.cwd().iterdir())
    assert losses(run, "mlflow") == expected([1, 2])


def test_a_mirror_that_hangs_with_rows_that_it_has_not_read_is_told(run, caplog):
    """It stands still after step 2, of which its state says that all is there."""
    told = []
    sink = MirrorSink(run, "mlflow", lambda *failed: told.append(failed))
    record(run, [1, 2])
    sink.log(2, {"loss": 0.5})
    until = time.monotonic() + 60
    while MirrorState.of(run, "mlflow") != MirrorState(2, 0) and time.monotonic() < until:
        time.sleep(0.1)
    sink._process.send_signal(signal.SIGSTOP)
    record(run, [3])
    sink.log(3, {"loss": 0.3})
    sink.close(timeout_s=0.2)
    sink._process.kill()
    sink._process.wait()
    assert told == [("mlflow", "step 3 is not confirmed")]
    assert "mlflow has the steps up to 2 of this run" in caplog.text


def test_a_killed_mirror_is_started_again_by_its_run(run, monkeypatch, caplog):
    monkeypatch.setattr("posttrain.tracking.mirror_sink._LOOK_S", 0.0)
    sink = MirrorSink(run, "tensorboard") if importable("tensorboard") else MirrorSink(run, "mlflow")
    sink._process.kill()
    sink._process.wait()
    record(run, [1, 2])
    sink.log(2, {"loss": 0.5})
    sink.close(timeout_s=60)
    assert "started again" in caplog.text
    assert MirrorState.of(run, sink._name) == MirrorState(2, 0)


def importable(name):
    with contextlib.suppress(MissingExtraError):
        require_tracker(name)
        return True
    return False


def test_two_mirrors_of_one_run_take_turns(run):
    record(run, list(range(1, 30)))
    both = [threading.Thread(target=keep_copy, args=(run, "mlflow", ENDED)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert losses(run, "mlflow") == expected(range(1, 30))


def test_the_verb_sends_what_waits_and_says_so(run):
    from posttrain.cli.app import main

    record(run, [1, 2, 3])
    (run.mirrors / "mlflow.log").touch()
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(["mirror", str(run.folder.parent)])
    assert "01-sft → mlflow: whole, up to step 3" in out.getvalue()
    assert losses(run, "mlflow") == expected([1, 2, 3])


def test_nothing_of_the_environment_is_sent(run, monkeypatch):
    """Neither variables nor packages nor the machine's name are in what W&B keeps to send."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("MY_TOKEN", "s3cret-of-mine")
    monkeypatch.setenv("WANDB_API_KEY", "s3cret" * 7)
    record(run, [1])
    in_process(run, "wandb")
    sent = [path.read_bytes() for path in Path(run.folder / "wandb").rglob("*") if path.is_file()]
    assert sent and not any(b"s3cret" in data for data in sent)
    assert not list(run.folder.rglob("requirements.txt"))
    (log,) = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"requirements.txt" not in log.read_bytes()
    assert wandb_hosts(log) == {""}


def wandb_hosts(log):
    from wandb.proto.wandb_internal_pb2 import Record

    from posttrain.tracking.trackers.wandb_run import _log_records

    records = [Record.FromString(data) for data in _log_records(log.read_bytes())]
    return {record.run.host for record in records if record.WhichOneof("record_type") == "run"}


def test_a_pipeline_is_refused_before_it_starts_where_a_tracker_is_not_there(monkeypatch):
    from posttrain.config.pipeline import PipelineKeys
    from posttrain.pipeline.before_data import check_trackers

    def asked(**keys):
        stage = {"kind": "sft", "keys": {"base_model": "m", "datasets": [{"path": "a.jsonl"}], **keys}}
        return PipelineKeys.model_validate({"name": "p", "base_model": "m", "stages": [stage]})

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        check_trackers(asked(report_to=["mlflow"]))
    monkeypatch.setattr("posttrain.tracking.trackers.table.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"report_to: wandb .* pip install 'posttrain\[wandb\]'"):
        check_trackers(asked(report_to="wandb"))
    check_trackers(asked(report_to="none"))
