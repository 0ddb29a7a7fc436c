"""The cache: equal rows on a hit, a stated reason on a miss, damage found."""

import os
import shutil

import pytest

from posttrain.config.preference import DPOKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.data import cache
from posttrain.data.load import load_kto, load_preference, load_prompts, load_sft
from posttrain.errors import DataError


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def sft(path, **keys):
    return SFTKeys(base_model="x", datasets=[{"path": str(path)}], **keys)


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


LOADERS = {
    "sft": (load_sft, SFTKeys, {}, chat("Hello", "fine 🙂")),
    "preference": (load_preference, DPOKeys, {}, {"prompt": "a", "chosen": "b", "rejected": "c"}),
    "kto": (load_kto, DPOKeys, {"loss_type": "kto"}, {"prompt": "a", "completion": "b", "label": False}),
    "prompts": (load_prompts, GRPOKeys, {"reward_funcs": ["r"]}, {**chat("a", "b"), "messages": chat("a", "b")["messages"][:1], "answer": [1, None]}),
}  # fmt: skip


@pytest.mark.parametrize("stage", LOADERS)
def test_a_hit_gives_the_same_dataset(stage, write_jsonl, tokenizer):
    load, keys_of, more, row = LOADERS[stage]
    keys = keys_of(base_model="x", datasets=[{"path": str(write_jsonl([row, row]))}], **more)
    first, second = load(keys, tokenizer), load(keys, tokenizer)
    assert (first.summary.cache, second.summary.cache) == ("miss: first time", "hit")
    assert first.rows == second.rows and first.digest == second.digest
    assert first.summary.sources == second.summary.sources and first.sizes == second.sizes


def test_each_miss_says_why(write_jsonl, tokenizer, tokenizer_of, monkeypatch):
    path = write_jsonl([chat("a", "b")])
    statuses = [load_sft(sft(path), tokenizer).summary.cache]
    write_jsonl([chat("a", "c")])
    statuses.append(load_sft(sft(path), tokenizer).summary.cache)
    statuses.append(load_sft(sft(path, sequence_len=64, train_on="last"), tokenizer).summary.cache)
    tokenizer.chat_template += " "
    statuses.append(load_sft(sft(path, sequence_len=64, train_on="last"), tokenizer).summary.cache)
    tokenizer.add_tokens(["Hello"])
    statuses.append(load_sft(sft(path, sequence_len=64, train_on="last"), tokenizer).summary.cache)
    monkeypatch.setattr(cache, "cache_code_digest", lambda: "sha256:other")
    statuses.append(load_sft(sft(path, sequence_len=64, train_on="last"), tokenizer).summary.cache)
    assert statuses == [
        "miss: first time",
        "miss: contents changed",
        "miss: keys changed: sequence_len, train_on",
        "miss: template changed",
        "miss: tokenizer changed",
        "miss: code changed",
    ]


def test_going_back_is_a_hit_again(write_jsonl, tokenizer):
    path = write_jsonl([chat("a", "b")])
    load_sft(sft(path), tokenizer)
    load_sft(sft(path, sequence_len=64), tokenizer)
    assert load_sft(sft(path), tokenizer).summary.cache == "hit"


def test_what_does_not_change_the_rows_does_not_miss(write_jsonl, tokenizer):
    path = write_jsonl([chat("a", "b")])
    load_sft(sft(path), tokenizer)
    weighted = SFTKeys(base_model="y", learning_rate=1.0, seed=3, datasets=[{"path": str(path), "weight": 2.0}])
    data = load_sft(weighted, tokenizer)
    assert data.summary.cache == "hit" and data.weights == (2.0,) and data.summary.sources[0].weight == 2.0


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        (damage, name)
        for damage in ("flip", "cut", "gone")
        for name in ("ids.bin", "mask.bin", "extras.jsonl", "index.npz", "facts.json", "meta.json")
        if (damage, name) != ("flip", "meta.json")  # its record of the parts may differ, the rows are checked anyway
    ],
)
def test_a_damaged_entry_is_rebuilt(write_jsonl, tokenizer, own_cache, damage, name):
    path = write_jsonl([chat("a", "b")])
    first = list(load_sft(sft(path), tokenizer))
    (file,) = own_cache.rglob(name)
    raw = file.read_bytes()
    if damage == "flip":
        file.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    elif damage == "cut":
        file.write_bytes(raw[: len(raw) // 2])
    else:
        file.unlink()
    again = load_sft(sft(path), tokenizer)
    assert again.summary.cache == "miss: the entry was damaged, rebuilt"
    assert again.rows == first
    assert load_sft(sft(path), tokenizer).summary.cache == "hit"


def test_rows_that_are_not_json_are_not_stored_and_say_so(tmp_path, tokenizer):
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"prompt": "a", "when": datetime.date(2024, 1, 1)}])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    keys = GRPOKeys(base_model="x", datasets=[{"path": str(tmp_path / "rows.parquet")}], reward_funcs=["r"])
    data = load_prompts(keys, tokenizer)
    assert data.summary.cache.startswith("miss: first time; not stored: a column is not JSON")
    assert data.rows[0][0].columns["when"] == datetime.date(2024, 1, 1)


def test_a_cache_that_cannot_be_written_never_stops_a_run(write_jsonl, tokenizer, own_cache):
    own_cache.write_text("a file where the folder should be")
    data = load_sft(sft(write_jsonl([chat("a", "b")])), tokenizer)
    assert len(data) == 1 and "not stored: " in data.summary.cache


def test_old_entries_are_dropped(write_jsonl, tokenizer, own_cache):
    path = write_jsonl([chat("a", "b")])
    for length in range(60, 68):
        load_sft(sft(path, sequence_len=length), tokenizer)
    assert len(list(own_cache.rglob("meta.json"))) == 4


def test_without_the_variable_the_cache_is_in_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("POSTTRAIN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == tmp_path / ".cache" / "posttrain" / "data"


@pytest.mark.parametrize("name", ["ids.bin", "mask.bin", "extras.jsonl"])
@pytest.mark.parametrize("found", ["first", "hit"])
def test_rows_of_a_file_that_is_shortened_while_it_is_read_say_so(write_jsonl, tokenizer, own_cache, name, found):
    """A mapped page of such a file ends the process with SIGBUS."""
    keys = GRPOKeys(
        base_model="x",
        datasets=[{"path": str(write_jsonl([{"prompt": "Hello", "answer": 1}] * 3000))}],
        reward_funcs=["r"],
    )
    data = load_prompts(keys, tokenizer)
    data = load_prompts(keys, tokenizer) if found == "hit" else data
    assert len(data.rows[2999][1])
    (file,) = own_cache.rglob(name)
    os.truncate(file, 0)
    with pytest.raises(
        DataError, match=f"{name}: tokenised rows cannot be read: got 0 of the .* it was shortened; start again"
    ):
        data.rows[2999]


def test_rows_stay_when_their_entry_is_taken_away(write_jsonl, tokenizer, own_cache):
    data = load_sft(sft(write_jsonl([chat("a", "b")])), tokenizer)
    rows = list(data)
    shutil.rmtree(own_cache)
    assert list(data) == rows
