"""Which parameters of a whole model are trained."""

import re

import pytest

from posttrain.config.optimizing import OptimizerKeys
from posttrain.errors import ModelError
from posttrain.models.freezing import unfrozen_layers
from posttrain.models.load import load_policy


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"unfrozen_layers": 3}, {3, 4, 5}),
        ({"unfrozen_layers": -2}, {0, 1}),
        ({"unfrozen_layers": 2, "unfrozen_layers_spread": True}, {2, 5}),
        ({"unfrozen_layers": 6, "unfrozen_layers_spread": True}, set(range(6))),
        ({"unfrozen_layers": 1, "unfrozen_layer_modules": ["mlp"], "unfrozen_parameters": ["lm_head"]}, {5}),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_layers_are_trained_by_number(architecture, options, layers, keys_of, make_local_model):
    folder = make_local_model(architecture, num_hidden_layers=6)
    keys = keys_of("llama").model_copy(update={"base_model": str(folder), **options})
    if architecture == "gpt2" and "unfrozen_parameters" in options:
        keys = keys.model_copy(update={"unfrozen_parameters": ["transformer.wte"]})
    names = {name for name, _ in load_policy(keys).trainable()}
    numbers = {int(found[1]) for name in names if (found := re.search(r"\.(\d+)\.", name))}
    assert numbers == layers
    modules = {name.split(".")[3] for name in names if re.search(r"\.\d+\.", name)}
    assert (modules == {"mlp"}) == ("unfrozen_layer_modules" in options)
    outside = {name for name in names if not re.search(r"\.\d+\.", name)}
    assert len(outside) == ("unfrozen_parameters" in options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unfrozen_layers": 3}, "unfrozen_layers: 3: the model has 2 layers; set at most 2"),
        (
            {"unfrozen_layers": 1, "unfrozen_layer_modules": ["mlpp"]},
            "mlpp is no module of a layer; they have input_layernorm, mlp, ",
        ),
    ],
)
def test_layers_and_modules_that_are_not_there_are_refused(options, words, keys_of):
    with pytest.raises(ModelError, match=words):
        load_policy(keys_of("llama").model_copy(update=options))


def test_layers_that_cannot_be_spread_are_refused_with_numbers_that_can():
    keys = OptimizerKeys(unfrozen_layers=4, unfrozen_layers_spread=True)
    with pytest.raises(ModelError, match="6 layers are no multiple of it; set one of 1, 2, 3, 6"):
        unfrozen_layers(keys, 6)
    with pytest.raises(ValueError, match="unfrozen_layers_spread: true with unfrozen_layers: 0"):
        OptimizerKeys(unfrozen_layers_spread=True)
