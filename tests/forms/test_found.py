import pytest

from posttrain.errors import ModelError, RegistryError
from posttrain.files import digest_tree, write_json
from posttrain.forms.found import find_model
from posttrain.registry.manifest import Manifest
from posttrain.registry.registry import Registry


@pytest.fixture
def registry(model_dir, tmp_path):
    book = Registry(tmp_path / "registry")
    made = Manifest("grpo", {"model": "sha256:base"}, {"model": digest_tree(model_dir("qwen3"))})
    book.register("words", model_dir("qwen3"), made)
    book.close()
    return tmp_path / "registry"


def test_a_version_is_found_with_what_made_it(registry):
    found = find_model("words@1", registry)
    assert (
        found.version == "words@1" and found.manifests[-1].stage == "grpo" and (found.folder / "config.json").is_file()
    )
    assert found.lacks_certificate


def test_a_folder_of_a_run_tells_of_rewards_that_nobody_certified(tmp_path):
    """`runs/NAME/stages/02-grpo/model` in a recipe is the same model as the version that it was registered as."""
    for name, kind in (("01-sft", "sft"), ("02-grpo", "grpo"), ("03-dpo", "dpo")):
        write_json(tmp_path / "stages" / name / "model" / "config.json", {})
        write_json(tmp_path / "stages" / name / "result.json", {"kind": kind})

    def lacking():
        folders = [tmp_path / "stages" / name / "model" for name in ("01-sft", "02-grpo", "03-dpo")]
        return [find_model(str(folder), None).lacks_certificate for folder in folders]

    assert lacking() == [False, True, True]
    for verdict in ("fail", "pass"):
        write_json(tmp_path / "stages" / "02-grpo" / "certificate.json", {"verdict": verdict})
        assert lacking() == [False, verdict == "fail", verdict == "fail"]


def test_a_name_alone_is_its_champion(registry):
    with pytest.raises(RegistryError, match="words@champion"):
        find_model("words", registry)


def test_a_folder_is_found_beside_the_file_that_names_it(model_dir, tmp_path):
    folder = model_dir("qwen3")
    assert find_model(folder.name, None, folder.parent).folder == folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty has no config.json"):
        find_model("empty", None, tmp_path)
    with pytest.raises(ModelError, match=r"ghost: no such folder"):
        find_model("ghost", None, tmp_path)


def test_a_model_of_the_hub_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    import huggingface_hub.constants as client

    monkeypatch.setattr(client, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError, match=r"nobody/nothing: no such folder here, and from the hub: the hub cannot be reached"
    ):
        find_model("nobody/nothing", None, tmp_path)
