"""Rows that ranks wrote apart read as one tensor."""

import threading

import pytest
import torch

from posttrain.checkpoint.parts import TensorParts, collect_part, part_name, write_part
from posttrain.errors import CheckpointError
from posttrain.protocols import Share


@pytest.fixture
def whole():
    return torch.arange(21.0).reshape(7, 3)


def _write(folder, whole, ranks):
    for rank, rows in enumerate(whole.split(-(-len(whole) // ranks))):
        start = rank * -(-len(whole) // ranks)
        shares = {"w": Share(rows, start, tuple(whole.shape)), "step": Share(torch.tensor(5.0), 0, ())}
        write_part(folder / part_name("weights", rank, ranks), shares)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_rows_are_read_from_the_parts_that_have_them(ranks, whole, tmp_path):
    _write(tmp_path, whole, ranks)
    with TensorParts(tmp_path, "weights") as parts:
        assert (parts.names(), parts.shape("w"), float(parts.read("step"))) == (["step", "w"], (7, 3), 5.0)
        for start in range(8):
            for stop in range(start, 8):
                assert torch.equal(parts.read("w", start, stop), whole[start:stop])


def test_one_process_writes_an_ordinary_file(whole, tmp_path):
    _write(tmp_path, whole, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_part_that_is_missing_is_named_by_its_rows(whole, tmp_path):
    _write(tmp_path, whole, 2)
    (tmp_path / part_name("weights", 1, 2)).unlink()
    with TensorParts(tmp_path, "weights") as parts:
        assert torch.equal(parts.read("w", 0, 4), whole[:4])
        with pytest.raises(CheckpointError, match="w: rows 4 to 6 of 7 are in no part"):
            parts.read("w", 2, 6)
    with pytest.raises(CheckpointError, match=r"has no optimizer\.safetensors"):
        TensorParts(tmp_path, "optimizer")


def test_rank_0_waits_for_a_part_and_gives_up_when_it_will_not_come(whole, tmp_path):
    source, target = tmp_path / "beside", tmp_path / "sealed"
    later = threading.Timer(0.1, lambda: write_part(source, {"w": Share(whole, 0, (7, 3))}))
    later.start()
    collect_part(source, target, lambda: False)
    assert target.exists() and not source.exists()
    with pytest.raises(CheckpointError, match="was not written by its rank"):
        collect_part(source, target, lambda: True)
