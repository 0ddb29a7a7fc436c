"""The endpoints as the openai client and plain HTTP see them, against the engine by itself."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 1 plus 2?"}]


def prompt_of(tokenizer, messages=QUESTION):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text)["input_ids"]


def text_of(tokenizer, completion):
    return tokenizer.decode([i for i in completion.ids if i not in (0, 1, 2)])


def test_a_chat_answer_is_what_the_engine_says(client, alone, tokenizer):
    for seed in range(3):
        found = client.chat.completions.create(
            model="tiny", messages=QUESTION, seed=seed, max_tokens=12, temperature=0.8, top_p=0.9
        )
        expected = alone(prompt_of(tokenizer), seed, max_tokens=12, temperature=0.8, top_p=0.9)
        assert found.choices[0].message.content == text_of(tokenizer, expected)
        assert found.choices[0].finish_reason == expected.finish
        assert found.usage.completion_tokens == len(expected.ids)
        assert found.usage.prompt_tokens == len(prompt_of(tokenizer))
        assert found.model.startswith("tiny@sha256:") and found.system_fingerprint.startswith(found.model[5:])


def test_choices_differ_by_their_number_and_are_the_same_again(client, alone, tokenizer):
    def ask():
        found = client.completions.create(model="tiny", prompt=["What", "is 3"], n=3, seed=5, max_tokens=6)
        return [choice.text for choice in found.choices]

    first = ask()
    assert ask() == first and len(set(first)) == 6
    for number, text in enumerate(first):
        prompt = tokenizer(["What", "is 3"][number // 3])["input_ids"]
        assert text == text_of(tokenizer, alone(prompt, 5, number, max_tokens=6))


def test_without_a_seed_answers_differ(client):
    asked = {"model": "tiny", "prompt": "What", "max_tokens": 8}
    assert client.completions.create(**asked).choices[0].text != client.completions.create(**asked).choices[0].text


def test_answers_do_not_depend_on_what_they_are_batched_with(client):
    def ask(seed):
        asked = {"temperature": 0.5 + seed % 3 / 2, "max_tokens": 4 + seed % 9, "seed": seed}
        if seed % 2:
            asked |= {"logprobs": 2, "top_p": 0.9}
        return client.completions.create(model="tiny", prompt="What is"[: 4 + seed % 4], **asked).choices[0]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(ask, range(32)))
    for seed, found in enumerate(together):
        one = ask(seed)
        assert (one.text, one.finish_reason) == (found.text, found.finish_reason)
        if one.logprobs:
            assert one.logprobs.token_logprobs == pytest.approx(found.logprobs.token_logprobs, abs=1e-5)


@pytest.mark.parametrize("stop", [None, ["e", "1"]])
def test_a_stream_is_the_whole_answer_in_pieces(client, stop):
    for seed in range(4):
        asked = {"model": "tiny", "messages": QUESTION, "seed": seed, "max_tokens": 24, "logprobs": True, "stop": stop}
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == whole.choices[0].message.content
        spoken = [t for c in chunks if c.choices and c.choices[0].logprobs for t in c.choices[0].logprobs.content]
        assert [t.token for t in spoken] == [t.token for t in whole.choices[0].logprobs.content]
        assert chunks[-1].usage == whole.usage
        assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices][-1] == whole.choices[0].finish_reason
        assert {c.model for c in chunks} == {whole.model}


def test_a_stop_string_ends_an_answer_and_is_not_in_it(client, alone, tokenizer):
    free = text_of(tokenizer, alone(tokenizer("What")["input_ids"], 3, max_tokens=20))
    stop = free[6:8]
    found = client.completions.create(model="tiny", prompt="What", seed=3, max_tokens=20, stop=stop).choices[0]
    assert found.text == free[: free.index(stop)]
    assert found.finish_reason == "stop"


def test_log_probs_are_the_models_at_temperature_one(client, alone, tokenizer):
    ids = tokenizer("What is")["input_ids"]
    found = client.completions.create(
        model="tiny", prompt=ids, seed=1, max_tokens=6, temperature=0.5, logprobs=3
    ).choices[0]
    greedy = client.completions.create(model="tiny", prompt=ids, max_tokens=1, temperature=0, logprobs=1).choices[0]
    assert list(greedy.logprobs.top_logprobs[0].values()) == greedy.logprobs.token_logprobs
    # At temperature 0 the engine reports log-probs at temperature 1.
    assert greedy.logprobs.token_logprobs[0] == pytest.approx(
        alone(ids, 0, max_tokens=1, temperature=0.0).logp[0], abs=1e-5
    )
    assert max(found.logprobs.top_logprobs[0].values()) == pytest.approx(greedy.logprobs.token_logprobs[0], abs=1e-5)
    assert "".join(t for t in found.logprobs.tokens if not t.startswith("bytes:")) in found.text.replace("\ufffd", "")


def test_echo_scores_the_prompt_as_lm_eval_asks_for_it(client, folder, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    ids = tokenizer("What is 1 plus 2? The answer is 3.")["input_ids"]
    found = client.completions.create(
        model="tiny", prompt=[ids], max_tokens=0, echo=True, logprobs=1, temperature=0
    ).choices[0]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logp_TV[at, token]) for at, token in enumerate(ids[1:])]
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    best = [max(top.values()) for top in found.logprobs.top_logprobs[1:]]
    assert best == pytest.approx(logp_TV[:-1].max(-1).values.tolist(), abs=1e-5)
    assert found.text == "What is 1 plus 2? The answer is 3."
    for token, at in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        assert found.text[at:].startswith(token)
    more = client.completions.create(model="tiny", prompt=ids, max_tokens=2, echo=True, logprobs=0, seed=1).choices[0]
    assert len(more.logprobs.tokens) == len(ids) + 2 and more.text.startswith(found.text)


def test_a_bias_decides_and_penalties_push_away(client, tokenizer):
    [token] = tokenizer("A")["input_ids"]
    asked = {"model": "tiny", "prompt": "What", "max_tokens": 8, "seed": 1}
    assert client.completions.create(**asked, logit_bias={str(token): 100}).choices[0].text == "A" * 8
    found = client.completions.create(**asked, logit_bias={str(token): 10}, frequency_penalty=2, temperature=0).choices[
        0
    ]
    assert "A" in found.text and found.text != "A" * 8


def test_models_are_listed_by_public_and_immutable_name(client):
    ids = [model.id for model in client.models.list()]
    assert ids[0] == "tiny" and ids[1].startswith("tiny@sha256:")
    full = "tiny@" + client.models.retrieve("tiny").digest
    for name in (ids[1], full):
        assert client.completions.create(model=name, prompt="What", max_tokens=1).model == ids[1]
    for name in ("other", "tiny@sha256:84", "tiny@sha256:" + "0" * 64):
        with pytest.raises(openai.NotFoundError, match="does not exist; there are tiny"):
            client.completions.create(model=name, prompt="What")


def test_tokenize_and_back(ask_http, tokenizer):
    found = ask_http("POST", "/tokenize", json={"prompt": "What is 1?"}).json()
    assert found == {
        "count": len(found["tokens"]),
        "max_model_len": 512,
        "tokens": tokenizer("What is 1?")["input_ids"],
    }
    assert ask_http("POST", "/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "What is 1?"}
    chat = ask_http("POST", "/tokenize", json={"messages": QUESTION}).json()
    assert chat["tokens"] == prompt_of(tokenizer)


REFUSED = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "user"}]}, "messages", "has no content"),
    ({"messages": [{"role": "king", "content": "hi"}]}, "messages.0.role", "'system', 'developer'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages.0.content.0.type",
        "messages.0.content.0.type: Input should be 'text'",
    ),
    (
        {"messages": [{"role": "user", "content": 7}]},
        "messages.0.content",
        "messages.0.content: Input should be a valid string",
    ),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "logit_bias.x: Input should be a valid integer"),
    ({"what-is-this": 1}, "what-is-this", "Unrecognized request argument supplied: what-is-this"),
    ({"tool_choice": 7}, "tool_choice", "tool_choice: Input should be"),
    ({"foo": 1}, "foo", "Unrecognized request argument supplied: foo"),
    ({"temperature": 3}, "temperature", "less than or equal to 2"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"max_tokens": 0}, None, "max_tokens: 0"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, None, "differ"),
    ({"max_tokens": 5000}, "max_tokens", "maximum context length is 512 tokens"),
    ({"messages": [{"role": "user", "content": "a b " * 400}]}, "messages", "maximum context length is 512 tokens"),
    ({"top_logprobs": 2}, None, "needs logprobs: true"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "token 9999"),
    ({"stop": [""]}, "stop.0", "at least 1 character"),
    ({"n": 500}, "n", "less than or equal to 128"),
    ({"stream_options": {}}, None, "stream_options is for stream: true"),
    ({"functions": []}, "functions", "Unrecognized request argument supplied: functions"),
    ({"audio": {}}, "audio", "Unrecognized"),
    ({"store": True}, "store", "False"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema goes with"),
]


@pytest.mark.parametrize(("fields", "param", "said"), REFUSED, ids=[str(list(f))[:40] for f, _, _ in REFUSED])
def test_what_is_not_done_is_refused_in_openais_form(ask_http, fields, param, said):
    answer = ask_http("POST", "/v1/chat/completions", json={"model": "tiny", "messages": QUESTION, **fields})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert said in error["message"]
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", rb'{"model":"tiny","prompt":"\ud800 a"}'),
        ("/v1/completions", rb'{"model":"\ud800","prompt":"a"}'),
        ("/v1/completions", rb'{"model":"tiny","prompt":"a","top_k":99999999999999999999}'),
        ("/v1/completions", rb'{"model":"tiny","prompt":"a","stop_token_ids":[99999999999999999999]}'),
        ("/v1/completions", rb'{"model":"tiny","prompt":"a","temperature":NaN}'),
        ("/v1/chat/completions", rb'{"model":"tiny","messages":[{"role":"user","content":"\udfff"}]}'),
        (
            "/v1/chat/completions",
            rb'{"model":"tiny","messages":[{"role":"user","content":[{"type":"text","text":"\ud800"}]}]}',
        ),
        ("/tokenize", rb'{"prompt":"\ud800"}'),
        ("/v1/completions", b"[1"),
    ],
)
def test_text_and_numbers_that_no_model_takes_are_the_clients_mistake(ask_http, path, body):
    answer = ask_http("POST", path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    param = answer.json()["error"]["param"]
    assert param is None or all(step.isdecimal() or step.isidentifier() for step in param.split(".")), param


def test_other_endpoints_of_openais_are_refused_with_those_that_are_there(ask_http):
    for path in ("embeddings", "responses", "moderations", "audio/speech", "images/generations"):
        answer = ask_http("POST", f"/v1/{path}", json={"model": "tiny", "input": "a"})
        assert answer.status_code == 404
        said = answer.json()["error"]["message"]
        assert f"this server has no /v1/{path}; it has " in said and "/v1/chat/completions" in said


def test_a_long_text_is_tokenised_while_others_are_answered(ask_http, serving):
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(ask_http, "POST", "/tokenize", json={"prompt": "a" * 3_000_000})
        time.sleep(0.5)
        assert httpx.get(f"{serving.address}/health", timeout=60).status_code == 200
        assert not slow.done()
        assert slow.result().status_code == 200


def test_other_mistakes_have_their_status_and_the_same_form(ask_http):
    json_type = {"content-type": "application/json"}
    cases = [
        (ask_http("GET", "/v1/nothing"), 404),
        (ask_http("GET", "/v1/completions"), 405),
        (ask_http("POST", "/v1/completions", content=b"{", headers=json_type), 400),
        (ask_http("POST", "/v1/completions", content=b"[" * 100_000, headers=json_type), 400),
        (ask_http("POST", "/v1/completions", json={"prompt": "a"}), 400),
        (ask_http("POST", "/v1/completions", json={"model": "tiny", "prompt": ""}), 400),
        (ask_http("POST", "/v1/completions", json={"model": "tiny", "prompt": [700]}), 400),
        (ask_http("POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "suffix": "b"}), 400),
        (ask_http("POST", "/v1/completions", json={"model": "tiny", "prompt": "a", "best_of": 3}), 400),
    ]
    for answer, status in cases:
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def test_metrics_count_what_was_asked(client, ask_http):
    def value(line):
        page = ask_http("GET", "/metrics").text
        return next((float(row.rsplit(" ", 1)[1]) for row in page.splitlines() if row.startswith(line)), 0.0)

    line = 'posttrain_serve_requests_total{endpoint="completions",status="200"}'
    before = value(line)
    client.completions.create(model="tiny", prompt="What", max_tokens=2)
    assert value(line) == before + 1
    assert value("posttrain_serve_decoding") == 0
    assert ask_http("GET", "/health").json() == {"status": "ok", "follows": True}


def test_events_are_what_curl_sees(ask_http):
    asked = {"model": "tiny", "prompt": "What", "max_tokens": 3, "stream": True, "seed": 1}
    answer = ask_http("POST", "/v1/completions", json=asked)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = [line for line in answer.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])
