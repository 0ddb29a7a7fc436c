"""The server follows the registry: a promotion or a rollback swaps versions, and no answer is dropped or mixed."""

import shutil
import threading
import time
from contextlib import closing

import httpx
import pytest

from posttrain import evidence
from posttrain.errors import PosttrainError
from posttrain.evidence import GateVerdict, Verdict
from posttrain.files import digest_bytes, digest_tree
from posttrain.registry import Manifest, Registry
from posttrain.serve.setup import ServedNames

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
def registered(tmp_path, model_dir, make_model_in):
    """A registry of `tiny` with two versions of other weights, the first its champion; their digests."""
    import torch
    from safetensors.torch import load_file, save_file

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


def test_a_promotion_and_a_rollback_swap_the_champion_and_no_answer_is_dropped_or_mixed(running, registered):
    registry, (first, second) = registered
    with running(ServedNames(["tiny"], registry)) as serving, closing(Registry(registry)) as book:
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


def test_names_of_a_registry(running, registered):
    registry, (first, second) = registered
    with running(ServedNames(["tiny", "tiny@2"], registry)) as serving:
        found = names(serving)
        assert {name: digest for name, digest in found.items() if "sha256" not in name} == {
            "tiny": first, "tiny@champion": first, "tiny@1": first, "tiny@2": second,
        }  # fmt: skip
        for name, digest in found.items():
            answer = httpx.post(
                serving.address + "/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1}
            )
            assert answer.json()["system_fingerprint"] == digest


def test_a_damaged_version_opens_no_port(running, registered):
    registry, (first, _) = registered
    with closing(Registry(registry)) as book:
        path = book.store.object_path(book.store.tree(first)["model.safetensors"])
    path.chmod(0o644)
    with open(path, "r+b") as handle:
        handle.seek(2000)
        handle.write(b"\xff\xff")
    with pytest.raises(PosttrainError, match="content has changed"), running(ServedNames(["tiny"], registry)):
        pass


def test_a_damaged_promotion_leaves_the_champion_where_it_is_and_says_so(running, registered):
    registry, (first, second) = registered
    with running(ServedNames(["tiny"], registry)) as serving, closing(Registry(registry)) as book:
        book.promote("tiny", 2, "champion", passing(second, first))
        until(lambda: names(serving)["tiny"] == second)
        book.rollback("tiny", "champion", "back")
        until(lambda: names(serving)["tiny"] == first)
        config = registry / "models" / second.removeprefix("sha256:") / "config.json"
        config.chmod(0o644)
        config.write_text("{}")
        epoch = book.alias_epoch("tiny", "champion")
        book.rows.set_alias("tiny", "champion", 2, 1, epoch + 1, None)
        until(lambda: serving.service.router.trouble)
        assert httpx.get(serving.address + "/health").json() == {"status": "ok", "follows": False}
        assert names(serving)["tiny"] == names(serving)["tiny@champion"] == first
        for model in ("tiny", "tiny@champion"):
            body = {"model": model, "prompt": "a", "max_tokens": 1}
            answer = httpx.post(serving.address + "/v1/completions", json=body)
            assert answer.json()["system_fingerprint"] == first


@pytest.mark.parametrize(
    ("served", "wanted"), [("tiny@champion", "tiny"), ("tiny", "tiny@champion"), ("tiny@1", "tiny")]
)
def test_what_is_served_under_one_reference_is_asked_for_by_the_name_alone(running, registered, served, wanted):
    registry, (first, _) = registered
    with running(ServedNames([served], registry)) as serving:
        body = {"model": wanted, "prompt": "a", "max_tokens": 1}
        answer = httpx.post(serving.address + "/v1/completions", json=body)
        assert answer.status_code == 200 and answer.json()["system_fingerprint"] == first
        other = httpx.post(serving.address + "/v1/completions", json={**body, "model": "tiny@2"})
        assert other.status_code == 404


@pytest.mark.parametrize(("model", "said"), [("other", "names nothing"), ("tiny@9", "no tiny@9")])
def test_what_is_not_registered_is_said_before_the_port_opens(running, registered, model, said):
    with pytest.raises(PosttrainError, match=said), running(ServedNames([model], registered[0])):
        pass


def test_no_registry_is_said_before_the_port_opens(running, tmp_path):
    with pytest.raises(PosttrainError, match="got no registry here"), running(ServedNames(["tiny"], tmp_path / "none")):
        pass
