import json

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.data.held_out import load_with_held_out
from posttrain.data.load import load_sft
from posttrain.errors import DataError
from posttrain.models.load import load_tokenizer


@pytest.fixture
def loaded(tmp_path, model_dir):
    def load(texts, **keys):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made = SFTKeys(base_model=str(model_dir("llama")), datasets=[{"path": str(path)}], **keys)
        train, held = load_with_held_out(load_sft, made, load_tokenizer(made))
        return train, held.get("")

    return load


TEXTS = [f"row number {number}" for number in range(200)]


def ids(data):
    return {row.ids for row in data}


def test_a_share_is_held_out_and_no_row_is_on_both_sides(loaded):
    train, held = loaded(TEXTS, val_size=0.2)
    assert len(train) + len(held) == 200
    assert 20 <= len(held) <= 60
    assert not ids(train) & ids(held)
    assert sum(train.sizes) == len(train)
    assert sorted(train.order(0, 0)) == list(range(len(train)))


def test_a_number_is_held_out_exactly(loaded):
    assert len(loaded(TEXTS, val_size=7)[1]) == 7


def test_a_row_stays_on_its_side_when_the_file_grows_or_is_shuffled(loaded):
    before = ids(loaded(TEXTS[:100], val_size=0.2)[1])
    after = ids(loaded(list(reversed(TEXTS)), val_size=0.2)[1])
    assert before < after


def test_copies_are_on_the_same_side(loaded):
    train, held = loaded(TEXTS * 2, val_size=0.2)
    assert not ids(train) & ids(held)


def test_without_val_size_nothing_is_held_out(loaded):
    train, held = loaded(TEXTS)
    assert (len(train), held) == (200, None)


def test_a_side_without_rows_is_refused(loaded):
    with pytest.raises(DataError, match="holds out 3 and leaves 0"):
        loaded(TEXTS[:3], val_size=3)


@pytest.fixture
def of_sources(tmp_path, model_dir):
    def load(*entries, **keys):
        sources = []
        for number, (texts, entry) in enumerate(entries):
            path = tmp_path / f"rows-{number}.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            sources.append({"path": str(path), **entry})
        made = SFTKeys(base_model=str(model_dir("llama")), datasets=sources, **keys)
        return load_with_held_out(load_sft, made, load_tokenizer(made))

    return load


def test_each_source_holds_out_its_own_share_into_its_own_set(of_sources):
    math = [f"math {number}" for number in range(100)]
    train, held = of_sources((TEXTS, {"val_size": 5}), (math, {"val_size": 9, "eval_name": "math"}), (["x", "y"], {}))
    assert {name: len(rows) for name, rows in held.items()} == {"": 5, "math": 9}
    assert train.sizes == (195, 91, 2)
    assert not ids(train) & (ids(held[""]) | ids(held["math"]))


def test_a_row_that_one_source_holds_out_is_trained_from_no_other(of_sources):
    train, held = of_sources((TEXTS, {"val_size": 0.3, "eval_name": "a"}), (TEXTS, {"val_size": 0.1, "eval_name": "b"}))
    assert not ids(train) & (ids(held["a"]) | ids(held["b"]))
