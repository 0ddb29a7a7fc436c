import sys
from dataclasses import replace
from importlib import metadata

import pytest

from posttrain.errors import RegistryError
from posttrain.files import digest_bytes, digest_json
from posttrain.registry import Manifest, check_chain, environment_pins


def test_a_chain_holds_and_each_link_is_its_digest(lineage, model):
    chain = lineage(model("a"), ("sft", "dpo", "grpo"))
    check_chain(chain)
    assert chain[2].parent == chain[1].digest
    assert Manifest.from_json(chain[2].to_json()) == chain[2]


def test_any_change_upstream_changes_every_digest_below(lineage, model):
    chain = lineage(model("a"), ("sft", "dpo"))
    changed = replace(chain[0], details={"learning_rate": 2e-3})
    assert chain[1].after(changed).digest != chain[1].digest
    assert chain[1].after(chain[0]) == chain[1]


def test_broken_chains_say_where(lineage, model):
    chain = lineage(model("a"), ("sft", "dpo"))
    with pytest.raises(RegistryError, match="got no manifest"):
        check_chain([])
    with pytest.raises(RegistryError, match="manifest of dpo: got parent"):
        check_chain([replace(chain[0], stage="other"), chain[1]])
    with pytest.raises(RegistryError, match="manifest of dpo: got parent"):
        check_chain(chain[1:])
    elsewhere = replace(chain[1], inputs={"model": digest_bytes(b"elsewhere")})
    with pytest.raises(RegistryError, match=r"dpo starts from .* but sft made .* a stage is missing"):
        check_chain([chain[0], elsewhere])
    with pytest.raises(RegistryError, match="must both name 'model'"):
        check_chain([replace(chain[0], outputs={})])


def test_environment_pins_are_those_of_this_process():
    pins = environment_pins(["numpy"])
    assert pins["python"] == ".".join(map(str, sys.version_info[:3]))
    assert pins["packages"] == {"numpy": metadata.version("numpy")}
    assert environment_pins()["packages"]["numpy"] == metadata.version("numpy")
    assert pins["cpu"]["model"] or pins["machine"]


def test_a_manifest_from_before_it_said_so_keeps_its_digest_and_needs_a_certificate_if_it_was_grpo():
    """The digest is of the record as it was stored, without `rewarded`."""
    record = {"stage": "grpo", "inputs": {"model": "a"}, "outputs": {"model": "b"}, "parent": None, "details": {}}
    stored = Manifest.from_json(record)
    assert stored.to_json() == record and stored.digest == digest_json(record)
    assert stored.needs_certificate and not Manifest.from_json(record | {"stage": "sft"}).needs_certificate


@pytest.mark.parametrize("rewarded", [True, False])
def test_a_manifest_says_itself_whether_its_model_needs_a_certificate(rewarded):
    made = Manifest("ppo", {"model": "a"}, {"model": "b"}, rewarded=rewarded)
    assert Manifest.from_json(made.to_json()) == made and made.needs_certificate is rewarded


def test_a_model_that_helps_to_train_stands_beside_the_line():
    def made(stage, start, end, **details):
        return Manifest(stage, {"model": start}, {"model": end}, details=details)

    beside = made("reward_model", "a", "r", beside=True)
    chained = [made("sft", "0", "a"), beside, made("ppo", "a", "b")]
    for chain in (chained, chained[1:]):
        for place in range(1, len(chain)):
            chain[place] = chain[place].after(chain[place - 1])
        check_chain(chain)
    for place, wrong in ((1, made("reward_model", "0", "r", beside=True)), (2, made("ppo", "r", "b"))):
        broken = [*chained[:place], wrong.after(chained[place - 1])]
        with pytest.raises(RegistryError, match="but sft made a: a stage is missing"):
            check_chain(broken)
    with pytest.raises(RegistryError, match="but the line starts from a"):
        check_chain([beside, made("ppo", "r", "b").after(beside)])
