import queue
import shutil
import threading
import time
from contextlib import closing, contextmanager
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain import evidence
from posttrain.config.stages import ModelKeys
from posttrain.evidence import GateVerdict, Verdict
from posttrain.files import digest_bytes, digest_tree
from posttrain.models.load import load_policy, read_model
from posttrain.registry import Manifest, Registry
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed
from posttrain.types import Request, SamplingParams, in_order

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client", "openai")):
    pytest.skip("serving needs posttrain[serve] and the openai client", allow_module_level=True)

import httpx

from posttrain.serve.options import ServeOptions
from posttrain.serve.run import run_server
from posttrain.serve.setup import ServedNames, make_router


@contextmanager
def in_thread(run):
    """`run(ready)`, a server, in a thread of this process until the end; what `ready` was given."""
    opened = queue.Queue()

    def target():
        try:
            run(opened.put)
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            opened.put(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    serving = opened.get(timeout=120)
    if isinstance(serving, BaseException):
        raise serving
    try:
        yield serving
    finally:
        serving.stop()
        thread.join(120)
        assert not thread.is_alive()


def running(names, **options):
    """A server of `names` on a free port."""
    options = ServeOptions(**{"port": 0, "follow_s": 0.05, "drain_s": 5.0, **options})
    return in_thread(lambda ready: run_server(options, lambda: make_router(names, options), ready))


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


BASE = digest_bytes(b"base weights")


def passing(candidate, baseline):
    test = evidence.TestResult(
        "primary", "heldout", "exact", 1000, 1000, 0.4, 0.5, 0.1, 0.07, 0.13, 0.075, 0.05, 0.001, Verdict.PASS, "as measured",
        (150, 50),
    )  # fmt: skip
    return GateVerdict(Verdict.PASS, "as measured", candidate, baseline, digest_bytes(b"spec"), 0.05, (test,))


def until(condition, within_s=30.0):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within_s
        time.sleep(0.02)


@pytest.fixture
def registered(tmp_path, model_dir):
    """A registry of `tiny` with two versions of other weights, the first its champion; their digests."""
    digests = []
    book = Registry(tmp_path / "registry")
    for number in range(2):
        model = tmp_path / f"model-{number}"
        shutil.copytree(model_dir("qwen3"), model)
        weights = load_file(model / "model.safetensors")
        torch.manual_seed(number)
        weights = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in weights.items()}
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        digests.append(digest_tree(model))
        manifest = Manifest("sft", {"model": BASE, "data": BASE}, {"model": digests[-1]})
        book.register("tiny", model, [manifest])
    book.promote("tiny", 1, "champion", passing(digests[0], BASE))
    book.close()
    return tmp_path / "registry", digests


class Asking:
    """Clients that ask the same question again and again, noting who answered what, and when."""

    def __init__(self, address, model="tiny", clients=4, **fields):
        self._body = {"model": model, "prompt": "What", "seed": 7, "max_tokens": 16, **fields}
        self._address, self._stopping = address, threading.Event()
        self.found, self.failed = [], []
        self._threads = [threading.Thread(target=self._run) for _ in range(clients)]

    def _run(self):
        with httpx.Client(base_url=self._address, timeout=60) as http:
            while not self._stopping.is_set():
                begun = time.monotonic()
                answer = http.post("/v1/completions", json=self._body)
                if answer.status_code != 200:
                    self.failed.append(answer.text)
                    continue
                said = answer.json()
                self.found.append((begun, said["system_fingerprint"], said["choices"][0]["text"]))

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc):
        self._stopping.set()
        for thread in self._threads:
            thread.join()


def names(serving):
    data = httpx.get(serving.address + "/v1/models").json()["data"]
    return {model["id"]: model["digest"] for model in data}


def promote_and_roll_back(serving, registry, digests):
    """Under load: no answer is dropped or mixed, and each is of the version that the alias meant."""
    first, second = digests
    with closing(Registry(registry)) as book:
        with Asking(serving.address) as asking:
            until(lambda: len(asking.found) > 20)
            promoting = time.monotonic()
            book.promote("tiny", 2, "champion", passing(second, first))
            until(lambda: names(serving)["tiny"] == second)
            promoted = time.monotonic()
            until(lambda: sum(digest == second for _, digest, _ in asking.found) > 20)
            returning = time.monotonic()
            book.rollback("tiny", "champion", "it was a test")
            until(lambda: names(serving)["tiny"] == first)
            returned = time.monotonic()
            after = len(asking.found)
            until(lambda: len(asking.found) > after + 20)
        until(lambda: len(serving.service.router.ids) == 1)
    assert asking.failed == []
    said = {digest: {text for _, d, text in asking.found if d == digest} for digest in (first, second)}
    assert [len(texts) for texts in said.values()] == [1, 1] and said[first] != said[second]
    for begun, digest, _ in asking.found:
        if begun < promoting or begun > returned:
            assert digest == first
        elif promoted < begun < returning:
            assert digest == second


@pytest.fixture(scope="session")
def following():
    """What tests of a server that follows a registry share."""
    return SimpleNamespace(
        passing=passing, until=until, names=names, promote_and_roll_back=promote_and_roll_back, open=Registry
    )  # fmt: skip
