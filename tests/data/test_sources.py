"""Reading rows: every file type, and what is said about files that cannot be read."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.config.stages import SFTKeys
from posttrain.data.load import load_sft
from posttrain.data.opened import OpenSource, read_rows, read_source
from posttrain.data.rendered import INVENTED
from posttrain.errors import DataError


def rows_of(path, **keys):
    return [row for _, row in read_rows(DatasetKeys(path=str(path), **keys))]


def test_every_file_type_gives_the_same_rows(tmp_path, write_jsonl):
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": 'b, "quoted"\nline', "answer": "2"}]
    lines = write_jsonl(rows)
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text(lines.read_text())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text('prompt,answer\na,1\n"b, ""quoted""\nline",2\n')
    names = ["train.jsonl", "list.json", "data.json", "lines.json", "rows.parquet", "rows.csv"]
    assert [rows_of(tmp_path / name) for name in names] == [rows] * 6


def test_origin_names_the_line_and_blank_lines_are_counted(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('\ufeff{"text": "a"}\n\n   \n{"text": "b\u2028c"}\n', encoding="utf-8")
    source = read_source(DatasetKeys(path=str(path)))
    assert [(str(o).rsplit("/", 1)[-1], row["text"]) for o, row in source.rows] == [
        ("train.jsonl:1", "a"),
        ("train.jsonl:4", "b\u2028c"),
    ]
    assert [origin.line for origin in source.blank_lines] == [2, 3]


def test_limit_and_renamed_columns(write_jsonl):
    path = write_jsonl([{"question": str(i), "prompt": None} for i in range(5)])
    assert rows_of(path, limit=2, columns={"prompt": "question"}) == [{"prompt": "0"}, {"prompt": "1"}]


def test_digest_follows_the_contents(write_jsonl):
    path = write_jsonl([{"text": "a"}])
    before = OpenSource(DatasetKeys(path=str(path))).digest
    assert read_source(DatasetKeys(path=str(path))).digest == before
    write_jsonl([{"text": "b"}])
    assert OpenSource(DatasetKeys(path=str(path))).digest != before


BAD_FILES = {
    "broken line": (
        "train.jsonl",
        b'{"a": 1}\n' * 40 + b'{"a": \n',
        r"train\.jsonl:41: not JSON: .*; expected one JSON object per line",
    ),
    "empty": ("train.jsonl", b"", r"train\.jsonl: the file is empty"),
    "only blank lines": ("train.jsonl", b"\n\n", r"train\.jsonl: no rows in this file \(2 blank lines\)"),
    "row is a list": ("train.jsonl", b'{"a": 1}\n[1]\n', r"train\.jsonl:2: a row is a list; expected an object"),
    "row is null": ("train.jsonl", b"null\n", r"train\.jsonl:1: a row is null"),
    "not utf-8": ("train.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"train\.jsonl:2: not UTF-8: byte 0xff at position 7"),
    "deep": ("train.jsonl", b"[" * 200_000 + b"\n", r"train\.jsonl:1: not JSON"),
    "json syntax": ("train.json", b'[{"a": 1},\n{"a" 2}]', r"train\.json:2: not JSON"),
    "json scalar": ("train.json", b"3", r"train\.json: got a number; expected a list of objects"),
    "json empty list": ("train.json", b"[]", r"train\.json: no rows in this file"),
    "json row": ("train.json", b'[{"a": 1}, "x"]', r"train\.json:2: a row is a string"),
    "not parquet": ("train.parquet", b"hello", r"train\.parquet: not Parquet"),
    "csv width": ("train.csv", b"a,b\n1,2\n1,2,3\n", r"train\.csv:3: got 3 fields; expected 2"),
    "csv quote": ("train.csv", b'a,b\n1,"2\n', r"train\.csv:2: not CSV"),
    "unknown type": ("train.xlsx", b"x", r"train\.xlsx: got a \.xlsx file; expected one of \.jsonl"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_with_their_line(tmp_path, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(DatasetKeys(path=str(tmp_path / name)))


def test_missing_file_names_the_nearest(write_jsonl, tmp_path):
    write_jsonl([{"text": "a"}], name="sft_data.jsonl")
    with pytest.raises(DataError, match=r"sft_dat\.jsonl: no such file; .*did you mean sft_data\.jsonl\?"):
        read_rows(DatasetKeys(path=str(tmp_path / "sft_dat.jsonl")))


def test_folder_instead_of_file(write_jsonl, tmp_path):
    write_jsonl([{"text": "a"}])
    with pytest.raises(DataError, match=r"is a folder; expected a file; name one of \['train\.jsonl'\]"):
        read_rows(DatasetKeys(path=str(tmp_path)))


def test_renaming_a_column_that_is_not_there(write_jsonl):
    path = write_jsonl([{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match=r"\{prompt: question\}` names a column that no row has; found `q`, `a`"):
        read_rows(DatasetKeys(path=str(path), columns={"prompt": "question"}))


def test_unreachable_hub_is_one_line(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^some/dataset: not a local file, and the hub could not give it") as caught:
        read_rows(DatasetKeys(path="some/dataset"))
    assert "\n" not in str(caught.value)


def test_what_lies_inside_a_column_is_read_by_its_path(write_jsonl):
    row = {"extra_info": {"question": "2+2?", "answer": "4"}, "a.b": "whole"}
    path = write_jsonl([row, {"extra_info": {"question": "1+1?"}, "a.b": "other"}])
    columns = {"instruction": "extra_info.question", "output": "extra_info.answer", "text": "a.b"}
    first, second = read_rows(DatasetKeys(path=str(path), columns=columns))
    assert first[1] == {"extra_info": row["extra_info"], "instruction": "2+2?", "output": "4", "text": "whole"}
    assert second[1] == {"extra_info": {"question": "1+1?"}, "instruction": "1+1?", "text": "other"}
    with pytest.raises(DataError, match=r"names a column that no row has"):
        read_rows(DatasetKeys(path=str(path), columns={"text": "extra_info.none"}))


def test_a_swap_of_columns_swaps(write_jsonl):
    path = write_jsonl([{"prompt": "q", "chosen": "bad", "rejected": "good"}])
    rows = read_rows(DatasetKeys(path=str(path), columns={"chosen": "rejected", "rejected": "chosen"}))
    assert rows[0][1] == {"prompt": "q", "chosen": "good", "rejected": "bad"}


def test_a_column_that_would_be_overwritten_is_an_error(write_jsonl):
    path = write_jsonl([{"question": "q"}, {"question": "q", "prompt": "old"}])
    with pytest.raises(DataError, match=r"train\.jsonl:2: `columns: \{prompt: question\}` would overwrite .*`prompt`"):
        read_rows(DatasetKeys(path=str(path), columns={"prompt": "question"}))
    renamed = DatasetKeys(path=str(path), columns={"prompt": "question", "old_prompt": "prompt"})
    assert read_rows(renamed)[1][1] == {"prompt": "q", "old_prompt": "old"}
    with pytest.raises(DataError, match="reads `question` under two names"):
        read_rows(DatasetKeys(path=str(path), columns={"prompt": "question", "text": "question"}))


def test_nulls_invented_by_nested_parquet_are_dropped_and_counted(tmp_path, tokenizer_of):
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        for name, arguments in (("f", {"a": 1}), ("g", {"b": "x"}))
    ]
    rows = [{"messages": [{"role": "user", "content": "q"}, turn], "facts": {"kept": None}} for turn in calls]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    keys = DatasetKeys(path=str(path))
    read = read_source(keys)
    assert read.invented_nulls == 2
    arguments = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for _, row in read.rows]
    assert arguments == [{"a": 1}, {"b": "x"}]
    assert read.rows[0][1]["facts"] == {"kept": None}
    data = load_sft(SFTKeys(base_model="x", datasets=[keys]), tokenizer_of("qwen3"))
    assert data.summary.sources[0].notes[INVENTED] == 2
