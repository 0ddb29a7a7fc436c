"""Rows that lie elsewhere or are compressed: the same rows and digests as from the plain file, taken once, and again when they change."""

import gzip
import http.server
import importlib.util
import os
import threading

import fsspec
import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.config.load import load_stage
from posttrain.config.stages import SFTKeys
from posttrain.data import fetch
from posttrain.data.load import load_sft
from posttrain.data.opened import OpenSource, read_source
from posttrain.errors import ConfigError, DataError, MissingExtraError

TEXT = '{"text": "one"}\n\n{"text": "two"}\n'


def source(path):
    return DatasetKeys(path=str(path), type="text")


def compressed(suffix, text=TEXT):
    if suffix == ".zst":
        return pytest.importorskip("zstandard", reason="needs zstandard").ZstdCompressor().compress(text.encode())
    return gzip.compress(text.encode()) if suffix == ".gz" else text.encode()


def put(uri, data):
    with fsspec.open(uri, "wb") as handle:
        handle.write(data)


@pytest.fixture
def downloads(monkeypatch):
    """Every path that was copied."""
    seen, copy = [], fetch._copy
    monkeypatch.setattr(fetch, "_copy", lambda path, target: (seen.append(path), copy(path, target)))
    return seen


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("place", ["here", "memory"])
def test_rows_and_digest_are_those_of_the_plain_file(tmp_path, place, suffix):
    plain = tmp_path / "plain.jsonl"
    plain.write_text(TEXT)
    path = f"memory://a{suffix}/rows.jsonl{suffix}" if place == "memory" else tmp_path / f"rows.jsonl{suffix}"
    if place == "memory":
        put(path, compressed(suffix))
    else:
        path.write_bytes(compressed(suffix))
    mine, theirs = read_source(source(path)), read_source(source(plain))
    assert [row for _, row in mine.rows] == [row for _, row in theirs.rows]
    assert [origin.line for origin, _ in mine.rows] == [1, 3] and [origin.line for origin in mine.blank_lines] == [2]
    assert str(mine.rows[0][0]).endswith(f"rows.jsonl{suffix}:1"), "named as it is in the YAML, not by its copy"
    assert mine.digest == theirs.digest == OpenSource(source(path)).digest == OpenSource(source(plain)).digest


def test_a_file_is_taken_once_and_again_when_it_changed(downloads):
    uri = "memory://again/rows.jsonl"
    put(uri, TEXT.encode())
    first = OpenSource(source(uri)).digest
    assert OpenSource(source(uri)).digest == first and downloads == [uri]
    put(uri, TEXT.replace("one", "six").encode())
    assert OpenSource(source(uri)).digest != first and downloads == [uri, uri]


class Silent(http.server.SimpleHTTPRequestHandler):
    """Names neither a time nor a version of what it gives."""

    def send_header(self, keyword, value):
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


class Breaking(http.server.SimpleHTTPRequestHandler):
    """Promises more bytes than it gives."""

    def send_header(self, keyword, value):
        super().send_header(keyword, str(int(value) + 9) if keyword == "Content-Length" else value)


@pytest.fixture
def server(tmp_path, request):
    class Quiet(getattr(request, "param", http.server.SimpleHTTPRequestHandler)):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()


def test_a_web_server_gives_rows(server, tmp_path):
    pytest.importorskip("aiohttp", reason="needs aiohttp, which datasets brings")
    (tmp_path / "rows.jsonl.gz").write_bytes(compressed(".gz"))
    assert [row["text"] for _, row in read_source(source(f"{server}/rows.jsonl.gz")).rows] == ["one", "two"]
    with pytest.raises(DataError, match=r"/none.jsonl: could not be read: the server answered 404; check the name"):
        read_source(source(f"{server}/none.jsonl"))


