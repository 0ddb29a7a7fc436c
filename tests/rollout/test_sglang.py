"""SGLang by URL: bodies as its documentation has them, answered by a server of HTTP that replays its examples."""

import copy
import json
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError, EngineGoneError
from posttrain.models.load import load_policy
from posttrain.protocols import Engine
from posttrain.recipes.experience.engines import EngineSource, make_engine, named_engine, sync_engine
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sglang import sampled, scored, sglang_finish
from posttrain.types import Request, SamplingParams, in_order

EXAMPLES = json.loads((Path(__file__).parent / "sglang.json").read_text())
FIELDS = EXAMPLES["fields"]
PROMPT = (5, 9, 40, 41, 42)


def like(name, **meta):
    """An answer of the documentation with other contents, field by field one that it has."""
    answer = copy.deepcopy(EXAMPLES[name]["answer"])
    assert meta.keys() <= answer["meta_info"].keys()
    answer["meta_info"] |= meta
    return answer


class Handler(BaseHTTPRequestHandler):
    """Refuses what the documentation does not have; answers in the form of its examples, computed by an engine of ours."""

    def do_GET(self):
        info = EXAMPLES["server_info"]["answer"] | self.server.info
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
                self._answer(200, self._generated(body))
        else:
            self._update(body)

    def _generated(self, body):
        """With the log-probs of the prompt from `logprob_start_len` on, the first of which has none."""
        server, options = self.server, body["sampling_params"]
        ids = tuple(body["input_ids"])
        params = SamplingParams(
            options["max_new_tokens"], options["temperature"], options.get("top_p", 1.0), max(0, options.get("top_k", 0)),
            options.get("min_p", 0.0), tuple(options.get("stop_token_ids", ())), tuple(options.get("stop", ())),
        )  # fmt: skip
        [made] = server.engine.generate([Request(ids, options.get("sampling_seed", 0))], params)
        start = body.get("logprob_start_len", len(ids) - 1)
        given = server.engine.score([(ids, start + 1)])[0] if start + 1 < len(ids) else []
        kind = {
            "stop": {"type": "stop", "matched": made.ids[-1]},
            "length": {"type": "length", "length": len(made.ids)},
        }
        answer = like(
            "generate_with_logprobs", finish_reason=kind[made.finish], prompt_tokens=len(ids),
            completion_tokens=len(made.ids), weight_version=server.weight_version,
            input_token_logprobs=[[None, ids[start], None], *zip(given, ids[start + 1 :], [None] * len(given), strict=True)],
            output_token_logprobs=[[logp, token, None] for token, logp in zip(made.ids, made.logp, strict=True)],
        )  # fmt: skip
        return answer | {"output_ids": list(made.ids)}

    def _update(self, body):
        if self.server.refuses:
            self._answer(400, EXAMPLES["update_weights_from_disk"]["refused"])
            return
        loaded = AutoModelForCausalLM.from_pretrained(body["model_path"], dtype=torch.float32)
        self.server.policy.base.load_state_dict(loaded.state_dict())
        self.server.weight_version = body["weight_version"]
        self._answer(200, EXAMPLES["update_weights_from_disk"]["answer"])

    def _answer(self, status, value):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(model_dir):
    keys = SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}])
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.policy = load_policy(keys, trainable=False)
    found.engine = EmbeddedEngine(found.policy, stop_token_ids=(2,))
    found.seen, found.lock, found.refuses, found.weight_version = [], threading.Lock(), False, "default"
    found.info = {"enable_deterministic_inference": True, "dtype": "float32"}
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


@pytest.fixture
def policy(model_dir):
    return load_policy(SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}]))


@pytest.fixture
def connect(server, policy, model_dir):
    keys = SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}])
    rollout = RolloutKeys(engine="sglang", url=f"http://127.0.0.1:{server.server_port}", max_restarts=0)
    return partial(make_engine, EngineSource(keys, policy), keys=rollout)


@pytest.fixture
def synced(connect, policy):
    """Connected, and brought the weights of the policy."""

    def call():
        engine = connect()
        engine.update(policy, 0)
        return engine

    return call


def test_trained_weights_arrive_as_a_checkpoint_and_the_canary_holds(server, connect, policy):
    engine = connect()
    assert isinstance(engine, Engine)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.mul_(1.1)
    metrics = sync_engine(engine, policy, 3)
    assert metrics["sync/canary_gap"] < 1e-4
    assert metrics["sync/moved_share"] == 1.0
    [(_, body)] = [seen for seen in server.seen if seen[0] == "/update_weights_from_disk"]
    assert (body["flush_cache"], body["weight_version"]) == (True, "3.1")
    assert not Path(body["model_path"]).exists()
    assert all(torch.equal(a, b) for a, b in zip(server.policy.base.state_dict().values(), policy.base.state_dict().values(), strict=True))  # fmt: skip
    engine.close()


