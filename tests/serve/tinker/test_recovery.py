"""Requests that come twice, out of order, or to a server that was killed: nothing is done twice, nothing is lost in silence."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest
import tinker
from safetensors.torch import load_file
from tinker.proto import tinker_public_pb2 as pb
from tinker.proto.request_conv import forward_backward_request_to_proto

from posttrain.recipes.tinker_saves import find_state
from posttrain.serve.tinker.journal import Journal

ADAM = tinker.AdamParams(learning_rate=1e-2)
ROWS = [(5, 9, 40, 41, 7), (11, 12, 13)]


# --- bare requests ---


def post(serving, path, body):
    return httpx.post(f"{serving.address}/api/v1/{path}", json=body, timeout=60)


def pass_body(model_id, seq, data):
    asked = tinker.types.ForwardBackwardRequest(
        forward_backward_input=tinker.types.ForwardBackwardInput(data=data, loss_fn="cross_entropy"), model_id=model_id, seq_id=seq
    )  # fmt: skip
    return forward_backward_request_to_proto(asked).SerializeToString()


def post_pass(serving, model_id, seq, data):
    headers = {"content-type": "application/x-protobuf"}
    body = pass_body(model_id, seq, data)
    return httpx.post(f"{serving.address}/api/v1/forward_backward", content=body, headers=headers, timeout=60)


def result(serving, accepted):
    return post(serving, "retrieve_future", {"request_id": accepted.json()["request_id"]})


def loss(answer):
    return pb.ForwardBackwardOutput.FromString(answer.content).metrics["loss:sum"]


def made(serving, session="session-bare", number=0):
    body = {"session_id": session, "model_seq_id": number, "base_model": "tiny", "lora_config": {"rank": 4, "seed": 3}}
    accepted = post(serving, "create_model", body)
    return result(serving, accepted).json()["model_id"]


def step_body(model_id, seq):
    return {"model_id": model_id, "seq_id": seq, "adam_params": {"learning_rate": 1e-2}}


def test_a_request_that_comes_again_is_the_same_request(serving, datum):
    model_id = made(serving, "session-again")
    assert made(serving, "session-again") == model_id
    data = [datum(row) for row in ROWS]
    first = [post_pass(serving, model_id, 1, data) for _ in range(3)]
    steps = [post(serving, "optim_step", step_body(model_id, 2)) for _ in range(3)]
    assert {answer.json()["request_id"] for answer in first} == {f"{model_id}:1"}
    results = [result(serving, answer).content for answer in first]
    assert len(set(results)) == 1
    metrics = [result(serving, answer).json()["metrics"] for answer in steps]
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0]["loss_tokens"] == sum(len(row) - 1 for row in ROWS)  # once
    assert serving.service.shelf.find(model_id).tenant.step == 1
    other = post_pass(serving, model_id, 1, data[:1])
    assert other.status_code == 400
    assert "request 1 forward_backward of" in other.text
    assert "came before with other content" in other.text


def test_requests_are_computed_in_the_order_of_their_numbers(serving, datum):
    model_id = made(serving, "session-order")
    late = post(serving, "optim_step", step_body(model_id, 3))
    second = post_pass(serving, model_id, 2, [datum(ROWS[1])])
    time.sleep(0.2)
    assert serving.service.shelf.find(model_id).tenant.step == 0
    first = post_pass(serving, model_id, 1, [datum(ROWS[0])])
    assert result(serving, late).json()["metrics"]["loss"] == pytest.approx(
        loss(result(serving, first)) + loss(result(serving, second)), rel=1e-6
    )
    assert post_pass(serving, model_id, 0, []).status_code == 400


def test_a_body_that_is_none_of_the_schema_is_refused(serving, datum):
    model_id = made(serving, "session-bodies")
    url = f"{serving.address}/api/v1/forward_backward"
    body = pass_body(model_id, 1, [datum(ROWS[0])])
    proto = {"content-type": "application/x-protobuf"}
    assert httpx.post(url, content=b"\xff\xff\xff", headers=proto).status_code == 400
    assert httpx.post(url, content=body, headers={"content-type": "application/json"}).status_code == 415
    assert httpx.post(url, content=body, headers=proto | {"content-encoding": "zstd"}).status_code == 415
    unknown = post(serving, "optim_step", step_body(model_id, 1) | {"momentum": 1})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "momentum")
    assert post(serving, "optim_step", step_body("session-nobody:train:0", 1)).status_code == 404
    assert post(serving, "retrieve_future", {"request_id": "nobody:1"}).status_code == 410
    wrong = post(serving, "create_model", {"session_id": "../x", "model_seq_id": 0, "base_model": "tiny"})
    assert (wrong.status_code, "session_id: got '../x'" in wrong.text) == (400, True)
    outside = {"session_id": "../../x", "sampling_session_seq_id": 0, "base_model": "tiny"}
    assert "session_id: got '../../x-sample-0'" in post(serving, "create_sampling_session", outside).text
    base = post(serving, "create_model", {"session_id": "session-x", "model_seq_id": 0, "base_model": "big"})
    assert "base_model: got 'big', this server has tiny, tied" in base.text


# --- a server that is killed ---


class Killable:
    """`posttrain tinker` in a process of its own, on the same port whenever it is started."""

    def __init__(self, base, folder):
        self.base, self.folder, self.port = base, folder, 0

    def __enter__(self):
        code = "from posttrain.cli.app import main; main()"
        arguments = ["tinker", f"tiny={self.base}", "--out", str(self.folder), "--port", str(self.port)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, env=environment
        )
        for line in self.process.stderr:
            if line.startswith("listening at "):
                self.address = line.split()[-1]
                self.port = int(self.address.rpartition(":")[2])
                return self
        raise AssertionError(f"it ended with {self.process.wait()}")

    def kill(self, signum=signal.SIGKILL):
        self.process.send_signal(signum)
        self.process.stderr.close()
        return self.process.wait(60)

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.kill()


def steps(training, datum, number):
    for _ in range(number):
        training.forward_backward([datum(row) for row in ROWS], "cross_entropy").result()
        training.optim_step(ADAM).result()


def weights_at(folder, path):
    model, kind, name = path.removeprefix("tinker://").split("/")
    return load_file(find_state(folder / model.replace(":", "-") / kind / name).folder / "weights.safetensors")


def equal(left, right):
    return left.keys() == right.keys() and all(left[name].equal(right[name]) for name in left)


def test_a_server_started_again_names_what_is_in_no_save(running, bases, client_of, tmp_path, datum):
    """The short form of the kill below: the process stays, its memory goes."""
    with running(bases, tmp_path) as serving:
        client = client_of(serving)
        kept, gone = (client.create_lora_training_client(base_model="tiny", rank=4, seed=s).result() for s in (3, 4))
        steps(kept, datum, 1)
        steps(gone, datum, 1)
        path = [training.save_state("one").result().path for training in (kept, gone)][1]
        gone.save_weights_for_sampler("one").result()
        steps(gone, datum, 1)
        ids = kept.model_id, gone.model_id
        again = client.create_training_client_from_state(path).result().model_id
    with running(bases, tmp_path) as serving:
        assert result(serving, post(serving, "optim_step", step_body(ids[1], 7))).json()["error"] == (
            f"the server, or the session, ended with requests of {ids[1]} in no save, and they are lost: "
            f"5 forward_backward, 6 optim_step. This model cannot go on; begin from "
            f"create_training_client_from_state_with_optimizer('{path}'), the state of request 3"
        )
        assert result_of(serving, ids[1], 6)["error"].startswith("request 6 optim_step is lost.")
        assert result_of(serving, ids[1], 4)["path"].endswith("/sampler_weights/one")
        assert result_of(serving, ids[0], "create") == {"model_id": ids[0], "type": "create_model"}
        assert result_of(serving, again, "create") == {"model_id": again, "path": path, "type": "load_weights"}
        passed = post_pass(serving, ids[0], 4, [datum(row) for row in ROWS])
        assert loss(result(serving, passed)) > 0
        assert result(serving, post(serving, "optim_step", step_body(ids[0], 5))).json()["metrics"]["loss_tokens"] == 6
        assert serving.service.shelf.find(ids[0]).tenant.step == 2


@pytest.mark.slow
def test_after_a_kill_what_was_saved_goes_on_and_what_was_not_is_named(bases, tmp_path, client_of, datum):
    server = Killable(bases["tiny"], tmp_path)
    with server:
        client = client_of(server.address)
        kept, gone = (
            client.create_lora_training_client(base_model="tiny", rank=4, seed=seed).result() for seed in (3, 4)
        )
        steps(kept, datum, 2)
        steps(gone, datum, 2)
        kept_path, path = kept.save_state("two").result().path, gone.save_state("two").result().path
        sampled = kept.save_weights_for_sampler("two").result().path
        steps(gone, datum, 1)  # requests 6 and 7, acknowledged and in no save
        assert server.kill() == -signal.SIGKILL
    two = weights_at(tmp_path, path)
    with server:
        # The client that lost nothing does not notice; its third step is that of a run that was never killed.
        steps(kept, datum, 1)
        third = kept.save_state("three").result().path
        for request in (
            lambda: gone.optim_step(ADAM),
            lambda: gone.forward_backward([datum(ROWS[0])], "cross_entropy"),
            lambda: gone.save_state("three"),
        ):
            with pytest.raises(tinker.RequestFailedError) as caught:
                request().result()
            said = str(caught.value)
            assert "they are lost: 6 forward_backward, 7 optim_step." in said
            assert f"create_training_client_from_state_with_optimizer('{path}'), the state of request 5" in said
        told = post(server, "retrieve_future", {"request_id": f"{gone.model_id}:7"}).json()
        assert told["error"].startswith("request 7 optim_step is lost.")
        done = post(server, "retrieve_future", {"request_id": f"{gone.model_id}:5"}).json()
        assert done["path"] == path
        assert equal(weights_at(tmp_path, path), two)
        again = client.create_training_client_from_state_with_optimizer(path).result()
        steps(again, datum, 1)
        whole = client.create_lora_training_client(base_model="tiny", rank=4, seed=4).result()
        steps(whole, datum, 3)
        assert equal(*(weights_at(tmp_path, t.save_state("three").result().path) for t in (again, whole)))
        never = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        steps(never, datum, 3)
        assert equal(weights_at(tmp_path, third), weights_at(tmp_path, never.save_state("three").result().path))
        asked = client.create_sampling_client(model_path=sampled).result()
        prompt = tinker.ModelInput.from_ints([5, 9])
        assert asked.sample(prompt, 1, tinker.SamplingParams(max_tokens=2)).result().sequences[0].tokens
        assert kept_path != third
        assert server.kill(signal.SIGTERM) == 0


def test_gradients_that_were_saved_come_back(running, bases, client_of, tmp_path, datum):
    with running(bases, tmp_path) as serving:
        with client_of(serving) as client:
            whole = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
            steps(whole, datum, 1)
            expected = weights_at(tmp_path, whole.save_state("one").result().path)
        client = client_of(serving)
        training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        training.forward_backward([datum(row) for row in ROWS], "cross_entropy").result()
        training.save_state("half").result()
        serving.service.shelf.find(training.model_id).leave_memory()
        training.optim_step(ADAM).result()
        assert equal(weights_at(tmp_path, training.save_state("one").result().path), expected)


def test_a_save_whose_note_the_kill_took_is_found_by_its_seal(running, bases, client_of, tmp_path, datum):
    with running(bases, tmp_path) as serving, client_of(serving) as client:
        training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        steps(training, datum, 1)
        training.save_state("one").result()
        model_id = training.model_id
    journal = tmp_path / model_id.replace(":", "-") / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert '"result": {"path"' in lines[-1]
    journal.write_text("".join(lines[:-1]) + '{"seq": 4, "ki')  # torn, as a machine without power leaves it
    with running(bases, tmp_path) as serving:
        assert serving.service.shelf.find(model_id).lost == ""
        assert result_of(serving, model_id, 3)["path"].endswith("/weights/one")
    assert Journal(journal).last_save.seq == 3


def result_of(serving, model_id, seq):
    return post(serving, "retrieve_future", {"request_id": f"{model_id}:{seq}"}).json()


def test_a_request_that_read_only_is_not_in_the_way_of_going_on(running, bases, client_of, tmp_path, datum):
    with running(bases, tmp_path) as serving:
        client = client_of(serving)
        training = client.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()
        steps(training, datum, 1)
        training.save_state("one").result()
        training.forward([datum(ROWS[0])], "cross_entropy").result()
        model = serving.service.shelf.find(training.model_id)
        model.leave_memory()
        model.journal.accept(5, "forward", "sha256:of a request that was under way")
        assert not model.lost
        assert "was done and is in its state" in model.failure_of(4)
        assert f"request 5 forward of {model.id} is lost: the server ended before it was done" in model.failure_of(5)
        assert model.failure_of(9).endswith("never got a request 9")


def test_models_make_room_only_where_nothing_is_lost(running, bases, client_of, tmp_path, datum):
    with running(bases, tmp_path, max_models=2) as serving, client_of(serving) as client:
        first, second = (client.create_lora_training_client(base_model="tiny", rank=4, seed=s).result() for s in (3, 4))
        steps(first, datum, 1)
        first.save_state("one").result()
        steps(second, datum, 1)
        third = client.create_lora_training_client(base_model="tiny", rank=4, seed=5).result()
        shelf = serving.service.shelf
        assert shelf.present(first.model_id) is None
        steps(third, datum, 1)
        with pytest.raises(
            tinker.RequestFailedError, match="2 models are in memory, as many as may be, and each has steps in no"
        ):
            first.forward([datum(ROWS[0])], "cross_entropy").result()
        second.save_state("one").result()
        steps(first, datum, 1)  # comes back, and goes on
        assert shelf.present(first.model_id).tenant.step == 2
        assert shelf.present(second.model_id) is None
