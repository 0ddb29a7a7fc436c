"""Rows are tokenised part by part: what was cut off is gone on with, and what is wrong is known before the first part."""

import os
import signal

import pytest

from posttrain.config.preference import DPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.data import render
from posttrain.data.load import load_preference, load_sft
from posttrain.errors import DataError


def chat(number):
    turns = [("user", f"What is {number}?"), ("assistant", f"It is {number} 🙂")]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def sft(path, **keys):
    return SFTKeys(base_model="x", datasets=[{"path": str(path)}], **keys)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


@pytest.fixture
def parts(monkeypatch):
    """Parts of three rows; gives how many rows each call of `tokenize` had."""
    monkeypatch.setattr("posttrain.data.opened.ROWS_OF_PART", 3)
    sizes = []
    tokenize = render.tokenize

    def noted(tokenizer, drafts):
        sizes.append(len(drafts))
        return tokenize(tokenizer, drafts)

    monkeypatch.setattr(render, "tokenize", noted)
    return sizes


def killed_at(part, monkeypatch, act):
    """`act` in a process of its own, which SIGKILL ends when it tokenises so many parts."""
    child = os.fork()
    if not child:
        tokenize, left = render.tokenize, [part]

        def counted(*given):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return tokenize(*given)

        monkeypatch.setattr(render, "tokenize", counted)
        act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
CASES = {
    "examples": (sft, load_sft, chat, 1),
    "wrapped": (lambda path: sft(path, packing=True, packing_strategy="wrapped", sequence_len=16), load_sft, lambda n: {"text": f"a text of number {n}"}, 1),
    "once": (lambda path: sft(path, deduplicate=True), load_sft, lambda n: chat(n % 4), 1),
    "pairs": (lambda path: DPOKeys(base_model="x", datasets=[{"path": str(path)}]), load_preference, lambda n: {**PAIR, "chosen": f"b{n}"}, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_start_that_was_killed_is_gone_on_with(case, write_jsonl, tokenizer, parts, own_cache, monkeypatch, tmp_path):
    keys_of, load, row, per_row = CASES[case]
    keys = keys_of(write_jsonl([row(number) for number in range(11)]))
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "another"))
    whole = load(keys, tokenizer)
    assert parts == [per_row * size for size in (3, 3, 3, 2)]
    monkeypatch.setenv("POSTTRAIN_CACHE", str(own_cache))
    killed_at(3, monkeypatch, lambda: load(keys, tokenizer))
    parts.clear()
    again = load(keys, tokenizer)
    assert parts == [per_row * size for size in (3, 2)], "the first two parts are not tokenised again"
    assert again.summary.cache.endswith("; 2 of 4 parts were there from a start that was cut off")
    assert again.rows == whole.rows and again.digest == whole.digest and again.summary.sources == whole.summary.sources
    assert not list(own_cache.rglob(".parts-*")), "what is whole needs no parts"
    assert load(keys, tokenizer).summary.cache == "hit"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_part_is_made_again(damage, write_jsonl, tokenizer, parts, own_cache, monkeypatch):
    keys = sft(write_jsonl([chat(number) for number in range(11)]))
    killed_at(4, monkeypatch, lambda: load_sft(keys, tokenizer))
    (part,) = own_cache.rglob("000001.npz")
    raw = part.read_bytes()
    at = raw.index(b"ids.npy") + 160
    part.write_bytes({"cut": raw[:-40], "flip": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :], "empty": b""}[damage])
    again = load_sft(keys, tokenizer)
    assert parts == [3, 2] and "2 of 4 parts" in again.summary.cache
    assert [row.origin.line for row in again] == list(range(1, 12))
    assert tokenizer.decode(again.rows[4].ids) == tokenizer.apply_chat_template(chat(4)["messages"], tokenize=False)


def test_other_data_finds_no_parts(write_jsonl, tokenizer, parts, monkeypatch):
    killed_at(4, monkeypatch, lambda: load_sft(sft(write_jsonl([chat(number) for number in range(11)])), tokenizer))
    load_sft(sft(write_jsonl([chat(number + 1) for number in range(11)])), tokenizer)
    assert parts == [3, 3, 3, 2]


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"messages": "no list"}, ":11: `messages` is"),
        ({"text": "a"}, ":11: this row is text .* but the rows from .*:1 on are chat"),
        ({"messages": [], "extra": 1}, ":11: "),
    ],
)
def test_what_is_wrong_in_the_last_row_is_said_before_the_first_is_tokenised(
    write_jsonl, tokenizer, parts, last, message
):
    path = write_jsonl([*(chat(number) for number in range(10)), last])
    with pytest.raises(DataError, match=message):
        load_sft(sft(path), tokenizer)
    assert not parts


def test_a_column_of_a_later_part_is_found(write_jsonl, tokenizer, parts):
    path = write_jsonl([*({"text": "a"} for _ in range(9)), {"body": "b"}])
    keys = SFTKeys(base_model="x", datasets=[{"path": str(path), "columns": {"other": "body"}}])
    with pytest.raises(DataError, match=":10: found columns `other`"):
        load_sft(keys, tokenizer)
    keys = SFTKeys(base_model="x", datasets=[{"path": str(path), "columns": {"text": "nowhere"}}])
    with pytest.raises(DataError, match="names a column that no row has; found `text`"):
        load_sft(keys, tokenizer)


@pytest.mark.parametrize("does", [lambda path: path.write_text(path.read_text() + "\n"), lambda path: path.unlink()])
def test_a_file_that_is_written_or_taken_away_while_it_is_read_is_refused(
    does, write_jsonl, tokenizer, own_cache, monkeypatch
):
    """Its rows would stand in the cache under the digest of others."""
    path = write_jsonl([chat(number) for number in range(4)])
    tokenize = render.tokenize

    def written(*given):
        does(path)
        return tokenize(*given)

    monkeypatch.setattr(render, "tokenize", written)
    with pytest.raises(DataError, match="was written, or taken away, while it was read; start again"):
        load_sft(sft(path), tokenizer)
    assert not list(own_cache.rglob("meta.json"))
