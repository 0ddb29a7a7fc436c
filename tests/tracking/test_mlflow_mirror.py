"""The MLflow mirror on a real SQLite store, and against a server that is not there."""

import os
import socket
import time

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import pytest
from mlflow import MlflowClient

from posttrain.errors import ConfigError
from posttrain.tracking.mlflow_mirror import MlflowSink, name_there


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def _only_run(client, experiment):
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return run


def test_runs_metrics_and_params_arrive(uri):
    sink = MlflowSink(uri, "word-problems", "run-1", {"sft": {"learning_rate": 1e-3}, "seed": 42})
    for step in (1, 2, 3):
        sink.log(step, {"loss": 1.0 / step, "rewards/correct/mean": 0.5, "grad_norm": float("nan")})
    sink.event("finding", 2, {"rule": "kl_drift", "message": "KL is high"})
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


def test_a_restarted_run_continues_the_same_run(uri):
    for step in (1, 2):
        sink = MlflowSink(uri, "restarted", "it's one run", {"seed": 1})
        sink.log(step, {"loss": 1.0})
        sink.close(timeout_s=60)
        assert sink.num_dropped == 0
    client = MlflowClient(uri, uri)
    run = _only_run(client, "restarted")
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]


def test_names_are_cleaned_to_what_mlflow_takes():
    from mlflow.utils.validation import path_not_unique, validate_param_and_metric_name

    names = {
        "rewards/größe/mean": "rewards/gr__e/mean", "a b:c-d.e": "a b:c-d.e", "../up//x/./y/": "up/x/y", "why?": "why_",
        "/": "_", "x" * 300: "x" * 250,
    }  # fmt: skip
    for name, clean in names.items():
        assert name_there(name) == clean
        assert validate_param_and_metric_name(clean) and not path_not_unique(clean)


def test_a_refused_name_costs_that_name_alone(uri, caplog):
    """Two names become one there, with two values, which MLflow refuses together with all that stands in the same call."""
    clash = {"why?": 1, "why_": 2}
    sink = MlflowSink(uri, "refused", "run", {**{f"p{i}": i for i in range(150)}, **clash})
    for step in (1, 2, 3):
        sink.log(step, {"loss": float(step), "rewards/größe/mean": 1.0})
    sink.close(timeout_s=60)
    client = MlflowClient(uri, uri)
    run = _only_run(client, "refused")
    assert len(run.data.params) == 151 and run.data.params["why_"] == "1" and sink.num_dropped == 0
    assert (
        len(client.get_metric_history(run.info.run_id, "loss")) == 3 and run.data.metrics["rewards/gr__e/mean"] == 1.0
    )
    assert "refuses params 'why_'" in caplog.text


def test_a_password_in_the_uri_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        MlflowSink("http://user:s3cret@127.0.0.1:5000", "x", "y")
    assert "s3cret" not in str(refusal.value)


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
