import pytest

from posttrain.errors import ConfigError
from posttrain.forms.merging.recipe import read_recipe, setting_at, settings_of

GOOD = """\
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight: 0.5
      density: [0.1, 1e-1]
  - model: b
    parameters: {weight: 1}
dtype: float32
"""


def reading(folder, text):
    path = folder / "merge.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_a_recipe_of_mergekits_is_read(tmp_path):
    recipe = reading(tmp_path, GOOD)
    assert recipe.models == ("base", "a", "b") and recipe.method == "ties"
    assert [source.model for source in recipe.slices[0].sources] == ["a", "b", "base"]


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("dtype: float32", "dtyp: float32"), 10, "dtyp: unknown key; did you mean dtype"),
        (("weight: 0.5", "wieght: 0.5"), 6, "wieght: unknown key; did you mean weight"),
        (("weight: 0.5", "normalize: true"), 6, "normalize: unknown key"),
        (("weight: 0.5", "weight: heavy"), 6, "got 'heavy'; expected a number"),
        (("merge_method: ties", "merge_method: tees"), 1, "got 'tees'; expected one of linear"),
        (("base_model: base\n", ""), 2, "ties needs base_model"),
        (("model: b", "model: a"), 3, "names a model twice"),
        (("- model: b", "- mode: b"), 8, "mode: unknown key; did you mean model"),
        (("dtype: float32", "dtype: float8"), 10, "got 'float8'"),
        (("dtype: float32", "modules: {}"), 10, "vision towers"),
        (("merge_method: ties", "merge_method: slerp"), 6, "weight: unknown key"),
        (("dtype: float32", "tokenizer: {source: base, tokens: {}}"), 10, "single tokens are not placed"),
    ],
)
def test_a_fault_is_refused_by_name_and_line(change, line, words, tmp_path):
    with pytest.raises(ConfigError) as caught:
        reading(tmp_path, GOOD.replace(*change))
    assert f"merge.yaml:{line}: " in str(caught.value) and words in str(caught.value)


def test_slices_need_layers_of_equal_number(tmp_path):
    text = "merge_method: linear\nslices:\n  - sources:\n    - {model: a, layer_range: [0, 2]}\n    - {model: b, layer_range: [0, 1]}\n"
    with pytest.raises(ConfigError, match=r"merge.yaml:3: .*equally many layers"):
        reading(tmp_path, text)
    with pytest.raises(ConfigError, match=r"merge.yaml:4: layer_range: got \[2, 1\]"):
        reading(tmp_path, text.replace("[0, 2]", "[2, 1]"))


def test_a_setting_follows_filters_and_layers():
    value = [{"filter": "mlp", "value": [0, 1]}, {"value": 0.25}]
    assert setting_at(value, "layers.0.mlp.up", 0.25) == 0.25
    assert setting_at(value, "layers.0.mlp.up", 1.0) == 1
    assert setting_at(value, "layers.0.self_attn.q", 0.5) == 0.25
    assert setting_at([{"filter": "mlp", "value": 1}], "norm", 0.0) is None


def test_a_parameter_that_nobody_gives_is_named():
    with pytest.raises(ConfigError, match=r"parameters.weight: model a has none for norm"):
        settings_of({"weight": ...}, [{}], "norm", 0.0, "model a")
