"""Groups of samples as arrays: nothing is lost, what is shared is stored once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rollout.experience import from_arrays, to_arrays
from posttrain.types import STREAMS, Sample


def sample(prompt, answer, mask=None, **streams):
    mask = [True] * len(answer) if mask is None else mask
    ids = np.array([*prompt, *answer], np.int32)
    return Sample(ids, np.array([False] * len(prompt) + list(mask), np.bool_), **streams)


def same(one, other):
    for name in ("ids", "loss_mask", *STREAMS):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"), name


@st.composite
def groups(draw):
    made = []
    for _ in range(draw(st.integers(0, 3))):
        prompt = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
        members = []
        for _ in range(draw(st.integers(1, 4))):
            answer = draw(st.lists(st.integers(0, 9), max_size=6))
            mask = draw(st.lists(st.booleans(), min_size=len(answer), max_size=len(answer)))
            streams = {}
            for name, dtype in STREAMS.items():
                how = draw(st.sampled_from(["absent", "constant", "whole"]))
                width = () if dtype else (2, 3)
                dtype = dtype or np.uint16
                if how == "constant":
                    value = np.full(width, draw(st.integers(0, 3))).astype(dtype)
                    streams[name] = np.broadcast_to(value, (sum(mask), *width))
                elif how == "whole":
                    values = draw(st.lists(st.integers(0, 3), min_size=sum(mask), max_size=sum(mask)))
                    streams[name] = np.array([np.full(width, value) for value in values], dtype).reshape(-1, *width)
            members.append(sample(prompt, answer, mask, **streams))
        made.append(tuple(members))
    return tuple(made)


@settings(max_examples=60)
@given(groups())
def test_what_goes_in_comes_out(made):
    found = from_arrays(to_arrays(made))
    assert [len(group) for group in found] == [len(group) for group in made]
    for one, other in zip(made, found, strict=True):
        for a, b in zip(one, other, strict=True):
            same(a, b)


def batch(num_groups=8, size=8, prompt=200, answer=100):
    rng = np.random.default_rng(0)
    made = []
    for _ in range(num_groups):
        start = rng.integers(0, 9000, prompt)
        members = []
        for _ in range(size):
            logp = -rng.random(answer).astype(np.float32)
            one = sample(start, rng.integers(0, 9000, answer), behavior_logp=logp, ref_logp=logp - 1)
            members.append(
                Sample(
                    one.ids,
                    one.loss_mask,
                    logp,
                    one.constant(0.5),
                    ref_logp=logp - 1,
                    policy_version=np.full(answer, 3, np.int32),
                )
            )
        made.append(tuple(members))
    return tuple(made)


def test_a_token_of_grpo_with_a_reference_takes_at_most_twenty_bytes():
    made = batch()
    size = sum(values.nbytes for values in to_arrays(made).values())
    tokens = sum(s.num_loss_tokens for group in made for s in group)
    # 12 for id and two log-probs, an eighth for the mask, and the prompts, which their groups share.
    assert size / tokens <= 20 and size / tokens == pytest.approx(12.1 + 4 * 8 * 200 / tokens, abs=0.5)


def test_a_stream_of_the_wrong_length_is_our_mistake():
    with pytest.raises(AssertionError):
        sample([1, 2], [3, 4], behavior_logp=np.zeros(3, np.float32))
    with pytest.raises(AssertionError, match="first token"):
        Sample(np.array([1, 2], np.int32), np.array([True, True]))
