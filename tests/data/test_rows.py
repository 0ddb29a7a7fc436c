"""Rows on disk: made when they are asked for, equal to what was tokenised, and held by nobody."""

import fcntl
import gc
import resource
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_sft
from posttrain.data.rows import ChosenRows, MappedRows, stored_length
from posttrain.errors import DataError


def keys_of(path, **more):
    return SFTKeys(base_model="x", datasets=[{"path": str(path)}], **more)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


def text(number):
    return {"prompt": f"row {number} says", "completion": " good day" * (number % 11 + 1)}


def test_rows_of_every_length_come_back_with_their_masks_and_lines(write_jsonl, tokenizer):
    data = load_sft(keys_of(write_jsonl([text(number) for number in range(40)])), tokenizer)
    assert len({len(row.ids) % 8 for row in data}) == 8
    for number, row in enumerate(data):
        alone = load_sft(keys_of(write_jsonl([text(number)], f"{number}.jsonl")), tokenizer).rows[0]
        assert (row.ids, row.loss_mask) == (alone.ids, alone.loss_mask)
        assert row.origin.line == number + 1 and stored_length(data.rows, number) == len(row.ids)
        assert all(type(token) is int for token in row.ids) and all(type(on) is bool for on in row.loss_mask)


def test_rows_are_read_as_a_list_is(write_jsonl, tokenizer):
    rows = load_sft(keys_of(write_jsonl([text(number) for number in range(9)])), tokenizer).rows
    listed = list(rows)
    assert rows == listed and rows != listed[:-1]
    assert (rows[-1], rows[2:4], rows[::-3]) == (listed[-1], listed[2:4], listed[::-3])
    with pytest.raises(IndexError):
        rows[9]
    chosen = ChosenRows(rows, [3, 1])
    assert list(chosen) == [listed[3], listed[1]] and stored_length(chosen, 0) == len(listed[3].ids)
    lengths = MappedRows(chosen, lambda row: len(row.ids))
    assert list(lengths) == [len(listed[3].ids), len(listed[1].ids)] and stored_length(lengths, 0) is None


def test_a_start_that_finds_its_rows_holds_less_than_a_byte_a_token(write_jsonl, tokenizer):
    """A tuple of ints holds 47, and reading it took 66."""
    path = write_jsonl([{"prompt": f"{n}", "completion": " good day" * 1000} for n in range(400)])
    keys = keys_of(path, sequence_len=8192, packing=True, val_size=0.5)
    tokens = load_sft(keys, tokenizer).summary.tokens
    assert tokens > 1_500_000
    gc.collect()
    tracemalloc.start()
    try:
        data, held_out = load_with_held_out(load_sft, keys, tokenizer)
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data.summary.cache == "hit" and len(data) + len(held_out[""]) == 400
    assert held < tokens


def test_an_entry_takes_little_more_than_four_bytes_a_token(write_jsonl, tokenizer, own_cache):
    path = write_jsonl([{"prompt": "a", "completion": " good day" * 1000} for _ in range(20)])
    tokens = load_sft(keys_of(path, sequence_len=8192), tokenizer).summary.tokens
    assert sum(file.stat().st_size for file in own_cache.rglob("*") if file.is_file()) < 4.2 * tokens


def test_of_two_that_start_at_once_one_tokenises_and_the_other_reads(write_jsonl, tokenizer_of):
    keys = keys_of(write_jsonl([text(number) for number in range(500)]))
    tokenizers = [tokenizer_of("chatml") for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda tokenizer: load_sft(keys, tokenizer), tokenizers))
    assert sorted(data.summary.cache for data in found) == ["hit", "miss: first time"]
    assert found[0].rows == found[1].rows and found[0].digest == found[1].digest


def test_who_finds_its_rows_does_not_wait_for_one_that_tokenises_and_who_waits_says_so(
    write_jsonl, tokenizer, own_cache, caplog
):
    path = write_jsonl([text(number) for number in range(5)])
    load_sft(keys_of(path), tokenizer)
    [lock] = own_cache.rglob(".lock")
    with open(lock, "w") as held, ThreadPoolExecutor(1) as pool, caplog.at_level("INFO", "posttrain"):
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            assert pool.submit(load_sft, keys_of(path), tokenizer).result(timeout=60).summary.cache == "hit"
            waiting = pool.submit(load_sft, keys_of(path, sequence_len=60), tokenizer)
            until = time.monotonic() + 60
            while "waiting for it" not in caplog.text and time.monotonic() < until:
                time.sleep(0.01)
            assert "another process tokenises the same data" in caplog.text and not waiting.done()
        finally:
            fcntl.flock(held, fcntl.LOCK_UN)
        assert waiting.result(timeout=60).summary.cache == "miss: keys changed: sequence_len"


def test_rows_stay_readable_when_their_entry_is_taken_away(write_jsonl, tokenizer, own_cache):
    path = write_jsonl([text(number) for number in range(5)])
    data = load_sft(keys_of(path), tokenizer)
    listed = list(data)
    for length in range(60, 66):
        load_sft(keys_of(path, sequence_len=length), tokenizer)
    assert load_sft(keys_of(path), tokenizer).summary.cache.startswith("miss")
    assert data.rows == listed


def test_a_load_that_fails_leaves_nothing_half_written(write_jsonl, tokenizer, own_cache):
    path = write_jsonl([text(number) for number in range(10)])
    with pytest.raises(DataError, match="sequence_len"):
        load_sft(keys_of(path, sequence_len=8, overflow="error"), tokenizer)
    assert [file.name for file in own_cache.rglob("*") if file.is_file()] == [".lock"]


def test_without_room_the_message_says_so_and_nothing_is_left_that_takes_room(write_jsonl, tokenizer, own_cache):
    path = write_jsonl([text(number) for number in range(3000)])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        with pytest.raises(DataError, match="tokenised rows cannot be written: File too large"):
            load_sft(keys_of(path), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [file.name for file in own_cache.rglob("*") if file.is_file()] == [".lock"]


@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_blocks_do_not_depend_on_how_many_rows_are_tokenised_at_once(at_once, write_jsonl, tokenizer, monkeypatch):
    path = write_jsonl([{"text": " good day" * (number % 7 + 1)} for number in range(30)])
    keys = keys_of(path, sequence_len=16, packing=True, packing_strategy="wrapped")
    expected = load_sft(keys, tokenizer)
    monkeypatch.setattr("posttrain.data.opened.ROWS_OF_PART", at_once)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(path.parent / "other"))
    again = load_sft(keys, tokenizer)
    assert again.summary.cache == "miss: first time" and again.digest == expected.digest
    assert again.rows == expected.rows and again.summary.sources == expected.summary.sources
    assert all(len(row.ids) == 16 for row in again.rows[:-1])
