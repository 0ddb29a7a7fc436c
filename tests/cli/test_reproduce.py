"""A merged version made again from what the registry keeps."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.cli.app import main
from posttrain.files import digest_tree
from posttrain.forms.found import find_model
from posttrain.forms.lineage import merge_manifest, register_merge
from posttrain.forms.merging.merge import MergeOptions, merge_models
from posttrain.forms.merging.recipe import read_recipe
from posttrain.registry.manifest import Manifest
from posttrain.registry.registry import Registry


def run(*argv):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    return caught.value.code


@pytest.fixture
def parents(model_dir, tmp_path):
    """The project of a base and of a sibling that is a version of its registry."""
    project = tmp_path / "project"
    shutil.copytree(model_dir("qwen3"), project / "base")
    model = AutoModelForCausalLM.from_pretrained(project / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(project / "tuned")
    AutoTokenizer.from_pretrained(project / "base").save_pretrained(project / "tuned")
    keep(project, "tuned")
    return project


def keep(project, name):
    made = Manifest("sft", {"model": "sha256:x"}, {"model": digest_tree(project / name)})
    book = Registry(project / "registry")
    book.register(name, project / name, made)
    book.close()


def merged(project, base="base@1", weight=0.5, said=None, options=None):
    """`soup@1`, by DARE and in several files; `said`: another recipe in its lineage than the one that made it."""
    path, out, registry, found = project / "merge.yaml", project / "soup", project / "registry", {}
    text = "merge_method: dare_linear\nbase_model: {}\nmodels:\n- model: tuned@1\n  parameters: {{weight: {}, density: 0.4}}\n"
    path.write_text(text.format(base, weight))
    recipe = read_recipe(path)

    def resolve(name):
        found[name] = find_model(name, registry, project)
        return found[name].folder

    report = merge_models(recipe, out, resolve, options or MergeOptions(seed=5, shard_bytes=100_000))
    if said is not None:
        path.write_text(text.format(base, said))
        recipe = read_recipe(path)
    register_merge(out, "soup", registry, merge_manifest(out, recipe, report, found))
    return out


def test_a_merge_is_made_again_to_the_byte_with_its_project_gone(parents, tmp_path, capsys):
    keep(parents, "base")
    out = merged(parents)
    assert len(list(out.glob("*.safetensors"))) > 3 and json.loads((out / "posttrain.json").read_text())["seed"] == 5
    digest = digest_tree(out)
    shutil.copytree(parents / "registry", tmp_path / "registry", symlinks=True)
    shutil.rmtree(parents)
    assert (
        run("reproduce", "soup@1", "--level", 2, "--registry", tmp_path / "registry", "--out", tmp_path / "again") == 0
    )
    assert f"same     weights of merge: {digest}" in capsys.readouterr().out
    assert digest_tree(tmp_path / "again" / "merge" / "model") == digest


def test_a_parent_that_is_not_kept_is_named_with_what_to_do(parents, tmp_path, capsys):
    merged(parents, base="./base")
    book = Registry(parents / "registry")
    kept = book.chain("soup", 1)[-1].inputs["parent.0"]
    book.close()
    shutil.copytree(parents / "base", tmp_path / "elsewhere" / "base")
    shutil.rmtree(parents / "base")
    command = ("reproduce", "soup@1", "--level", 2, "--registry", parents / "registry")
    assert run(*command) == 2
    assert f"missing  parents: ./base ({kept}): of no version that this registry keeps" in capsys.readouterr().out
    assert run(*command, "--project", tmp_path / "elsewhere") == 0


def test_a_lineage_that_says_another_recipe_differs(parents, capsys):
    keep(parents, "base")
    merged(parents, said=0.4)
    assert run("reproduce", "soup@1", "--level", 2, "--registry", parents / "registry") == 1
    assert "differs  weights of merge: recorded sha256:" in capsys.readouterr().out
