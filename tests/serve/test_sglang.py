"""SGLang by URL behind the router: bodies and answers in the form of its documentation, through a real server of HTTP that replays it.

Nothing here has been run against SGLang itself.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.stages import ModelKeys
from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.adapters import load_adapter
from posttrain.models.load import load_policy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.serve.setup import ServedNames
from posttrain.types import Request, SamplingParams

EXAMPLES = json.loads((Path(__file__).parents[1] / "rollout" / "sglang.json").read_text())
FIELDS = EXAMPLES["fields"]
PROMPT = "What is 1 plus"


class Handler(BaseHTTPRequestHandler):
    """Refuses what the documentation does not have; answers in the form of its examples, computed by an engine of ours."""

    def do_GET(self):
        info = EXAMPLES["server_info"]["answer"] | self.server.info | {"weight_version": self.server.weight_version}
        self._answer(200, info if self.path == "/server_info" else None)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        unknown = body.keys() - set(FIELDS[self.path])
        unknown |= body.get("sampling_params", {}).keys() - set(FIELDS["sampling_params"])
        if unknown:
            self._answer(400, {"error": {"message": f"unknown: {unknown}"}})
        elif self.path == "/generate":
            with self.server.lock:
                answers = list(self.server.answers(body))
            self._stream(answers) if body.get("stream") else self._answer(200, answers[-1])
        else:
            with self.server.lock:  # as the lock for writing: after those that are being answered
                self._answer(*self.server.changed(self.path, body))

    def _stream(self, answers):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for answer in answers:
            if self.server.dies:
                self.connection.close()
                return
            self.wfile.write(b"data: " + json.dumps(answer).encode() + b"\n\n")
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")

    def _answer(self, status, value):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


class Replay(ThreadingHTTPServer):
    """`incremental`: streams hold what is new, as with --incremental-streaming-output, and else all so far."""

    request_queue_size = 128

    def __init__(self, folder, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder, self.adapters = folder, {}
        self.base = load_policy(ModelKeys(base_model=str(folder)), trainable=False)
        self.seen, self.lock, self.incremental, self.dies, self.refuses = [], threading.RLock(), False, False, False
        self.info = {"enable_deterministic_inference": True, "enable_lora": True, "grammar_backend": "llguidance"}
        self.weight_version = "default"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def end(self):
        self.shutdown()
        self.server_close()

    def answers(self, body):
        policy = self.adapters[body["lora_path"]] if body.get("lora_path") else self.base
        engine, options, ids = EmbeddedEngine(policy, stop_token_ids=()), body["sampling_params"], body["input_ids"]
        params = SamplingParams(
            options["max_new_tokens"], options["temperature"], options.get("top_p", 1.0), max(0, options.get("top_k", 0)),
            options.get("min_p", 0.0), tuple(options.get("stop_token_ids", ())),
        )  # fmt: skip
        [made] = engine.generate([Request(tuple(ids), options.get("sampling_seed", 0))], params)
        scored = [[logp, token, None] for logp, token in zip(made.logp, made.ids, strict=True)]
        num_top = body.get("top_logprobs_num", 0)
        tops = self.tops(policy, [*ids, *made.ids], num_top) if num_top else [None] * (len(ids) + len(made.ids))
        given = engine.score([(ids, 1)])[0] if "logprob_start_len" in body and len(ids) > 1 else []
        for count in range(1, len(scored) + 1):
            first = count - 1 if self.incremental else 0
            is_last = count == len(scored)
            kind = (
                {"type": "stop", "matched": made.ids[-1]}
                if made.finish == "stop"
                else {"type": "length", "length": count}
            )
            yield {
                "text": "unread", "output_ids": list(made.ids[first:count]),
                "meta_info": {
                    "id": "1", "finish_reason": kind if is_last else None, "prompt_tokens": len(ids), "weight_version": self.weight_version,
                    "completion_tokens": count, "output_token_logprobs": scored[first:count],
                    "output_top_logprobs": tops[len(ids) + first : len(ids) + count],
                    "input_token_logprobs": [[None, ids[0], None], *([logp, token, None] for logp, token in zip(given, ids[1:], strict=bool(given)))],
                    "input_top_logprobs": tops[: len(ids)],
                },
            }  # fmt: skip

    def tops(self, policy, ids, num_top):
        with torch.no_grad():
            logp = torch.log_softmax(policy.base(input_ids=torch.tensor([ids])).logits[0].float(), -1)
        found = logp.topk(num_top, -1)
        pairs = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        return [None, *([[value, token, None] for value, token in zip(*pair, strict=True)] for pair in pairs)]

    def changed(self, path, body):
        if path == "/update_weights_from_disk":
            if self.refuses:
                return 400, EXAMPLES["update_weights_from_disk"]["refused"]
            loaded = AutoModelForCausalLM.from_pretrained(body["model_path"], dtype=torch.float32)
            self.base.base.load_state_dict(loaded.state_dict())
            self.weight_version = body["weight_version"]
            return 200, EXAMPLES["update_weights_from_disk"]["answer"]
        if path == "/unload_lora_adapter":
            known = self.adapters.pop(body["lora_name"], None)
            return (
                (200, EXAMPLES["load_lora_adapter"]["answer"])
                if known
                else (400, EXAMPLES["load_lora_adapter"]["refused"])
            )
        policy = load_policy(ModelKeys(base_model=str(self.folder)), trainable=False)
        policy.model = load_adapter(policy.model, Path(body["lora_path"])).eval()
        self.adapters[body["lora_name"]] = policy
        return 200, EXAMPLES["load_lora_adapter"]["answer"]


@pytest.fixture
def sglang(folder):
    server = Replay(folder)
    yield server
    server.end()


def asked(serving, **fields):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    return httpx.post(f"{serving.address}/v1/completions", json=body, timeout=60)


def choice_of(serving, **fields):
    answer = asked(serving, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def given(server, **options):
    return {"engine": "sglang", "url": server.url, "engine_timeout_s": 20.0, "start_timeout_s": 20.0, **options}


@pytest.mark.parametrize("incremental", [False, True])
def test_answers_of_base_and_adapters_are_those_of_the_embedded_engine(
    running, sglang, folder, make_adapter, tmp_path, incremental
):
    sglang.incremental = incremental
    loras = {f"a{n}": make_adapter(tmp_path / f"a{n}", folder, n) for n in range(2)}
    names = ServedNames([str(folder)], tmp_path, loras=loras, name="base")
    with running(names) as ours, running(names, **given(sglang)) as theirs:
        said = set()
        for model in ("base", "a0", "a1"):
            fields = {"model": model, "logprobs": 3, "echo": True}
            here, there = choice_of(ours, **fields), choice_of(theirs, **fields)
            assert (here["text"], here["finish_reason"]) == (there["text"], there["finish_reason"])
            assert here["logprobs"]["tokens"] == there["logprobs"]["tokens"]
            for mine, its in zip(here["logprobs"]["token_logprobs"], there["logprobs"]["token_logprobs"], strict=True):
                assert mine == pytest.approx(its, abs=1e-4)
            assert here["logprobs"]["top_logprobs"][-1].keys() == there["logprobs"]["top_logprobs"][-1].keys()
            said.add(here["text"])
        assert len(said) == 3
        assert (
            len({asked(theirs, model="a0", temperature=1, seed=4).json()["choices"][0]["text"] for _ in range(3)}) == 1
        )


def test_it_is_given_the_weights_that_are_served_and_says_so_with_each_answer(running, sglang, registered):
    registry, (first, _) = registered
    with running(ServedNames(["tiny"], registry), **given(sglang)) as serving:
        assert asked(serving, model="tiny").json()["system_fingerprint"] == first
        [push] = [body for path, body in sglang.seen if path == "/update_weights_from_disk"]
        assert (push["weight_version"], push["flush_cache"]) == (first, True)
        sglang.weight_version = "of-somebody-else"
        answer = asked(serving, model="tiny")
        assert answer.status_code == 503 and "answered with the weights of-somebody-else" in answer.text


def test_a_promotion_and_a_rollback_swap_the_weights_of_one_server_and_no_answer_is_dropped_or_mixed(
    running, sglang, registered, following
):
    with running(ServedNames(["tiny"], registered[0]), **given(sglang)) as serving:
        following.promote_and_roll_back(serving, *registered)
    pushed = [body["weight_version"] for path, body in sglang.seen if path == "/update_weights_from_disk"]
    first, second = registered[1]
    assert pushed == [first, second, first]


def test_a_version_that_it_does_not_take_leaves_the_champion_answering(running, sglang, registered, following):
    registry, (first, second) = registered
    with running(ServedNames(["tiny"], registry), **given(sglang)) as serving:
        sglang.refuses = True
        book = following.open(registry)
        book.promote("tiny", 2, "champion", following.passing(second, first))
        following.until(lambda: serving.service.router.trouble)
        sglang.refuses = False
        for _ in range(3):
            assert asked(serving, model="tiny").json()["system_fingerprint"] == first
        assert "Failed to get weights iterator" in next(iter(serving.service.router.trouble.values()))
        book.close()


def test_one_that_was_started_anew_is_given_weights_and_adapters_again(running, folder, make_adapter, tmp_path):
    server = Replay(folder)
    names = ServedNames([str(folder)], tmp_path, loras={"a0": make_adapter(tmp_path / "a0", folder, 0)}, name="base")
    with running(names, **given(server)) as serving:
        before = choice_of(serving, model="a0")["text"]
        server.dies = True
        assert asked(serving, model="a0").json()["error"]["code"] == "interrupted"
        port = server.server_port
        server.end()
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(choice_of, serving, model="a0") for _ in range(4)]
            time.sleep(0.5)
            server = Replay(folder, port)
            assert {one.result()["text"] for one in asking} == {before}
        assert server.weight_version.startswith("sha256:") and len(server.adapters) == 1
        assert not any(path == "/generate" and "lora_path" not in body for path, body in server.seen)
    server.end()


def test_a_router_whose_server_is_gone_stops_when_it_is_told_to(running, folder, following, tmp_path):
    server = Replay(folder)
    names = ServedNames([str(folder)], tmp_path, name="tiny")
    with running(names, **given(server, start_timeout_s=600.0)) as serving:
        server.end()
        rows = next(entry.loading.result().rows for entry in serving.service.router._pool._entries.values())
        following.until(lambda: rows.num_restarts)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < 15


def test_what_it_cannot_do_is_refused_by_name(running, sglang, folder, tmp_path, make_client):
    sglang.info["grammar_backend"] = "xgrammar"
    with running(ServedNames([str(folder)], tmp_path, name="tiny"), **given(sglang)) as serving:
        for stream in (False, True):
            answer = asked(serving, model="tiny", temperature=0.7, logprobs=0, stream=stream)
            assert answer.status_code == 400 and "log-probs are those after temperature" in answer.text
        form = {"type": "json_object"}
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "response_format": form}
        answer = httpx.post(f"{serving.address}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code == 400 and "--grammar-backend llguidance" in answer.text


@pytest.mark.parametrize(
    ("info", "loras", "said"),
    [
        (
            {"enable_deterministic_inference": False},
            False,
            "without --enable-deterministic-inference; start it with that",
        ),
        ({"enable_lora": None}, True, "without --enable-lora; start it with that"),
    ],
)
def test_a_server_that_was_started_otherwise_opens_no_port(
    running, sglang, folder, make_adapter, tmp_path, info, loras, said
):
    sglang.info |= info
    adapters = {"a0": make_adapter(tmp_path / "a0", folder, 0)} if loras else {}
    names = ServedNames([str(folder)], tmp_path, loras=adapters, name="base")
    with pytest.raises(PosttrainError, match=said), running(names, **given(sglang)):
        pass


@pytest.mark.parametrize(
    ("models", "options", "said"),
    [
        (["tiny"], {"engine": "sglang"}, "--engine sglang without --url"),
        (["tiny"], {"url": "http://127.0.0.1:1"}, "--engine embedded with --url"),
        (["tiny"], {"engine": "vllm", "url": "http://127.0.0.1:1"}, "cannot follow an alias; name a version"),
        (["tiny", "tiny@2"], {"engine": "sglang", "url": "http://127.0.0.1:1"}, "a server with one model"),
        (["tiny"], {"engine": "sglang", "url": "http://10.0.0.1:30000"}, "expected one on this machine"),
    ],
)
def test_what_a_server_at_a_url_cannot_have_is_said_before_the_port_opens(running, registered, models, options, said):
    with pytest.raises(ConfigError, match=said), running(ServedNames(models, registered[0]), **options):
        pass
