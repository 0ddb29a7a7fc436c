"""A server that runs already: it is brought the model that is asked for, and refused where it was started otherwise."""

import contextlib
import socket
import threading
from importlib.util import find_spec

import pytest

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import SFTKeys
from posttrain.errors import ConfigError, EngineError, EngineGoneError
from posttrain.recipes.experience.engines import EngineSource, make_engine, named_engine
from posttrain.rollout.embedded import score_sequences
from posttrain.rollout.vllm import connect
from posttrain.rollout.vllm.connect import token_of
from posttrain.types import Request, SamplingParams, in_order

NEEDS_VLLM = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: make setup-vllm")


def relay(source, sink):
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def url(vllm_server_engine, shared_policy):
    """A port of this machine behind which the tests' server stands."""
    path = vllm_server_engine._replicas[0].engine._server.client.address.path
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                client, _ = listening.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(path)
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=relay, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    listening.close()
    vllm_server_engine._replicas[0].engine._sender.connect(vllm_server_engine._replicas[0].engine._init)
    vllm_server_engine.update(shared_policy("qwen3"), 0)


@pytest.fixture
def given(url, vllm_server_engine, monkeypatch, model_dir):
    """`given(architecture)`: an engine on that server, with its key in a variable."""
    monkeypatch.setenv("MY_KEY", vllm_server_engine._replicas[0].engine._server.client.token)
    keys = RolloutKeys(engine="vllm_server", url=url, token_env="MY_KEY", max_restarts=0, start_timeout_s=5.0)

    def make(**changes):
        model = SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}])
        return make_engine(EngineSource(model), keys=keys.model_copy(update=changes))

    make.keys = keys
    return make


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
def test_a_given_server_is_brought_the_model_that_is_asked_for(given, vllm_server_engine, shared_policy, monkeypatch):
    engine = given()
    policy = shared_policy("qwen3")
    requests = [Request((5, 9, 40), seed) for seed in range(3)]
    completions = in_order(engine.generate(requests, SamplingParams(max_tokens=6)))
    scored = score_sequences(policy, [(r.prompt_ids + c.ids, 3) for r, c in zip(requests, completions, strict=True)])
    for completion, expected in zip(completions, scored, strict=True):
        assert completion.logp == pytest.approx(expected, abs=2e-4)
    info = engine.describe()
    assert (info.name, info.dtype, info.version) == ("vllm_server", "float32", "0.32.0")
    assert named_engine(given.keys) == "vllm_server 0.32.0"
    engine.close()
    assert vllm_server_engine.score([((5, 6, 7), 1)]), "it goes on without us"


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
def test_one_that_was_started_otherwise_is_refused_with_the_flags(given, monkeypatch):
    wanted = connect._WANTED | {"logprobs_mode": ("model_config", "other", "--logprobs-mode other")}
    monkeypatch.setattr(connect, "_WANTED", wanted)
    with pytest.raises(EngineError, match="was started without --logprobs-mode other; start it as docs"):
        given()


@NEEDS_VLLM
@pytest.mark.xdist_group("vllm")
def test_without_its_key_it_answers_nothing(given):
    with pytest.raises(EngineError, match="answered 401"):
        given(token_env="NOT_SET")


def test_where_nobody_answers_that_is_said(tmp_path):
    keys = RolloutKeys(engine="vllm_server", url="http://127.0.0.1:9", start_timeout_s=0.3)
    with pytest.raises(EngineGoneError, match=r"GET /version: the server at 127.0.0.1:9 cannot be reached"):
        named_engine(keys)


def test_a_key_is_read_from_its_file_before_the_variable(tmp_path, monkeypatch):
    (tmp_path / "key").write_text("from the file\n")
    monkeypatch.setenv("VLLM_API_KEY", "from the variable")
    assert token_of("VLLM_API_KEY", None) == "from the variable"
    assert token_of("VLLM_API_KEY", str(tmp_path / "key")) == "from the file"
    with pytest.raises(ConfigError, match=r"token_file: .*none cannot be read"):
        token_of("VLLM_API_KEY", str(tmp_path / "none"))
