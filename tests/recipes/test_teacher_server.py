# pyright: reportMissingImports=false
"""A teacher behind a real server of ours: the same lessons as from the model in this process, another vocabulary refused."""

from importlib.util import find_spec

import numpy as np
import pytest

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client")):
    pytest.skip("a server needs posttrain[serve]", allow_module_level=True)

import json

from tests.serving import serving

from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import ConfigError, EngineGoneError, ModelError
from posttrain.models.load import load_policy
from posttrain.recipes.teacher_server import ServerScorer
from posttrain.recipes.teachers import Teachers
from posttrain.rollout.http import Address, Client
from posttrain.types import Origin, Prompt, Sample


def sample(*ids, prompt=3):
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= prompt)


LESSONS = [
    (
        Prompt(Origin("rows.jsonl", 1), "1 plus 2?", {"answer": "3"}),
        (sample(5, 6, 7, 8, 9), sample(5, 6, 7, 10, 11, 12)),
    ),
    (Prompt(Origin("rows.jsonl", 2), "2 plus 2?", {"answer": "4"}), (sample(15, 16, 17, 18, 255, 254, 20),)),
]


@pytest.fixture(scope="module")
def folder(make_model_in, tmp_path_factory):
    return make_model_in(tmp_path_factory.mktemp("served") / "teacher", "qwen3", initializer_range=0.2)


@pytest.fixture(scope="module")
def url(folder):
    with serving(folder) as address:
        yield address


def test_a_server_teaches_what_its_model_does_here(url, folder, runner, model_dir, data_dir):
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir)
    policy = load_policy(keys).without_dropout()
    found = []
    for teacher in (
        {"model": "teacher", "url": url},
        {"model": str(folder)},
        {"model": "teacher", "url": url, "prompt": "{prompt} {answer}"},
    ):
        keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, teachers=[teacher])
        found.append(Teachers.of(keys.teachers, keys, policy, SingleProcess()).logp(LESSONS))
    for served, here, hinted in zip(*found, strict=True):
        np.testing.assert_allclose(served, here, rtol=1e-4, atol=1e-4)
        assert np.abs(hinted - here).max() > 1e-2


@pytest.mark.parametrize("kind", ["grpo", "distill"])
def test_a_run_is_taught_by_a_server_as_by_a_folder(kind, url, folder, train, runner):
    served, here = (
        runner.rows(train(kind, max_steps=2, learning_rate=1e-4, teachers=[teacher]))
        for teacher in ({"model": "teacher", "url": url}, {"model": str(folder)})
    )
    for a, b in zip(served, here, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_another_vocabulary_behind_a_server_is_refused_by_its_digest(make_local_model, runner, model_dir, data_dir):
    other = make_local_model("qwen3")
    path = other / "tokenizer.json"
    body = json.loads(path.read_text())
    vocab = body["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    path.write_text(json.dumps(body))
    with serving(other) as address:
        keys = runner.keys_of("distill", model_dir("qwen3"), data_dir, teachers=[{"model": "teacher", "url": address}])
        with pytest.raises(
            ModelError, match=r"teachers\.0: teacher at .* has another vocabulary \(digest [0-9a-f]{12}…\)"
        ):
            Teachers.of(keys.teachers, keys, load_policy(keys), SingleProcess())


def test_a_server_without_the_model_or_that_is_gone_is_named(url, runner, model_dir, data_dir):
    policy = load_policy(runner.keys_of("grpo", model_dir("qwen3"), data_dir))

    def asked(**teacher):
        keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, teachers=[teacher])
        return Teachers.of(keys.teachers, keys, policy, SingleProcess())

    with pytest.raises(ModelError, match=r"cannot say what the policy.s 288 token ids mean.*absent"):
        asked(model="absent", url=url)
    with pytest.raises(EngineGoneError, match=r"127\.0\.0\.1:9"):
        asked(model="teacher", url="http://127.0.0.1:9")


def test_log_probs_that_are_not_one_a_token_are_refused():
    scorer = ServerScorer(Client(Address("127.0.0.1", 9)), "teacher")
    for logprobs in ([None, -1.0, -1.0], [None, -1.0, -1.0, None, -1.0]):
        with pytest.raises(ModelError, match="expected one each, from a server that echoes token ids"):
            scorer._of_one(sample(5, 6, 7, 8, 9), logprobs)


@pytest.mark.parametrize(
    ("kind", "teacher", "options", "why"),
    [
        ("grpo", {"url": "https://example.org"}, {}, "of this machine"),
        ("grpo", {"revision": "main"}, {}, "the server loads its own model"),
        ("grpo", {"model": "policy"}, {}, "that is the policy itself"),
        ("grpo", {"url": None, "token_env": "KEY"}, {}, "is of a server, and url is not set"),
        ("grpo", {}, {"temperature": 0.7}, "are those of temperature 1"),
        ("distill", {}, {"loss_type": "jsd"}, "a server caps how many it gives"),
        ("distill", {}, {"teacher_top_k": 8}, "a server caps how many it gives"),
    ],
)
def test_what_a_server_cannot_teach_is_refused(kind, teacher, options, why, runner, model_dir, data_dir):
    given = {"model": "teacher", "url": "http://127.0.0.1:8000"} | teacher
    with pytest.raises((ConfigError, ValueError), match=why):
        runner.keys_of(kind, model_dir("qwen3"), data_dir, teachers=[given], **options)
