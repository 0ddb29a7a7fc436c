from typing import Any, Literal

import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.knob import Keys, knob
from posttrain.config.pipeline import GateKeys, PipelineKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.schema import (
    ForeignName,
    annotation_at,
    did_you_mean,
    group_in,
    keys_of,
    nearest,
    show_value,
    type_text,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (2e-5, "2e-5"),
        (1e-08, "1e-8"),
        (1.5e-7, "1.5e-7"),
        (0.1, "0.1"),
        (32.0, "32"),
        (float("nan"), "nan"),
        ("", '""'),
        ("a b", "a b"),
        (["a", 1], "[a, 1]"),
        ({"a": [True]}, "{a: [true]}"),
    ],
)
def test_values_are_shown_as_one_writes_them(value, text):
    assert show_value(value) == text


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "an integer"),
        (float | None, "a number"),
        (bool | Literal["auto"], "true or false or auto"),
        (Literal["a", "b"], "one of a, b"),
        (list[str] | str, "a list of strings or a string"),
        (list[Literal["wandb", "mlflow"]], "a list of wandb, mlflow"),
        (Literal["a", "b"] | list[Literal["a", "b"]], "one of a, b or a list of them"),
        (dict[str, int], "a mapping of names to integers"),
        (dict[str, dict[str, Any]], "a mapping of names to mappings"),
        (
            list[DatasetKeys],
            "a list of mappings with path, type, split, name, eval_name, val_size, weight, limit, prompt_format, completion_suffix, default_system, data_files, columns",
        ),
    ],
)
def test_types_in_words(annotation, text):
    assert type_text(annotation) == text


def test_a_key_is_described_by_its_knob():
    class Example(Keys):
        """One key."""

        rate_: float = knob(0.5, "A rate.", also="speed (Axolotl, TRL), quick", example=0.25, gt=0, le=1, alias="rate")

    (info,) = keys_of(Example).values()
    assert (info.name, info.attribute, info.meaning, info.default) == ("rate", "rate_", "A rate.", "0.5")
    assert info.type == "a number (> 0, ≤ 1)"
    assert info.also == (ForeignName("speed", ("Axolotl", "TRL")), ForeignName("quick"))
    assert info.example == "0.25"


def test_types_are_found_below_lists_mappings_and_unions():
    assert annotation_at(GRPOKeys, ("datasets", 3, "limit")) == int | None
    assert annotation_at(GRPOKeys, ("reward_kwargs", "x", "y")) is Any
    assert group_in(annotation_at(PipelineKeys, ("gate",))) is GateKeys
    assert annotation_at(PipelineKeys, ("gate", "on_fail", "times")) is int
    assert annotation_at(PipelineKeys, ("gate", "nothing", "times")) is None


def test_the_nearest_names_come_first_and_far_ones_not_at_all():
    names = ["learning_rate", "lora_rank", "num_train_epochs", "train_on"]
    assert nearest("lerning-Rate", names) == ["learning_rate"]
    assert nearest("num_train_epoch", names) == ["num_train_epochs"]
    assert nearest("zzz", names) == []
    assert did_you_mean("zzz", names) == ""
    assert did_you_mean("lerning_rate", names) == "; did you mean learning_rate?"


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_every_key_has_a_meaning_and_a_helpful_example(kind):
    for info in keys_of(STAGE_KINDS[kind].keys).values():
        assert info.meaning, info.name
        assert info.type != "any value", info.name
        assert not info.required or info.example, info.name
