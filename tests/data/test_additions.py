"""What a source adds to its rows."""

import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.data.additions import with_additions
from posttrain.errors import DataError
from posttrain.types import Example, LabelledCompletion, Origin, PreferencePair, Prompt

HERE = Origin("rows.jsonl", 3)
ASKED = ({"role": "user", "content": "2+2?"},)
ANSWER = ({"role": "assistant", "content": "4"},)
SYSTEM = DatasetKeys(path="rows.jsonl", default_system="Add.")
SUFFIX = DatasetKeys(path="rows.jsonl", completion_suffix="<end>")


@pytest.mark.parametrize(
    "noun",
    [
        Example(HERE, messages=(*ASKED, *ANSWER)),
        PreferencePair(HERE, ASKED, ANSWER, ANSWER),
        LabelledCompletion(HERE, ASKED, ANSWER, True),
        Prompt(HERE, ASKED),
    ],
)
def test_a_conversation_without_a_system_message_gets_one(noun):
    made = with_additions(noun, SYSTEM)
    messages = made.messages if isinstance(made, Example) else made.prompt
    assert messages[:2] == ({"role": "system", "content": "Add."}, *ASKED)
    assert with_additions(made, DatasetKeys(path="rows.jsonl", default_system="Other.")) == made


def test_an_empty_system_message_is_replaced():
    made = with_additions(Example(HERE, messages=({"role": "system", "content": ""}, *ASKED, *ANSWER)), SYSTEM)
    assert made.messages == ({"role": "system", "content": "Add."}, *ASKED, *ANSWER)


def test_answers_in_text_get_their_end():
    assert with_additions(PreferencePair(HERE, "2+2?", "4", "5"), SUFFIX) == PreferencePair(
        HERE, "2+2?", "4<end>", "5<end>"
    )
    assert with_additions(LabelledCompletion(HERE, "2+2?", "4", True), SUFFIX).completion == "4<end>"
    assert with_additions(Example(HERE, prompt="2+2?", completion="4"), SUFFIX).completion == "4<end>"


@pytest.mark.parametrize(
    ("noun", "source", "message"),
    [
        (Example(HERE, completion="4"), SYSTEM, "default_system is set .* the row is text; expected a conversation"),
        (PreferencePair(HERE, "2+2?", "4", "5"), SYSTEM, "default_system is set"),
        (Example(HERE, messages=(*ASKED, *ANSWER)), SUFFIX, "completion_suffix is set .* the row is a conversation; expected text"),
        (Prompt(HERE, "2+2?"), SUFFIX, "completion_suffix is set .* the row is a prompt"),
    ],
)  # fmt: skip
def test_a_row_without_the_place_for_it_is_named(noun, source, message):
    with pytest.raises(DataError, match=rf"rows.jsonl:3: {message}"):
        with_additions(noun, source)
