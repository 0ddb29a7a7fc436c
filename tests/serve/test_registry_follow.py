"""The server follows the registry: a promotion or a rollback swaps versions, and no answer is dropped or mixed."""

import os
from contextlib import closing

import httpx
import pytest

from posttrain.errors import PosttrainError, RunLockedError
from posttrain.files import digest_bytes, nobody_reading
from posttrain.registry import Manifest, Registry
from posttrain.registry.upkeep import remove_version
from posttrain.serve.setup import ServedNames

BASE = digest_bytes(b"base weights")


def test_a_promotion_and_a_rollback_swap_the_champion_and_no_answer_is_dropped_or_mixed(running, registered, following):
    with running(ServedNames(["tiny"], registered[0])) as serving:
        following.promote_and_roll_back(serving, *registered)


def test_names_of_a_registry(running, registered, following):
    registry, (first, second) = registered
    with running(ServedNames(["tiny", "tiny@2"], registry)) as serving:
        found = following.names(serving)
        assert {name: digest for name, digest in found.items() if "sha256" not in name} == {
            "tiny": first, "tiny@champion": first, "tiny@1": first, "tiny@2": second,
        }  # fmt: skip
        for name, digest in found.items():
            answer = httpx.post(
                serving.address + "/v1/completions", json={"model": name, "prompt": "a", "max_tokens": 1}
            )
            assert answer.json()["system_fingerprint"] == digest


def test_a_folder_that_is_served_stays_where_it_is_until_no_name_means_it(
    running, registered, following, make_adapter, folder
):
    registry, (first, second) = registered
    one, two = (Registry(registry).find(f"tiny@{n}").path for n in (1, 2))
    adapter = make_adapter(registry.parent / "adapter", folder, 1)

    def is_read(place):
        try:
            with nobody_reading(place):
                return False
        except RunLockedError:  # its reader may be gone by the time that it is looked for
            return True

    with running(ServedNames(["tiny"], registry)), closing(Registry(registry)) as book:
        with pytest.raises(RunLockedError, match=f"is read by process {os.getpid()}"), nobody_reading(one):
            pass
        assert is_read(one) and not is_read(two)
        book.promote("tiny", 2, "champion", following.passing(second, first))
        following.until(lambda: is_read(two) and not is_read(one))
    with running(ServedNames([str(folder)], registry, loras={"math": adapter}, name="base")):
        assert is_read(folder) and is_read(adapter)
    assert not is_read(two) and not is_read(adapter)


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


def test_a_damaged_promotion_leaves_the_champion_where_it_is_and_says_so(running, registered, following):
    registry, (first, second) = registered
    passing, until, names = following.passing, following.until, following.names
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
        book.rows.set_alias("tiny", "champion", 1, None, epoch + 2, None)
        until(lambda: httpx.get(serving.address + "/health").json() == {"status": "ok", "follows": True})


def test_a_version_that_was_removed_goes_on_under_its_number_and_the_other_names_follow(running, registered, following):
    registry, (first, second) = registered
    passing, until, names = following.passing, following.until, following.names
    with running(ServedNames(["tiny", "tiny@2"], registry)) as serving, closing(Registry(registry)) as book:
        remove_version(book, "tiny", 2, "wrong data")
        until(lambda: serving.service.router.trouble)
        assert "no tiny@2" in serving.service.router.trouble["tiny@2"]
        assert (names(serving)["tiny@2"], names(serving)["tiny"]) == (second, first)
        manifest = Manifest("sft", {"model": BASE, "data": first}, {"model": second})
        again = book.register("tiny", registry.parent / "model-1", [manifest])
        book.promote("tiny", again.version, "champion", passing(second, first))
        until(lambda: names(serving)["tiny"] == names(serving)["tiny@champion"] == second)


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
