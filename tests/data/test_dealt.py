"""Several processes tokenise: the rows and their cache are those of one, whoever of them is killed."""

import hashlib
import signal
import subprocess
import sys
import time

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.data import render
from posttrain.data.cache import cache_root
from posttrain.data.dealt import deal_of, make_parts
from posttrain.data.load import load_sft, sft_plan
from posttrain.data.opened import OpenSource
from posttrain.data.rendered import surveyed
from posttrain.data.shelf import Shelf
from posttrain.errors import ConfigError, DataError
from posttrain.supervised import SupervisedProcess

NUM_ROWS = 2048 + 7


def text(number):
    return {"text": f"row {number % 50} of them"}


def sft(path, **keys):
    return SFTKeys(base_model="x", datasets=[{"path": str(path)}], **keys)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


def cache_files(root):
    found = [path for path in root.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def loaded(monkeypatch, folder, keys, tokenizer):
    """The data, and the files of a cache of its own."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(folder))
    data = load_sft(keys, tokenizer)
    return data, cache_files(folder)


def test_the_cache_is_that_of_one_process_to_the_byte(write_jsonl, tokenizer, monkeypatch, tmp_path):
    made, tokenize = [], render.tokenize
    monkeypatch.setattr(render, "tokenize", lambda *given: made.append(1) or tokenize(*given))
    path = write_jsonl([text(number) for number in range(NUM_ROWS)])
    one, files = loaded(monkeypatch, tmp_path / "one", sft(path), tokenizer)
    assert made == [1] * 2
    several, their_files = loaded(monkeypatch, tmp_path / "several", sft(path, dataset_num_proc=2), tokenizer)
    assert made == [1] * 2, "no part was made here"
    assert their_files == files and several.digest == one.digest and len(several) == NUM_ROWS
    assert several.summary.cache == "miss: first time"
    assert loaded(monkeypatch, tmp_path / "one", sft(path, dataset_num_proc=2), tokenizer)[0].summary.cache == "hit"


@pytest.fixture
def three_a_part(monkeypatch):
    monkeypatch.setattr("posttrain.data.opened.ROWS_OF_PART", 3)


def deal_for(keys, tokenizer, folder, draft=None):
    surveys = [surveyed(OpenSource(source), "examples") for source in keys.datasets]
    return deal_of(surveys, "examples", draft or sft_plan(keys).draft, tokenizer, folder)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_makes_every_nth_part_of_all_sources(count, three_a_part, write_jsonl, tokenizer, tmp_path):
    paths = [write_jsonl([text(number) for number in range(size)], name=f"{size}.jsonl") for size in (7, 4)]
    keys = SFTKeys(base_model="x", datasets=[{"path": str(path)} for path in paths])
    deal = deal_for(keys, tokenizer, tmp_path / "parts")
    for number in reversed(range(count)):
        make_parts(deal, number, count)
        names = sorted(path.name for path in deal.folder.iterdir())
        assert names == [Shelf.name(n) for n in range(5) if n % count >= number]


def test_a_source_that_was_written_meanwhile_is_not_taken(three_a_part, write_jsonl, tokenizer, tmp_path):
    path = write_jsonl([text(number) for number in range(7)])
    deal = deal_for(sft(path), tokenizer, tmp_path / "parts")
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="is not what it was"):
        make_parts(deal, 0, 1)
    assert not deal.folder.exists()


def test_what_cannot_be_sent_is_refused_before_a_process_is_started(write_jsonl, tokenizer_of, monkeypatch):
    tokenizer = tokenizer_of("chatml")
    tokenizer.of_ones_own = lambda text: text
    monkeypatch.setattr(SupervisedProcess, "__init__", None)
    path = write_jsonl([text(number) for number in range(2049)])
    with pytest.raises(ConfigError, match=r"dataset_num_proc: 4, .*lambda.*; expected .*; set dataset_num_proc: 1"):
        load_sft(sft(path, dataset_num_proc=4), tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("rows", ["good", "wrong"])
def test_what_a_process_that_was_killed_leaves_is_made_here(
    rows, write_jsonl, tokenizer, monkeypatch, tmp_path, caplog
):
    """One is killed by its first part."""
    kept = SupervisedProcess.__init__

    def killed(self, entry, arguments, *given):
        kept(self, entry, arguments, *given)
        if arguments[1] == "1":
            time.sleep(1.0)
            self.signal(signal.SIGKILL)

    path = write_jsonl([text(number) for number in range(NUM_ROWS)])
    if rows == "wrong":
        path = write_jsonl(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * NUM_ROWS
        )
        tokenizer.chat_template = "{{ raise_exception('no') }}"
    expected = files = None
    try:
        expected, files = loaded(monkeypatch, tmp_path / "one", sft(path), tokenizer)
    except DataError as error:
        said = str(error)
    monkeypatch.setattr(SupervisedProcess, "__init__", killed)
    keys = sft(path, dataset_num_proc=2)
    if rows == "wrong":
        with pytest.raises(DataError) as raised:
            loaded(monkeypatch, tmp_path / "two", keys, tokenizer)
        assert str(raised.value) == said
        return
    found, their_files = loaded(monkeypatch, tmp_path / "two", keys, tokenizer)
    assert found.digest == expected.digest and their_files == files
    assert "a process that tokenises ended (killed by SIGKILL)" in caplog.text


LOADS = """
import sys
from transformers import AutoTokenizer
from posttrain.config.stages import SFTKeys
from posttrain.data.load import load_sft
load_sft(SFTKeys(base_model="x", datasets=[{"path": sys.argv[1]}], dataset_num_proc=2), AutoTokenizer.from_pretrained(sys.argv[2]))
"""


@pytest.mark.slow
def test_after_a_sigkill_nobody_goes_on_and_the_next_start_takes_what_is_whole(
    write_jsonl, tokenizer, monkeypatch, tmp_path
):
    path = write_jsonl([{"text": f"row {number} " * 6} for number in range(6 * 2048)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    expected, files = loaded(monkeypatch, tmp_path / "one", sft(path), tokenizer)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "two"))
    child = subprocess.Popen([sys.executable, "-c", LOADS, str(path), str(tmp_path / "tokenizer")])
    while not list(cache_root().rglob("000001.npz")):
        assert child.poll() is None, "killed before the end"
        time.sleep(0.01)
    child.kill()
    child.wait()
    time.sleep(3.0)
    left = cache_files(cache_root())
    assert 1 <= len([name for name in left if "/0" in name]) < 6
    time.sleep(1.0)
    assert cache_files(cache_root()) == left, "nobody tokenises any more"
    found, their_files = loaded(monkeypatch, tmp_path / "two", sft(path, dataset_num_proc=2), tokenizer)
    assert found.digest == expected.digest and "parts were there from a start that was cut off" in found.summary.cache
    half_written = "/."
    assert {name: digest for name, digest in their_files.items() if half_written not in name} == files
