"""The second generation: a run that starts from a registered version, and an alias that could never be won."""

import json
import shutil

import pytest

from posttrain.cli.app import main
from posttrain.errors import ConfigError, RegistryError
from posttrain.registry.card import model_card

SFT = {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, "learning_rate": 1e-6, "per_device_train_batch_size": 8}
NOT_WORSE = {"guards": [{"suite": "yes", "margin": 0.4}]}


@pytest.fixture(scope="module")
def first(make_project, tmp_path_factory):
    """A first generation whose model is champion."""
    register = {"name": "yes", "license": "apache-2.0"}
    made = make_project(tmp_path_factory.mktemp("first"), [{"sft": SFT}], gate=NOT_WORSE, register=register)
    assert made.command() == 0
    return made


@pytest.mark.parametrize("ref", ["alias:champion", "yes@champion", "yes@1"])
def test_a_base_model_may_be_a_version_of_the_registry(first, ref):
    """Started again after its own promotion, it stays with the version it started from."""
    version = ref.replace(":", "-").replace("@", "-")
    first.values |= {"name": f"next-{version}", "base_model": ref, "seed": 7 + len(ref)}
    first.values["gate"] = {**NOT_WORSE, "baseline": "alias:champion"}
    before = first.registry()
    champion = before.holder("yes", "champion")
    before.close()
    started_from = 1 if ref == "yes@1" else champion.version
    assert first.command() == 0
    state = first.state
    assert (state.parent.ref, state.parent.version) == (ref, f"yes@{started_from}")
    book = first.registry()
    made = state.registered["version"]
    (manifest,) = book.chain("yes", made)
    assert manifest.inputs["parent"] == book.chain("yes", started_from)[-1].digest
    assert manifest.details["parent_version"] == f"yes@{started_from}"
    assert f"Started from `yes@{started_from}`" in model_card(book, "yes", made)
    book.close()
    assert first.command() == 0
    assert first.state == state


def test_a_card_names_base_data_licence_and_how_to_reproduce(first):
    book = first.registry()
    card = model_card(book, "yes", 1)
    book.close()
    for text in ("Started from `qwen3`", "`sft.jsonl`", "license: apache-2.0", "posttrain reproduce yes@1 --level 2"):
        assert text in card
    assert str(first.folder) not in card


def test_registry_verbs_print_json(first, capsys):
    where = ["--registry", str(first.folder / "registry")]
    (entry, *_) = printed(capsys, "registry", "list", "--json", *where)
    assert (entry["name"], entry["version"]) == ("yes", 1)
    shown = printed(capsys, "registry", "show", "yes@1", "--json", *where)
    assert [manifest["stage"] for manifest in shown["lineage"]] == ["sft"]
    assert shown["events"][0]["action"] == "register"
    assert printed(capsys, "registry", "verify", "yes@1", "--json", *where)["num_manifests"] == 1


def test_a_third_generation_knows_its_ancestors_and_is_reproduced(make_project, tmp_path, capsys):
    """1 → 2 → 3, each from `yes@champion`; by then the alias means another version, and the loadable folders are gone."""
    made = make_project(tmp_path / "project", [{"sft": SFT}], gate=NOT_WORSE, register={"name": "yes"})
    for number in (1, 2, 3):
        made.values |= {"name": f"run-{number}", "seed": number}
        if number > 1:
            made.values |= {"base_model": "yes@champion", "gate": {**NOT_WORSE, "baseline": "alias:champion"}}
        assert made.command() == 0
    book = made.registry()
    try:
        assert [(e.version, e.aliases) for e in book.entries()] == [(1, ()), (2, ("previous",)), (3, ("champion",))]
        parents = [book.chain("yes", version)[0].details.get("parent_version") for version in (1, 2, 3)]
        assert parents == [None, "yes@1", "yes@2"]
        for version in (2, 3):
            ours, before = book.chain("yes", version)[0], book.chain("yes", version - 1)[-1]
            assert (ours.inputs["parent"], ours.inputs["model"]) == (before.digest, before.outputs["model"])
    finally:
        book.close()
    shutil.rmtree(made.folder / "registry/models")
    for version in (1, 2, 3):
        for level in (0, 2):
            with pytest.raises(SystemExit) as caught:
                main(
                    ["reproduce", f"yes@{version}", "--level", str(level), "--registry", str(made.folder / "registry")]
                )
            said = capsys.readouterr()
            assert caught.value.code == 0, (version, level, said)


def printed(capsys, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_a_reference_needs_register_and_must_name_something(first, project):
    with pytest.raises(ConfigError, match="alias:champion needs `register:`"):
        project([{"sft": SFT}], base_model="alias:champion").run()
    with pytest.raises(RegistryError, match="names nothing"):
        project([{"sft": SFT}], base_model="alias:champion", register={"name": "other"}, gate=NOT_WORSE).run()


def test_a_baseline_that_can_never_give_the_alias_is_refused_before_training(make_project, tmp_path):
    registry = {"name": "yes", "registry": str(tmp_path / "registry")}
    first = make_project(
        tmp_path / "one", [{"sft": SFT}], gate={**NOT_WORSE, "baseline": "stage:base"}, register=registry
    )
    assert first.command() == 0, "nothing holds the alias yet: the base is what the verdict must be against"
    assert first.command() == 0, "a run that gave the alias before is not asked again"
    second = make_project(
        tmp_path / "two", [{"sft": SFT}], gate={**NOT_WORSE, "baseline": "stage:base"}, register=registry, seed=5
    )
    with pytest.raises(ConfigError, match=r"stage:base can never give champion.*yes@1.*set baseline: alias:champion"):
        second.run()
    assert not second.out.exists()
    staged = {**NOT_WORSE, "baseline": "stage:1"}
    third = make_project(
        tmp_path / "three", [{"sft": SFT}, {"sft": SFT}], gate=staged, register={**registry, "name": "new"}, seed=5
    )
    with pytest.raises(
        ConfigError, match=r"stage:1 can never give champion.*the base model, since nothing holds it yet"
    ):
        third.run()


@pytest.mark.parametrize("ref", ["alias:champion", "yes@1"])
@pytest.mark.parametrize("verb", ["plan", "data", "eval"])
def test_plan_data_and_eval_read_a_registered_base_as_run_does(first, capsys, monkeypatch, tmp_path, verb, ref):
    monkeypatch.chdir(tmp_path)
    first.values |= {"name": f"never-run-{verb}", "base_model": ref}
    with pytest.raises(SystemExit) as caught:
        main([verb, str(first.path)])
    shown = capsys.readouterr()
    assert caught.value.code == 0, shown.err
    if verb != "data":
        assert f"{first.folder / 'registry' / 'models'}/" in shown.out
