"""Rows as they are needed: from every kind of file, for one of several shares, from any place on."""

import csv
import gzip
import json

import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.data.opened import read_source
from posttrain.data.stream import RowStream, first_rows, open_rows
from posttrain.errors import DataError
from posttrain.types import Origin

ROWS = [{"text": f"row {number}", "n": str(number)} for number in range(25)]


@pytest.fixture
def files(tmp_path, write_jsonl):
    import pyarrow
    import pyarrow.parquet
    import zstandard

    plain = write_jsonl(ROWS)
    raw = plain.read_bytes()
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(raw))
    half = len(raw) // 2
    frames = [zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:])]
    (tmp_path / "rows.jsonl.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet", row_group_size=10)
    with (tmp_path / "rows.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["text", "n"])
        writer.writeheader()
        writer.writerows(ROWS)
    return {
        "jsonl": str(plain), "uri": f"file://{plain}", "gz": str(tmp_path / "rows.jsonl.gz"), "zst": str(tmp_path / "rows.jsonl.zst"),
        "parquet": str(tmp_path / "rows.parquet"), "csv": str(tmp_path / "rows.csv"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "uri", "gz", "zst", "parquet", "csv"])
@pytest.mark.parametrize("start", [0, 13, 25])
def test_every_kind_of_file_is_read_from_any_row_on(files, kind, start):
    source = DatasetKeys(path=files[kind])
    assert [row for _, row in open_rows(source, start)] == ROWS[start:]
    assert [origin for origin, _ in open_rows(source, start)] == [
        origin for origin, _ in read_source(source).rows[start:]
    ]


def test_a_dataset_of_the_hubs_library_is_read_from_any_row_on(files):
    source = DatasetKeys(path="json", data_files=[files["jsonl"]])
    assert [row for _, row in open_rows(source, 13)] == ROWS[13:]


def test_what_the_hubs_library_cannot_read_on_is_said_in_a_line(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "a"}\n' * 3 + "{broken\n")
    rows = open_rows(DatasetKeys(path="json", data_files=[str(path)]))
    with pytest.raises(DataError, match=r"json: could not be read on behind row 0: .*check the network and the files"):
        list(rows)


def test_a_file_is_read_no_further_than_it_is_needed(files, tmp_path):
    """What is broken behind the rows that are taken is not come upon."""
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n{broken\n")
    stream = RowStream([DatasetKeys(path=str(broken))], seed=0)
    assert [row for _, row in stream.take(2)[0]] == ROWS[:2]
    with pytest.raises(DataError, match=r"broken\.jsonl:3: not JSON"):
        stream.take(1)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_limit_reads_no_further_than_its_rows(tmp_path, files, suffix):
    """The end of the file is broken: of CSV its third row, of Parquet a page of its last row group."""
    path = tmp_path / f"cut.{suffix}"
    if suffix == "csv":
        path.write_text("text,n\na,0\nb,1\nc,2,3,4\n")
    else:
        import pyarrow.parquet

        raw = bytearray((tmp_path / "rows.parquet").read_bytes())
        column = pyarrow.parquet.ParquetFile(tmp_path / "rows.parquet").metadata.row_group(2).column(0)
        at = column.dictionary_page_offset or column.data_page_offset
        raw[at : at + 20] = b"\xff" * 20
        path.write_bytes(bytes(raw))
    assert len(read_source(DatasetKeys(path=str(path), limit=2)).rows) == 2
    whole = 2 if suffix == "csv" else 20
    assert len(first_rows(DatasetKeys(path=str(path), limit=whole), 99).rows) == whole
    with pytest.raises(DataError):
        read_source(DatasetKeys(path=str(path)))


@pytest.mark.parametrize("num_shares", [1, 2, 3])
def test_shares_have_different_rows_and_together_all_of_them(files, num_shares):
    source = DatasetKeys(path=files["jsonl"])
    taken = [
        [row["n"] for _, row in RowStream([source], 0, share, num_shares).take(99)[0]] for share in range(num_shares)
    ]
    assert sorted(int(n) for share in taken for n in share) == list(range(25))


def test_sources_follow_one_another_and_then_begin_again(files):
    few, many = DatasetKeys(path=files["csv"], limit=2), DatasetKeys(path=files["jsonl"], limit=3)
    stream = RowStream([few, many], seed=0)
    assert [len(rows) for rows in stream.take(4)] == [2, 2]
    assert [len(rows) for rows in stream.take(4)] == [0, 1], "a pass ends a window"
    assert [len(rows) for rows in stream.take(4)] == [2, 2]
    assert stream.passes == 1


def test_weights_say_how_often_a_source_is_drawn(files):
    sources = [DatasetKeys(path=files["jsonl"], weight=3), DatasetKeys(path=files["csv"], weight=1)]
    often, seldom = (len(rows) for rows in RowStream(sources, seed=0).take(1000))
    assert often + seldom == 1000 and 700 < often < 800


@pytest.mark.parametrize("weights", [(None, None), (3, 1)])
@pytest.mark.parametrize("before", [0, 7, 31])
def test_from_a_place_on_the_rows_are_the_same(files, weights, before):
    sources = [
        DatasetKeys(path=files[kind], weight=weight) for kind, weight in zip(("jsonl", "parquet"), weights, strict=True)
    ]
    whole, later = RowStream(sources, 5, 1, 2), RowStream(sources, 5, 1, 2)
    for _ in range(before):
        whole.take(1)
    later.go_to(json.loads(json.dumps(whole.places)), whole.drawn)
    assert [later.take(1) for _ in range(40)] == [whole.take(1) for _ in range(40)]


def test_a_blank_line_is_counted(write_jsonl, tmp_path):
    path = tmp_path / "blank.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    found = first_rows(DatasetKeys(path=str(path)), 10)
    assert len(found.rows) == 2 and found.blank_lines == (Origin(str(path), 2),)


def test_what_cannot_be_streamed_is_refused(files, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="a JSON list is one value; write it as JSONL"):
        open_rows(DatasetKeys(path=str(tmp_path / "list.json")))
    with pytest.raises(DataError, match=r"line by line; got \.parquet"):
        open_rows(DatasetKeys(path=f"file://{files['parquet']}"))
    with pytest.raises(DataError, match="has no row for share 3 of 3"):
        RowStream([DatasetKeys(path=files["jsonl"], limit=2)], 0, 2, 3).take(1)
