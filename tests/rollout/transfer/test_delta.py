"""Deltas: what arrives is what was sent, to the bit; and what is torn, flipped or out of order is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.config.stages import SFTKeys
from posttrain.errors import EngineError
from posttrain.models.load import load_policy
from posttrain.rollout.transfer import TRANSFERS, TransferOptions, delta
from posttrain.rollout.transfer.delta import DeltaDecoder, DeltaEncoder

DTYPES = [torch.bfloat16, torch.float32]
ANCHOR = 4


def sha(tensor):
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def named(values, dtype=torch.float32):
    """Three tensors: a matrix, a scalar, one without elements."""
    matrix = torch.tensor(values, dtype=torch.float32).to(dtype)
    return {"matrix": matrix.reshape(2, -1), "scalar": matrix[0].clone(), "empty": torch.zeros(0, 3, dtype=dtype)}


def header(frame):
    length = int.from_bytes(frame[32:36], "little")
    return json.loads(frame[36 : 36 + length])


def push(encoder, weights, version):
    frames = list(encoder.frames(weights.items(), version))
    encoder.commit()
    return frames


def sent(encoder, values, version=0):
    return push(encoder, named(values), version)


def take_all(decoder, frames):
    taken = dict(decoder.take(frame) for frame in frames)
    decoder.finish()
    return taken


SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-42, 1.0, 1.0000001]
VALUES = st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(width=32)), min_size=8, max_size=8)


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=1, max_size=10), st.sampled_from(DTYPES), st.integers(1, 5))
def test_every_push_arrives_to_the_bit(pushes, dtype, anchor):
    encoder, decoder = DeltaEncoder(dtype, anchor), DeltaDecoder()
    for version, values in enumerate(pushes):
        weights = named(values)
        taken = take_all(decoder, push(encoder, weights, version))
        assert {name: (t.shape, t.dtype, sha(t)) for name, t in taken.items()} == {
            name: (t.shape, dtype, sha(t.to(dtype))) for name, t in weights.items()
        }


@settings(max_examples=60)
@given(st.data(), st.integers(0, 1))
def test_any_flipped_bit_and_any_cut_is_refused(data, push):
    encoder, decoder = DeltaEncoder(torch.float32, ANCHOR), DeltaDecoder()
    for version in range(push):
        take_all(decoder, sent(encoder, [0.0] * 8, version))
    [frame, *_] = sent(encoder, [0.0] * 7 + [5.0], push)
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    flipped = bytearray(frame)
    flipped[bit // 8] ^= 1 << bit % 8
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]
    for broken in (bytes(flipped), cut):
        with pytest.raises(EngineError, match="torn or has a flipped bit"):
            decoder.take(broken)


@settings(max_examples=60)
@given(st.data())
def test_a_frame_that_is_dropped_doubled_or_swapped_is_refused(data):
    """Over three pushes without an anchor in between, from the first to the last of their frames."""
    encoder, decoder = DeltaEncoder(torch.float32, ANCHOR), DeltaDecoder()
    take_all(decoder, sent(encoder, [0.0] * 8))
    pushes = [sent(encoder, [float(n)] + [0.0] * 7, n) for n in (1, 2, 3)]
    frames = [frame for push in pushes for frame in push]
    at = data.draw(st.integers(0, len(frames) - 2))
    how = data.draw(st.sampled_from(["drop", "double", "swap"]))
    if how == "swap":
        frames[at], frames[at + 1] = frames[at + 1], frames[at]
    else:
        frames[at : at + 1] = [] if how == "drop" else [frames[at]] * 2
    with pytest.raises(EngineError, match="came out of order"):
        for frame in frames:
            decoder.take(frame)


def test_after_a_refusal_only_a_whole_push_is_taken():
    encoder, decoder = DeltaEncoder(torch.float32, ANCHOR), DeltaDecoder()
    take_all(decoder, sent(encoder, [0.0] * 8))
    frames = sent(encoder, [1.0] + [0.0] * 7, 1)
    with pytest.raises(EngineError, match=r"tensor 1 \(scalar\) of version 1 came out of order"):
        decoder.take(frames[1])
    with pytest.raises(EngineError, match="the last that was taken here is none; push the model whole"):
        decoder.take(frames[0])
    restarted = DeltaEncoder(torch.float32, ANCHOR)
    assert sha(take_all(decoder, sent(restarted, [2.0] * 8, 2))["matrix"]) == sha(named([2.0] * 8)["matrix"])


@pytest.mark.parametrize("taken", [1, 3], ids=["half", "whole"])
def test_a_push_that_was_not_committed_is_followed_by_a_whole_one(taken):
    encoder, decoder = DeltaEncoder(torch.float32, ANCHOR), DeltaDecoder()
    take_all(decoder, sent(encoder, [0.0] * 8))
    for frame, _ in zip(encoder.frames(named([1.0] * 8).items(), 1), range(taken), strict=False):
        decoder.take(frame)
    assert [header(frame)["index"] for frame in sent(encoder, [1.0] * 8, 2)] == [None] * 3


def test_a_push_that_stops_half_way_is_torn():
    encoder, decoder = DeltaEncoder(torch.float32, ANCHOR), DeltaDecoder()
    take_all(decoder, sent(encoder, [0.0] * 8))
    decoder.take(next(encoder.frames(named([1.0] * 8).items(), 1)))
    with pytest.raises(EngineError, match="a push of weights is torn: 3 tensors came, and not the last one"):
        decoder.finish()
    frames = sent(encoder, [1.0] * 8, 2)
    assert header(frames[0])["after"] == ""
    take_all(decoder, frames)


def test_a_held_tensor_that_changed_underneath_is_seen_by_the_digest_of_the_result():
    encoder, decoder = DeltaEncoder(torch.float32, ANCHOR), DeltaDecoder()
    taken = take_all(decoder, sent(encoder, [0.0] * 8))
    taken["matrix"][1, 2] = 3.0
    with pytest.raises(EngineError, match=r"tensor 0 \(matrix\) of version 1 results in"):
        decoder.take(sent(encoder, [1.0] + [0.0] * 7, 1)[0])


def test_only_changes_are_sent_whole_ones_where_that_is_smaller_and_at_anchors():
    values = np.zeros(1000, np.float32)
    encoder = DeltaEncoder(torch.float32, anchor=3)

    def changing(changed, version):
        values[:changed] += 1
        [frame, _] = push(encoder, {"w": torch.from_numpy(values), "same": torch.ones(5)}, version)
        return header(frame)["index"], len(frame)

    kinds = [changing(changed, version) for version, changed in enumerate([1000, 10, 500, 10, 499])]
    assert [kind for kind, _ in kinds] == [None, "int32", None, None, "int32"]
    assert kinds[1][1] < 500
    assert kinds[4][1] < 4500
    assert encoder.whole_bytes == 4020


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
def test_over_training_the_decoder_holds_what_the_trainer_holds_at_every_step(dtype, model_dir):
    """An adapter is merged into some layers, the others never change; the smallest steps are lost in bfloat16."""
    keys = SFTKeys(base_model=str(model_dir("llama")), datasets=[{"path": "unused.jsonl"}])
    policy = load_policy(keys)
    optimizer = torch.optim.AdamW([p for _, p in policy.trainable()], lr=2e-6, weight_decay=0.0)
    encoder, decoder = DeltaEncoder(dtype, anchor=10), DeltaDecoder()
    generator = torch.Generator().manual_seed(0)
    moved = []
    for step in range(200):
        frames = push(encoder, dict(policy.weights("all")), step)
        moved.append(sum(map(len, frames)))
        taken = take_all(decoder, frames)
        assert {name: sha(tensor) for name, tensor in taken.items()} == {
            name: sha(tensor.to(dtype)) for name, tensor in policy.weights("all")
        }
        ids = torch.randint(3, 40, (1, 24), generator=generator)
        policy.base(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved[0] > encoder.whole_bytes
    assert moved[10] > encoder.whole_bytes
    assert max(moved[1:10]) < (0.2 if dtype == torch.bfloat16 else 0.95) * encoder.whole_bytes


def test_in_files_they_arrive_at_new_receiving_ends_too_and_leave_nothing_behind(tmp_path, monkeypatch):
    """Of three pushes the last goes to a worker that was started anew."""
    monkeypatch.setattr(delta, "_PORTION_BYTES", 1)
    row = TRANSFERS["delta"]
    sender, ends = row.sender(TransferOptions(tmp_path, "bfloat16", ANCHOR)), []

    def moved(weights, version):
        taken = {}
        size = sender.send(iter(weights.items()), version, lambda message: taken.update(ends[-1].take(message)))
        ends[-1].finish()
        assert {name: sha(t) for name, t in taken.items()} == {name: sha(t.bfloat16()) for name, t in weights.items()}
        return size

    sender.connect(lambda message: ends.append(row.receiver(message)))
    first, second = named([1.0] * 4000), named([1.0] * 3999 + [7.5])
    whole, changed = moved(first, 0), moved(second, 1)
    assert changed.whole_bytes == whole.whole_bytes == 8002
    assert changed.num_bytes < whole.num_bytes / 5
    sender.connect(lambda message: ends.append(row.receiver(message)))
    moved(second, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_between_two_frames_is_torn(tmp_path):
    row = TRANSFERS["delta"]
    end = row.receiver({})

    def first_frame_only(message):
        path = Path(message["path"])
        data = path.read_bytes()
        path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
        list(end.take(message))

    row.sender(TransferOptions(tmp_path, "float32", ANCHOR)).send(iter(named([0.0] * 8).items()), 0, first_frame_only)
    with pytest.raises(EngineError, match="torn: 1 tensors came"):
        end.finish()
