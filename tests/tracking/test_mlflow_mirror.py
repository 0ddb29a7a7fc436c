"""The MLflow mirror on a real SQLite store, and against a server that is not there."""

import os
import socket
import time

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
from mlflow import MlflowClient

from posttrain.tracking.mlflow_mirror import MlflowSink


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def _only_run(client, experiment):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_runs_metrics_params_and_registered_versions_arrive(uri, tmp_path):
    sink = MlflowSink(uri, "word-problems", "run-1", {"sft": {"learning_rate": 1e-3}, "seed": 42})
    for step in (1, 2, 3):
        sink.log(step, {"loss": 1.0 / step, "rewards/correct/mean": 0.5, "grad_norm": float("nan")})
    sink.event("finding", 2, {"rule": "kl_drift", "message": "KL is high"})
    sink.event(
        "registered", 3, {"name": "wp", "version": 7, "alias": "champion", "digest": "sha256:aa", "path": str(tmp_path)}
    )
    sink.close(timeout_s=60)
    assert sink.num_dropped == 0

    client = MlflowClient(uri, uri)
    run = _only_run(client, "word-problems")
    assert run.info.status == "FINISHED"
    assert run.data.params == {"sft.learning_rate": "0.001", "seed": "42"}
    assert run.data.tags["finding.2"] == "KL is high"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert "grad_norm" not in run.data.metrics
    version = client.get_model_version_by_alias("wp", "champion")
    assert version.tags == {"posttrain.digest": "sha256:aa", "posttrain.version": "7"}


def test_a_restarted_run_continues_the_same_run_and_registers_once(uri, tmp_path):
    entry = {"name": "twice", "version": 1, "alias": "champion", "digest": "sha256:bb", "path": str(tmp_path)}
    for step in (1, 2):
        sink = MlflowSink(uri, "restarted", "it's one run", {"seed": 1})
        sink.log(step, {"loss": 1.0})
        sink.event("registered", step, entry)
        sink.close(timeout_s=60)
        assert sink.num_dropped == 0
    client = MlflowClient(uri, uri)
    run = _only_run(client, "restarted")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert len(client.search_model_versions("name = 'twice'")) == 1


def test_a_dead_server_neither_blocks_nor_raises(caplog):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    sink = MlflowSink(f"http://127.0.0.1:{port}", "x", "y", queue_size=50)
    started = time.monotonic()
    for step in range(2000):
        sink.log(step, {"loss": 1.0})
    assert time.monotonic() - started < 1.0
    assert sink.num_dropped >= 1900
    sink.close(timeout_s=0.2)
    assert time.monotonic() - started < 2.0
    assert "metrics.jsonl has them all" in caplog.text