@pytest.mark.parametrize("server", [http.server.SimpleHTTPRequestHandler, Silent], indirect=True)
def test_a_web_server_s_file_of_the_same_size_is_taken_again(server, tmp_path):
    """The first names the time of the last change, the second nothing at all."""
    pytest.importorskip("aiohttp", reason="needs aiohttp, which datasets brings")
    rows = tmp_path / "rows.jsonl"
    for number, word in enumerate(("one", "two")):
        rows.write_text(f'{{"text": "{word}"}}\n')
        os.utime(rows, (1_700_000_000 + 60 * number,) * 2)
        assert [row["text"] for _, row in read_source(source(f"{server}/rows.jsonl")).rows] == [word]


@pytest.mark.parametrize("server", [Breaking], indirect=True)
def test_a_download_that_breaks_off_is_said_and_not_kept(server, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="needs aiohttp, which datasets brings")
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(TEXT)
    with pytest.raises(DataError, match=r"/rows.jsonl: could not be read: .*that it is whole"):
        read_source(source(f"{server}/rows.jsonl"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


LONG = "".join(f'{{"text": "{number}"}}\n' for number in range(200_000))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_or_damaged_gives_no_rows(tmp_path, suffix):
    """zstandard's own reader takes the end of a cut file for the end of the rows."""
    whole, file = compressed(suffix, LONG), tmp_path / f"rows.jsonl{suffix}"
    damaged = whole[:10] + bytes([0xFF] * 8) + whole[18:]
    for data in (whole[: len(whole) // 2], whole[:-1], damaged, b"no such thing", whole + b"and more"):
        file.write_bytes(data)
        with pytest.raises(DataError, match=rf"rows.jsonl{suffix}: could not be read: "):
            read_source(source(file))
    file.write_bytes(whole + whole)
    assert len(read_source(source(file)).rows) == 400_000


def test_a_stage_trains_on_rows_from_elsewhere(train, data_dir):
    put("memory://train/sft.jsonl.gz", gzip.compress((data_dir / "sft.jsonl").read_bytes()))
    there = train("sft", name="there", max_steps=1, datasets=[{"path": "memory://train/sft.jsonl.gz"}])
    here = train("sft", name="here", max_steps=1)
    files = [(folder / "model/model.safetensors").read_bytes() for folder in (there, here)]
    assert files[0] == files[1]


def test_what_is_wrong_in_a_fetched_file_is_said_of_it(tokenizer, tmp_path):
    put("memory://odd/rows.jsonl", b'{"text": "a"}\n{no json}\n')
    with pytest.raises(DataError, match=r"^memory://odd/rows.jsonl:2: "):
        load_sft(SFTKeys(base_model="m", datasets=[source("memory://odd/rows.jsonl")]), tokenizer)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(compressed(".gz")[:-9])
    with pytest.raises(DataError, match=r"cut.jsonl.gz: could not be read"):
        read_source(source(cut))
    assert not list(cut.parent.glob("tmp*"))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("memory://x/rows.bin", "got a .bin file; expected one of .jsonl"),
        ("memory://x/rows.txt.gz", "got a .txt file; expected one of .jsonl"),
        ("memory://nowhere/rows.jsonl", "could not be read"),
        ("gopher://x/rows.jsonl", "expected https://, s3://, gs:// or another of fsspec's"),
        ("none.jsonl.gz", "none.jsonl.gz: no such file"),
        ("http://[::1/rows.jsonl", "Invalid IPv6 URL; expected https://HOST/FILE"),
    ],
)
def test_what_cannot_be_fetched_is_named(path, said):
    with pytest.raises(DataError, match=said):
        read_source(source(path))


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_protocol_whose_package_is_missing_says_which():
    with pytest.raises(MissingExtraError, match="s3fs"):
        read_source(source("s3://bucket/rows.jsonl"))


def test_a_yaml_may_name_it_and_may_not_hold_its_password(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("base_model: a/b\ndatasets: [{path: 's3://bucket/rows.jsonl'}]\n")
    assert load_stage("sft", file).keys.datasets[0].path == "s3://bucket/rows.jsonl"
    file.write_text("base_model: a/b\ndatasets: [{path: 'https://me:secret@host/rows.jsonl'}]\n")
    with pytest.raises(ConfigError, match="holds a password or token") as caught:
        load_stage("sft", file)
    assert "secret" not in str(caught.value)
