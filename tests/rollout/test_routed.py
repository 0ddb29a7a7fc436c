"""Routed experts of completions: joined, as text, and as vLLM says them."""

import numpy as np
import pytest

from posttrain.errors import EngineError
from posttrain.rollout.routed import experts_along, of_sampled, routed_of, routed_text
from posttrain.types import Completion


def completion(*rows, dtype=np.uint8):
    routed = np.array(rows, dtype).reshape(len(rows), 1, 1)
    return Completion(tuple(range(len(rows))), (0.0,) * len(rows), "stop", 0, routed_experts=routed)


def test_what_was_written_between_two_turns_has_zeros():
    found = experts_along([(completion(3, 4), 2), (completion(5), 1)])
    assert found is not None and found[:, 0, 0].tolist() == [3, 4, 0, 0, 5, 0] and found.dtype == np.uint8


def test_an_answer_of_nothing_has_nothing():
    """As an engine gives one that it ended before the first token."""
    nothing = Completion((), (), "aborted", 0)
    found = experts_along([(completion(3), 0), (nothing, 1)])
    assert found is not None and found[:, 0, 0].tolist() == [3, 0]
    assert experts_along([(nothing, 2)]) is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_text_and_back(dtype):
    routed = np.arange(12).reshape(3, 2, 2).astype(dtype)
    found = routed_of(routed_text(routed))
    assert found.dtype == dtype and np.array_equal(found, routed)


@pytest.mark.parametrize("text", ["", "no base64!", "AAAA"])
def test_a_text_that_is_no_array_is_refused(text):
    with pytest.raises(EngineError, match=r"expected an \.npy file in base64"):
        routed_of(text)


def test_of_what_vllm_says_of_all_ids_but_the_last_those_before_a_sampled_one_are_taken():
    routed = np.arange(4).reshape(4, 1, 1)  # a prompt of 3, of which 2 were sampled: the last was never run
    assert of_sampled(routed, 3, 2, "vLLM")[:, 0, 0].tolist() == [2, 3]


@pytest.mark.parametrize(("routed", "got"), [(None, "of none"), (np.zeros((3, 1, 1)), "of 3 tokens")])
def test_an_engine_that_says_less_is_named(routed, got):
    with pytest.raises(EngineError, match=f"vLLM gave routed experts {got}, expected 4.*enable-return-routed-experts"):
        of_sampled(routed, 3, 2, "vLLM")
