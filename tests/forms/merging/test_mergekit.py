"""Every method beside mergekit 0.1.5: the same YAML, tensor by tensor, in float32 to 1e-6."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from posttrain.forms.merging.merge import MergeOptions, merge_models
from posttrain.forms.merging.methods import MERGE_METHODS, MergeInput
from posttrain.forms.merging.recipe import read_recipe

mergekit_merge = pytest.importorskip("mergekit.merge", reason="mergekit is not installed (pip install -e '.[dev]')")
from mergekit.config import MergeConfiguration  # noqa: E402
from mergekit.merge_methods.api import merge_tensors  # noqa: E402
from mergekit.options import MergeOptions as TheirOptions  # noqa: E402

TWO = [{"model": "A", "parameters": {"weight": 0.6}}, {"model": "B", "parameters": {"weight": 0.3}}]
DENSE = [
    {"model": "A", "parameters": {"weight": 0.6, "density": 0.4}},
    {"model": "B", "parameters": {"weight": [0.1, 0.9], "density": 0.7}},
]
RECIPES = {
    "linear": {"models": TWO},
    "linear_unnormalized_by_filter": {
        "merge_method": "linear",
        "models": [
            {"model": "A", "parameters": {"weight": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.4}]}},
            {"model": "B", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"normalize": False},
    },
    "slerp": {
        "models": [{"model": "A"}, {"model": "B"}],
        "base_model": "A",
        "parameters": {
            "t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": 0.7}, {"value": 0.5}]
        },
    },
    "nuslerp": {"models": TWO},
    "nuslerp_of_task_vectors_by_row": {
        "merge_method": "nuslerp",
        "models": TWO,
        "base_model": "BASE",
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "nuslerp_by_column": {"merge_method": "nuslerp", "models": TWO, "parameters": {"nuslerp_flatten": False}},
    "task_arithmetic": {"models": TWO, "base_model": "BASE", "parameters": {"lambda": 0.7}},
    "ties": {"models": DENSE, "base_model": "BASE"},
    "breadcrumbs": {"models": DENSE, "base_model": "BASE", "parameters": {"gamma": 0.1}},
    "breadcrumbs_ties": {"models": DENSE, "base_model": "BASE", "parameters": {"gamma": 0.05, "normalize": True}},
    "sce": {"models": [{"model": "A"}, {"model": "B"}], "base_model": "BASE", "parameters": {"select_topk": 0.3}},
    "model_stock": {"models": [{"model": "A"}, {"model": "B"}], "base_model": "BASE"},
    "model_stock_filter_wise": {
        "merge_method": "model_stock",
        "models": [{"model": "A"}, {"model": "B"}, {"model": "C"}],
        "base_model": "BASE",
        "parameters": {"filter_wise": True},
    },
    "karcher": {"models": [{"model": "A"}, {"model": "B"}, {"model": "C"}], "parameters": {"max_iter": 20}},
    "passthrough": {
        "slices": [
            {"sources": [{"model": "A", "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": "B",
                        "layer_range": [0, 2],
                        "parameters": {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]},
                    }
                ]
            },
        ],
    },
    "ties_in_slices": {
        "merge_method": "ties",
        "base_model": "BASE",
        "slices": [
            {
                "sources": [
                    {"model": "BASE", "layer_range": [1, 2]},
                    {"model": "A", "layer_range": [0, 1], "parameters": {"weight": 0.5, "density": 0.5}},
                ],
                "parameters": {"normalize": False},
            },
            {
                "sources": [
                    {"model": "BASE", "layer_range": [0, 2]},
                    {"model": "B", "layer_range": [0, 2], "parameters": {"weight": 1.0}},
                ],
            },
        ],
    },
}
RANDOM = ("dare_ties", "dare_linear", "della", "della_linear")


def recipe_at(folder, body, models):
    """The YAML with the models' folders for their letters."""
    text = yaml.safe_dump(body, sort_keys=False)
    for letter, path in models.items():
        text = text.replace(f"model: {letter}\n", f"model: {path}\n")
    path = folder / "merge.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_yaml_gives_mergekits_tensors(name, relative_of, model_dir, tmp_path):
    # mergekit writes no config of another depth for a model whose config has layer_types.
    kind = "llama" if "slices" in RECIPES[name] else "qwen3"
    models = {"BASE": model_dir(kind), **{letter: relative_of(kind, n) for n, letter in enumerate("ABC", 1)}}
    path = recipe_at(tmp_path, {"merge_method": name, "dtype": "float32"} | RECIPES[name], models)
    options = TheirOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    mergekit_merge.run_merge(
        MergeConfiguration.model_validate(yaml.safe_load(path.read_text())), str(tmp_path / "theirs"), options
    )
    report = merge_models(read_recipe(path), tmp_path / "ours", lambda model: tmp_path / model, MergeOptions())
    theirs, ours = (load_file(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys() and report.num_tensors == len(ours)
    for tensor, expected in theirs.items():
        torch.testing.assert_close(
            ours[tensor], expected, rtol=0, atol=1e-6, msg=lambda text, at=tensor: f"{at}: {text}"
        )
    base = load_file(models["A"] / "model.safetensors")
    assert any((ours[n] - base[n]).abs().max() > 1e-3 for n in ours if n in base)


@pytest.mark.parametrize("name", RANDOM)
def test_with_the_mask_given_random_methods_give_mergekits_tensors(name):
    torch.manual_seed(0)
    base, a, b = (torch.randn(12, 20) for _ in range(3))
    said = {"weight": [0.6, 0.5], "density": [0.5, 0.7]}
    torch.manual_seed(7)
    theirs = merge_tensors([base, a, b], name, parameters=said, base_index=0)
    row = MERGE_METHODS[name]
    settings = [{**row.of_model, "weight": w, "density": d} for w, d in zip(*said.values(), strict=True)]
    inputs = [MergeInput(base, {}, True), MergeInput(a, settings[0]), MergeInput(b, settings[1])]
    torch.manual_seed(7)
    ours = row.merge(inputs, row.shared, torch.bernoulli)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - base).abs().max() > 0.1