def test_completions_and_scores_are_those_of_the_engine_behind_it(server, synced):
    engine, params = synced(), SamplingParams(max_tokens=6, temperature=0.8, top_p=0.9, top_k=40, min_p=0.01)
    requests = [Request(PROMPT, seed) for seed in range(5)] + [Request((7,), (1 << 40) + 3)]
    found = in_order(engine.generate(requests, params))
    expected = in_order(server.engine.generate([*requests[:5], Request((7,), 3)], params))
    assert [(c.ids, c.finish) for c in found] == [(c.ids, c.finish) for c in expected]
    assert found[0].logp == pytest.approx(expected[0].logp, abs=1e-5)
    sequences = [((*PROMPT, 7), 1), ((5, 9, 3), 2)]
    for ours, theirs in zip(engine.score(sequences), server.engine.score(sequences), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert engine.describe().logprobs == "uncut"


def test_a_stop_string_ends_with_the_token_that_completes_it(server, synced, policy):
    engine = synced()
    [free] = engine.generate([Request(PROMPT, 1)], SamplingParams(max_tokens=8))
    stop = policy.tokenizer.decode([free.ids[2]])
    [stopped] = engine.generate([Request(PROMPT, 1)], SamplingParams(max_tokens=8, stop=(stop,)))
    assert len(stopped.ids) <= 3
    assert stopped.finish == "stop"
    body = server.seen[-1][1]["sampling_params"]
    assert (body["stop"], body["no_stop_trim"], body["skip_special_tokens"]) == ([stop], True, False)


def test_the_examples_of_its_documentation_are_read():
    example = EXAMPLES["generate_with_logprobs"]["answer"]
    assert sampled(example) == ((5338,), (-0.014046513475477695,))
    assert sglang_finish(example["meta_info"]["finish_reason"]) == "length"
    assert sglang_finish(EXAMPLES["generate"]["answer"]["meta_info"]["finish_reason"]) == "stop"
    assert scored(example, (382,), 1) == []


@pytest.mark.parametrize(
    ("answer", "read", "reason"),
    [
        (like("generate_with_logprobs", output_token_logprobs=[[-1.0, 7, None]]), sampled, r"of the tokens \[7\], and sampled \[5338\]"),
        (like("generate_with_logprobs"), lambda answer: scored(answer, (1, 2, 3), 1), "scored 0 tokens, asked were 2"),
        ({"type": "timeout"}, sglang_finish, "ended a completion with 'timeout'"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_what_was_asked_is_refused(answer, read, reason):
    with pytest.raises(EngineError, match=reason):
        read(answer)


def test_a_server_that_does_not_read_seeds_is_refused(server, connect):
    server.info = {}
    with pytest.raises(EngineError, match="was started without --enable-deterministic-inference; start it with that"):
        connect()


def test_an_update_that_it_refuses_stops_the_run(server, connect, policy):
    engine = connect()
    server.refuses = True
    with pytest.raises(EngineError, match=r"could not take its weights: .*Failed to get weights iterator"):
        engine.update(policy, 1)


def test_weights_of_somebody_else_are_noticed(server, connect, policy):
    engine = connect()
    engine.update(policy, 1)
    server.weight_version = "7.1"
    with pytest.raises(EngineError, match=r"sampled with weights '7.1', the last push was '1.1': somebody else"):
        in_order(engine.generate([Request(PROMPT, 0)], SamplingParams(max_tokens=2)))


def test_weights_wait_for_completions_that_are_being_sampled(synced, policy):
    engine = synced()
    running = engine.generate([Request(PROMPT, seed) for seed in range(3)], SamplingParams(max_tokens=2))
    next(running)
    with pytest.raises(EngineError, match="weights of version 1 came while completions of version 0"):
        engine.update(policy, 1)
    running.close()
    engine.update(policy, 1)


def test_a_prompt_that_it_cannot_take_is_refused(server, synced):
    server.info["max_req_input_len"] = 10
    with pytest.raises(EngineError, match=r"request 0: 15 tokens; SGLang at .* takes 10"):
        synced().generate([Request(PROMPT, 0)], SamplingParams(max_tokens=10))
    with pytest.raises(EngineError, match="request 0 has an empty prompt"):
        synced().generate([Request((), 0)], SamplingParams(max_tokens=1))


@pytest.mark.parametrize(("said", "computes"), [("auto", "float16"), ("bfloat16", "bfloat16"), ("half", "float16")])
def test_it_computes_in_what_it_says(said, computes, server, connect):
    """`auto` is half precision for a base that is stored in float32."""
    server.info["dtype"] = said
    assert connect().describe().dtype == computes


def test_reports_name_its_release(server):
    keys = RolloutKeys(engine="sglang", url=f"http://127.0.0.1:{server.server_port}")
    assert named_engine(keys) == "sglang 0.5.9"


def test_a_server_that_is_gone_or_elsewhere_or_not_named_is_an_error():
    with pytest.raises(EngineGoneError):
        named_engine(RolloutKeys(engine="sglang", url="http://127.0.0.1:9", timeout_s=2.0))
    with pytest.raises(ValueError, match=r"got a server on 10\.0\.0\.1, expected one on this machine"):
        RolloutKeys(engine="sglang", url="http://10.0.0.1:30000")
    with pytest.raises(ValueError, match=r"engine: sglang without rollout.url; start SGLang yourself"):
        RolloutKeys(engine="sglang")
