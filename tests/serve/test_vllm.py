"""vLLM behind the router: the same answers' rules, adapters by name, and what its death costs."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest
import torch

from posttrain.errors import EngineError, PosttrainError
from posttrain.rollout.vllm.options import VLLMOptions
from posttrain.rollout.vllm.server import server_arguments, server_environment
from posttrain.serve.setup import ServedNames
from posttrain.serve.vllm import VLLMDialect

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: make setup-vllm", allow_module_level=True)

pytestmark = pytest.mark.xdist_group("served by vllm")

PROMPT = "What is 1 plus"


@pytest.fixture(scope="module")
def adapters(folder, make_adapter, tmp_path_factory):
    made = tmp_path_factory.mktemp("adapters")
    return {f"a{n}": make_adapter(made / f"a{n}", folder, n) for n in range(2)}


@pytest.fixture(scope="module")
def vllm(running, folder, adapters, tmp_path_factory):
    options = {"engine": "vllm", "kv_memory_gib": 0.1, "max_lora_rank": 8, "max_loras": 2, "engine_timeout_s": 20.0}
    names = ServedNames([str(folder)], tmp_path_factory.mktemp("none"), loras=adapters, name="base")
    with running(names, **options) as serving:
        yield serving


@pytest.fixture(scope="module")
def embedded(running, folder, adapters, tmp_path_factory):
    names = ServedNames([str(folder)], tmp_path_factory.mktemp("none"), loras=adapters, name="base")
    with running(names) as serving:
        yield serving


def asked(serving, **fields):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3, **fields}
    answer = httpx.post(f"{serving.address}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def rows_of(serving):
    return next(entry.loading.result().rows for entry in serving.service.router._pool._entries.values())


def worker_pids(serving):
    """The process of vLLM that decodes, below the one that listens."""
    children = lambda pid: [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]  # noqa: E731
    [listening] = children(rows_of(serving)._live.result().server.pid)
    return listening, children(listening)


def test_answers_of_base_and_adapters_are_those_of_the_embedded_engine(vllm, embedded):
    said = set()
    for model in ("base", "a0", "a1"):
        with ThreadPoolExecutor(4) as pool:
            several = list(pool.map(lambda _, model=model: asked(vllm, model=model), range(4)))
        ours = asked(embedded, model=model)["choices"][0]
        for answer in several:
            [theirs] = answer["choices"]
            assert theirs["text"] == ours["text"] and theirs["finish_reason"] == ours["finish_reason"]
            for key in ("tokens", "text_offset"):
                assert theirs["logprobs"][key] == ours["logprobs"][key]
            assert theirs["logprobs"]["token_logprobs"] == pytest.approx(ours["logprobs"]["token_logprobs"], abs=1e-4)
            assert answer["model"].startswith(f"{model}@sha256:")
        said.add(ours["text"])
    assert len(said) == 3


def test_a_seed_is_the_same_answer_again_whatever_else_is_sampled(vllm):
    alone = [asked(vllm, model="a0", temperature=1, seed=n)["choices"][0]["text"] for n in range(4)]
    with ThreadPoolExecutor(12) as pool:
        models = ["a0"] * 4 + ["a1", "base"] * 4
        found = list(pool.map(lambda n: asked(vllm, model=models[n], temperature=1, seed=n), range(12)))
    assert [one["choices"][0]["text"] for one in found[:4]] == alone and len(set(alone)) > 1


def test_bias_stop_strings_and_grammars_are_held_to(vllm, embedded, make_client, tokenizer):
    token = tokenizer("a")["input_ids"][-1]
    for serving in (vllm, embedded):
        assert asked(serving, model="base", logit_bias={token: 100}, max_tokens=3)["choices"][0]["text"] == "aaa"
        assert asked(serving, model="base", logit_bias={token: 100}, stop=["aa"])["choices"][0]["text"] == ""
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {**schema, "additionalProperties": False}}}
    for seed in range(3):
        answer = make_client(vllm).chat.completions.create(
            model="a1", messages=[{"role": "user", "content": "hi"}], response_format=form, seed=seed, max_tokens=40
        )
        [choice] = answer.choices
        assert choice.finish_reason == "stop" and json.loads(choice.message.content)["n"] <= 9


@pytest.mark.slow
def test_who_is_being_answered_when_it_is_killed_is_told_and_nobody_else_is(vllm, make_client, tokenizer):
    client = make_client(vllm)
    never = dict.fromkeys((0, 1, 2), -100)
    long = {"prompt": PROMPT, "max_tokens": 200, "logit_bias": never, "stream": True}
    stream = client.completions.create(model="a0", **long)
    next(iter(stream))
    before = rows_of(vllm).num_restarts
    os.kill(worker_pids(vllm)[0], signal.SIGKILL)
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(asked, vllm, model=("a0", "a1", "base")[n % 3]) for n in range(8)]
        with pytest.raises(openai.APIError, match="was interrupted: vLLM"):
            list(stream)
        assert all(one.result()["choices"][0]["text"] for one in asking)
    assert rows_of(vllm).num_restarts == before + 1


@pytest.mark.slow
def test_one_that_hangs_is_started_anew(vllm, embedded):
    before = rows_of(vllm).num_restarts
    for pid in worker_pids(vllm)[1]:
        os.kill(pid, signal.SIGSTOP)
    begun = time.monotonic()
    while rows_of(vllm).num_restarts == before:
        assert time.monotonic() - begun < 120
        time.sleep(0.1)
    assert asked(vllm, model="a1")["choices"][0]["text"] == asked(embedded, model="a1")["choices"][0]["text"]


@pytest.mark.slow
def test_a_server_that_was_started_elsewhere_answers_by_url(running, folder, adapters, embedded, tmp_path):
    options = VLLMOptions(
        str(folder), (), memory_gib=0.1, lora_rank=8, max_loras=2, beside={"structured_outputs_config": {"backend": "guidance"}}
    )  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As somebody starts it who knows nothing of us: on a port.
    arguments = [a for a in server_arguments(options) if not a.startswith(("--logprobs-mode", "--worker", "--weight"))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--port={port}", *arguments]
    given = {"engine": "vllm", "url": f"http://127.0.0.1:{port}", "start_timeout_s": 120.0}
    names = ServedNames([str(folder)], tmp_path, loras=adapters, name="base")
    with subprocess.Popen(command, env=os.environ | server_environment(), stderr=subprocess.DEVNULL) as process:
        try:
            until_it_listens(port)
            with running(names, **given) as serving:
                for model in ("base", "a0", "a1"):
                    ours, theirs = (asked(one, model=model)["choices"][0] for one in (embedded, serving))
                    assert ours["text"] == theirs["text"]
                    assert ours["logprobs"]["token_logprobs"] == pytest.approx(
                        theirs["logprobs"]["token_logprobs"], abs=1e-4
                    )
            other = ServedNames([str(shutil.copytree(folder, tmp_path / "other"))], tmp_path)
            with pytest.raises(PosttrainError, match=r"serves .* as base, expected .*other"), running(other, **given):
                pass
        finally:
            process.terminate()


def until_it_listens(port):
    begun = time.monotonic()
    while True:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
            return
        except httpx.TransportError:
            assert time.monotonic() - begun < 180
            time.sleep(0.2)


def test_what_it_cannot_do_is_refused_by_name(vllm):
    body = {"model": "a0", "prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = httpx.post(f"{vllm.address}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400 and "echo with logprobs beside adapters" in answer.text
    wide = {"module": (torch.zeros(9, 4), torch.zeros(4, 9))}
    with pytest.raises(EngineError, match="started for 8: --max-lora-rank 9"):
        asyncio.run(rows_of(vllm).dialect.load(None, "wide", wide))


def test_what_it_refuses_is_the_clients_mistake_and_not_asked_again(vllm, monkeypatch):
    rows = rows_of(vllm)
    before, of = rows.num_restarts, VLLMDialect._of
    changed = lambda self, ids, adapter, sampling: of(self, ids, adapter, {**sampling, "top_p": 7})  # noqa: E731
    monkeypatch.setattr(VLLMDialect, "_of", changed)
    for stream in (False, True):
        body = {"model": "base", "prompt": PROMPT, "stream": stream}
        answer = httpx.post(f"{vllm.address}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 400 and "top_p" in answer.json()["error"]["message"], answer.text
        assert "retry-after" not in answer.headers
    echo = {"model": "base", "prompt": PROMPT, "max_tokens": 0, "echo": True}
    assert httpx.post(f"{vllm.address}/v1/completions", json=echo, timeout=60).status_code == 200
    monkeypatch.undo()
    assert asked(vllm, model="base")["choices"][0]["text"] and rows.num_restarts == before
