"""Who may ask, and how much; and what the end of a server does with what it let in."""

import threading

import httpx
import pytest
import tinker

from posttrain.errors import ConfigError, RunLockedError
from posttrain.serve.options import ServeOptions
from posttrain.serve.tinker.options import TinkerOptions, named_models

ADAM = tinker.AdamParams(learning_rate=1e-2)


def test_a_client_needs_the_token(running, bases, client_of, tmp_path):
    with running(bases, tmp_path, serve={"token": "tml-sesame"}) as serving:
        for headers in ({}, {"x-api-key": "tml-open"}, {"authorization": "Bearer tml-open"}):
            answer = httpx.get(f"{serving.address}/api/v1/get_server_capabilities", headers=headers)
            assert answer.status_code == 401
        both = {"authorization": "Bearer tml-sesame", "x-api-key": "of a proxy"}
        assert httpx.get(f"{serving.address}/api/v1/get_server_capabilities", headers=both).status_code == 200
        with pytest.raises(tinker.AuthenticationError):
            tinker.RestClient(base_url=serving.address, api_key="tml-open").get_server_capabilities().result()
        rest = tinker.RestClient(base_url=serving.address, api_key="tml-sesame")
        found = rest.get_server_capabilities().result().supported_models
        assert [(m.model_name, m.max_context_length, m.trainable) for m in found] == [
            ("tiny", 512, True),
            ("tied", 512, True),
        ]


def test_without_a_token_only_localhost_is_answered_and_none_but_the_sdks_is_taken(serving, tmp_path):
    answer = httpx.get(f"{serving.address}/api/v1/healthz", headers={"host": "evil.example"})
    assert answer.status_code == 403
    for options, message in (
        (ServeOptions(host="0.0.0.0"), "reachable from other machines; give a token"),
        (ServeOptions(token="sesame"), "the token does not begin with tml-"),
    ):
        with pytest.raises(ConfigError, match=message):
            TinkerOptions({"tiny": "x"}, tmp_path, options).check()


def test_one_request_too_many_is_told_429_and_one_too_large_413(running, bases, client_of, tmp_path, datum):
    with (
        running(bases, tmp_path, serve={"max_queue": 1, "max_body_bytes": 2000}) as serving,
        client_of(serving) as client,
    ):
        training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        busy, release = threading.Event(), threading.Event()

        def hold():
            busy.set()
            release.wait(30)

        serving.service.queue._thread.submit(hold)
        assert busy.wait(30)
        first = training.forward_backward([datum((5, 9, 40))], "cross_entropy")
        url, body = f"{serving.address}/api/v1/optim_step", {"model_id": training.model_id, "seq_id": 2}
        while serving.service.num_open == 0:
            pass
        answer = httpx.post(url, json=body | {"adam_params": {}})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        second = training.optim_step(ADAM)  # the SDK waits for its place
        release.set()
        assert first.result().metrics["loss:sum"] > 0
        assert second.result().metrics["grad_norm"] > 0
        assert httpx.post(url, content=b"x" * 2001).status_code == 413
        # What the SDK sends at once follows from that limit: many datums go in several requests.
        rows = [datum(range(3, 40)) for _ in range(5)]
        passed = training.forward_backward(rows, "cross_entropy").result()
        assert len(passed.loss_fn_outputs) == 5
        assert training.optim_step(ADAM).result().metrics["loss_tokens"] == 5 * 36


def test_what_was_let_in_is_done_before_the_end_and_nothing_more_is(running, bases, client_of, tmp_path, datum):
    with running(bases, tmp_path) as serving:
        client = client_of(serving)
        training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        for _ in range(20):
            training.forward_backward([datum((5, 9, 40))], "cross_entropy")
            step = training.optim_step(ADAM)
        saved = training.save_state("last")
        while serving.service.shelf.find(training.model_id).journal.last < 41:
            pass
        serving.stop()
        assert saved.result().path.endswith("/weights/last")
        assert step.result().metrics["loss_tokens"] == 2


def test_two_servers_do_not_share_a_folder(running, bases, tmp_path):
    with (
        running(bases, tmp_path),
        pytest.raises(RunLockedError, match="is in use by process"),
        running(bases, tmp_path),
    ):
        pass


def test_names_of_bases_are_what_clients_ask_for(tmp_path):
    folder = tmp_path / "03-grpo" / "model"
    folder.mkdir(parents=True)
    assert named_models(["org/base", f"mine={folder}", str(folder)]) == {
        "org/base": "org/base", "mine": str(folder), "03-grpo": str(folder),
    }  # fmt: skip
    for wrong, message in (
        (["a=x", "a=y"], "a names two models"),
        (["=x"], "expected a folder, a hub id, or NAME=FOLDER"),
    ):
        with pytest.raises(ConfigError, match=message):
            named_models(wrong)
