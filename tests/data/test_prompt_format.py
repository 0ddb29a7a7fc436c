import json

import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.data.opened import read_rows
from posttrain.errors import DataError

FORMATS = ["Q: {question}\nHint: {hint}\nA: ", "Q: {question}\nA: "]


def rows(tmp_path, *records, formats=FORMATS, **keys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return [row for _, row in read_rows(DatasetKeys(path=str(path), prompt_format=formats, **keys))]


def test_the_first_format_whose_columns_are_filled_writes_the_prompt(tmp_path):
    given = {"question": "2+2?", "hint": "count", "answer": "4"}
    assert rows(tmp_path, given, {**given, "hint": ""}, columns={"completion": "answer"}) == [
        {"prompt": "Q: 2+2?\nHint: count\nA: ", "completion": "4"},
        {"prompt": "Q: 2+2?\nA: ", "completion": "4"},
    ]


def test_doubled_braces_are_braces(tmp_path):
    assert rows(tmp_path, {"question": "x"}, formats=["{{{question}}}"]) == [{"prompt": "{x}"}]


@pytest.mark.parametrize(
    ("record", "formats", "expected"),
    [
        (
            {"hint": "x"},
            FORMATS,
            "no prompt_format fits: expected text in question, hint; or question; this row has `hint`",
        ),
        ({"question": "x", "prompt": "y"}, FORMATS, "has a `prompt` of its own"),
        ({"question": "x"}, ["{question!r}"], "names no column"),
        ({"question": "x"}, ["{question"], "expected columns in braces"),
    ],
)
def test_what_cannot_be_written_is_an_error(tmp_path, record, formats, expected):
    with pytest.raises(DataError, match=expected.split(":")[0].replace("{", r"\{")):
        rows(tmp_path, record, formats=formats)


def test_an_alpaca_row_gets_it_as_the_users_turn(tmp_path):
    given = {"question": "2+2?", "hint": "", "output": "4"}
    assert rows(tmp_path, given, type="alpaca") == [{"instruction": "Q: 2+2?\nA: ", "output": "4"}]
    with pytest.raises(DataError, match="has a `instruction` of its own"):
        rows(tmp_path, {**given, "instruction": "x"}, type="alpaca")
