"""Reaching the hub: one quick question instead of the client's half minute of retries."""

import socket
import time

import huggingface_hub.constants
import pytest

from posttrain.config import hub


@pytest.fixture(autouse=True)
def client(monkeypatch):
    """The hub's client as it is online, without a proxy; put back afterwards."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.why_unreachable.cache_clear()
    return huggingface_hub.constants


@pytest.fixture
def server():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def closed():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    return address


def test_where_a_connection_opens_the_client_is_left_alone(client, server, monkeypatch):
    monkeypatch.setattr(client, "ENDPOINT", server)
    assert hub.prepare() == ""
    assert client.HF_HUB_OFFLINE is False


def test_where_none_opens_the_client_goes_offline_at_once(client, closed, monkeypatch):
    monkeypatch.setattr(client, "ENDPOINT", closed)
    started = time.monotonic()
    assert hub.prepare() == "Connection refused"
    assert client.HF_HUB_OFFLINE is True
    assert time.monotonic() - started < hub.PATIENCE_S
    assert hub.prepare() == "its client is set to offline"


def test_a_name_that_does_not_exist(client):
    assert hub.why_unreachable("https://nothing.invalid")


def test_behind_a_proxy_the_client_finds_out_itself(client, closed, monkeypatch):
    monkeypatch.setattr(client, "ENDPOINT", closed)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert hub.prepare() == ""


def test_patience_ends(client):
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        host, port = full.getsockname()
        # A queue of one that is full: further connections hang instead of being refused.
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex((host, port))
        assert hub.why_unreachable(f"http://{host}:{port}", 0.2) == "no answer within 0 s"
        for each in waiting:
            each.close()


def test_a_model_and_a_dataset_of_the_hub_are_refused_in_one_line(client, closed, monkeypatch):
    import datasets

    from posttrain.config.datasets import DatasetKeys
    from posttrain.config.stages import ModelKeys
    from posttrain.data.opened import read_rows
    from posttrain.errors import DataError, ModelError
    from posttrain.models.load import load_config

    monkeypatch.setattr(client, "ENDPOINT", closed)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"some-org/some-model is not a local folder .* \(Connection refused\)"):
        load_config(ModelKeys(base_model="some-org/some-model"))
    with pytest.raises(DataError, match="some-org/some-data: not a local file"):
        read_rows(DatasetKeys(path="some-org/some-data"))
    assert time.monotonic() - started < hub.PATIENCE_S
