"""Whole versions: the receiving end hands over what the sending end was given, and leaves nothing behind."""

import json

import pytest
import torch

from posttrain.rollout.transfer import TRANSFERS, TransferOptions, whole


def named(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"embed": (40, 8), "norm": (8,), "scalar": (), "transposed": (3, 5)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return tensors | {"transposed": tensors["transposed"].T}


def moved(transfer, tensors, folder, versions=(1,)):
    """What arrives of each version, and the bytes that the sender counted."""
    row = TRANSFERS[transfer]
    sender, ends, arrived = row.sender(TransferOptions(folder)), [], {}
    carried = (lambda message: json.loads(json.dumps(message))) if row.crosses_processes else (lambda message: message)
    sender.connect(lambda message: ends.append(row.receiver(carried(message))))
    for version in versions:
        taken = []
        size = sender.send(
            iter(tensors.items()), version, lambda message, to=taken: to.extend(ends[0].take(carried(message)))
        )
        arrived[version] = (dict(taken), size)
    ends[0].close()
    sender.close()
    return arrived


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transfer", ["copy", "file"])
@pytest.mark.parametrize("portion", [1, 100, 1 << 20])
def test_every_tensor_of_every_version_arrives_to_the_bit(transfer, dtype, portion, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, "_PORTION_BYTES", portion)
    tensors = named(dtype)
    for found, size in moved(transfer, tensors, tmp_path, versions=(1, 2)).values():
        assert list(found) == list(tensors)
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert size.num_bytes == size.whole_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_nobody_could_read_is_not_left_behind(tmp_path):
    def refuse(message):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        TRANSFERS["file"].sender(TransferOptions(tmp_path)).send(iter(named().items()), 1, refuse)
    assert list(tmp_path.iterdir()) == []
