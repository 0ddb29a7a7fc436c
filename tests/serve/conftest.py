import queue
import threading
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from posttrain.config.stages import ModelKeys
from posttrain.models.load import load_policy, read_model
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Request, SamplingParams, in_order

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client", "openai")):
    pytest.skip("serving needs posttrain[serve] and the openai client", allow_module_level=True)

from posttrain.serve.options import ServeOptions
from posttrain.serve.run import run_server
from posttrain.serve.setup import ServedNames, make_router


@contextmanager
def running(names, **options):
    """A server of `names` in a thread of this process, on a free port; what `ready` was given."""
    options = ServeOptions(**{"port": 0, "follow_s": 0.05, "drain_s": 5.0, **options})
    opened = queue.Queue()

    def run():
        try:
            run_server(options, lambda: make_router(names, options), opened.put)
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            opened.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    serving = opened.get(timeout=120)
    if isinstance(serving, BaseException):
        raise serving
    try:
        yield serving
    finally:
        serving.stop()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(name="running", scope="session")
def running_fixture():
    return running


@pytest.fixture(scope="session")
def folder(model_dir):
    return model_dir("qwen3")


@pytest.fixture(scope="session")
def serving(folder, tmp_path_factory):
    """One server of the tiny Qwen3 under the name `tiny`, for tests that leave it as it is."""
    with running(ServedNames([str(folder)], tmp_path_factory.mktemp("none"), name="tiny"), stall_s=5.0) as found:
        yield found


def make_client(serving, token="none", **options):
    from openai import OpenAI

    return OpenAI(base_url=f"{serving.address}/v1", api_key=token, max_retries=0, timeout=60, **options)


@pytest.fixture(name="make_client", scope="session")
def make_client_fixture():
    return make_client


@pytest.fixture(scope="session")
def client(serving):
    return make_client(serving)


@pytest.fixture(scope="session")
def ask_http(serving):
    """`ask_http("POST", "/tokenize", json=…)`: the server's answer."""
    import httpx

    with httpx.Client(base_url=serving.address, timeout=60) as http:
        yield http.request


@pytest.fixture(scope="session")
def alone(folder):
    """`alone(prompt_ids, seed, number, **params)`: what the engine says to the same request by itself."""
    policy = load_policy(ModelKeys(base_model=str(folder)), trainable=False)
    engine = EmbeddedEngine(policy, stop_token_ids=(2,))

    def ask(prompt_ids, seed, number=0, **params):
        request = Request(tuple(prompt_ids), request_seed("serve", seed, number))
        [completion] = in_order(engine.generate([request], SamplingParams(**params)))
        return completion

    return ask


def make_adapter(folder, base, seed):
    from peft import LoraConfig, get_peft_model

    model = read_model(ModelKeys(base_model=str(base)), torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return folder


@pytest.fixture(name="make_adapter", scope="session")
def make_adapter_fixture():
    return make_adapter
