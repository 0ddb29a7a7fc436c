"""The Prometheus endpoint, read by a real HTTP client."""

import re
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from posttrain.errors import ConfigError
from posttrain.tracking.prometheus import PrometheusSink
from posttrain.types import Severity


@pytest.fixture
def sink():
    sink = PrometheusSink(0, stage="grpo")
    yield sink
    sink.close()


def _get(sink, path="/metrics"):
    return urllib.request.urlopen(f"http://127.0.0.1:{sink.port}{path}", timeout=5)


def test_the_latest_metrics_and_the_findings_are_served(sink):
    sink.log(1, {"reward": 0.1})
    sink.log(2, {"reward": 0.25, "clip_ratio/low_mean": 0.0, "kl": float("nan")})
    for _ in range(2):
        sink.event("finding", 2, {"rule": "kl_drift", "severity": Severity.SOFT})
    with _get(sink) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = answer.read().decode().splitlines()
    assert 'posttrain_reward{stage="grpo"} 0.25' in lines
    assert 'posttrain_step{stage="grpo"} 2.0' in lines
    assert 'posttrain_clip_ratio_low_mean{stage="grpo"} 0.0' in lines
    assert 'posttrain_kl{stage="grpo"} NaN' in lines
    assert 'posttrain_findings_total{stage="grpo",rule="kl_drift",severity="soft"} 2' in lines
    assert lines.count("# TYPE posttrain_reward gauge") == 1


def test_only_this_machine_and_only_this_page(sink):
    assert sink._server.server_address[0] == "127.0.0.1"
    with pytest.raises(urllib.error.HTTPError) as caught:
        _get(sink, "/")
    assert caught.value.code == 404


def test_a_port_that_is_taken_is_said_before_any_work():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port 127.0.0.1:{port} cannot be opened .* choose another"):
            PrometheusSink(port)


def test_closing_ends_the_endpoint():
    sink = PrometheusSink(0)
    sink.close()
    with pytest.raises(urllib.error.URLError):
        _get(sink)


_NAME, _LABEL = r"[a-zA-Z_:][a-zA-Z0-9_:]*", r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
_SAMPLE = re.compile(rf"{_NAME}(?:\{{{_LABEL}(?:,{_LABEL})*\}})? (?:NaN|[+-]Inf|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
_TYPE = re.compile(rf"# TYPE ({_NAME}) (?:gauge|counter)")


def test_the_page_keeps_to_the_exposition_format():
    sink = PrometheusSink(0, stage='a "b"\\\n')
    try:
        values = {
            "reward/std": 1e-12,
            "9lives": -3.0,
            "größe": float("inf"),
            "a.b-c d": float("-inf"),
            "kl": float("nan"),
        }
        sink.log(7, values | {"reward.std": 2.0})
        sink.event("finding", 7, {"rule": 'odd "rule"\n', "severity": "hard"})
        sink.event("action", 7, {"rule": "kl_drift", "message": "beta 0.1"})
        sink.event("rollback", 7, {"rule": "nan", "severity": "hard"})
        with _get(sink) as answer:
            page = answer.read().decode()
    finally:
        sink.close()
    assert page.endswith("\n")
    typed = [_TYPE.fullmatch(line).group(1) for line in page.splitlines() if line.startswith("#")]
    samples = [line for line in page.splitlines() if not line.startswith("#")]
    assert [line for line in samples if not _SAMPLE.fullmatch(line)] == []
    assert len(typed) == len(set(typed)), "a name has one type, and its samples stand together"
    assert len({line.rsplit(" ", 1)[0] for line in samples}) == len(samples), "no sample twice"
    assert {re.match(_NAME, line).group() for line in samples} == set(typed)
    assert 'posttrain_actions_total{stage="a \\"b\\"\\\\\\n",kind="action"} 1' in samples
    assert 'posttrain_actions_total{stage="a \\"b\\"\\\\\\n",kind="rollback"} 1' in samples


def test_a_parser_of_prometheus_reads_the_page():
    """The one of `prometheus_client`: every sample, its labels unescaped, and no family twice."""
    sink = PrometheusSink(0, stage='a "b"\\\n')
    try:
        sink.log(7, {"reward/std": 1e-12, "größe": float("inf"), "kl": float("nan"), "9lives": -3.0})
        sink.event("finding", 7, {"rule": 'odd "rule"\n', "severity": "hard"})
        sink.event("action", 7, {"rule": "kl_drift", "message": "beta 0.1"})
        with _get(sink) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    finally:
        sink.close()
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    samples = {sample.name: sample for family in families for sample in family.samples}
    assert samples["posttrain_reward_std"].value == 1e-12
    assert samples["posttrain_gr__e"].value == float("inf")
    assert samples["posttrain_9lives"].value == -3.0
    assert samples["posttrain_findings_total"].labels == {
        "stage": 'a "b"\\\n', "rule": 'odd "rule"\n', "severity": "hard",
    }  # fmt: skip
    assert {family.type for family in families} == {"gauge", "counter"}
