"""Ranks meet at a store, wait there for rank 0, and an error that several share is said once. Each rank is a thread here."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
from tests.recovery.harness import start

from posttrain.distributed import meeting
from posttrain.distributed.launch import Launch
from posttrain.distributed.meeting import PeerFailedError, meet
from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.rollout.http import RefusedError


@pytest.fixture
def port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture
def on_ranks(port):
    """`on_ranks(2, f)`: what `f(meeting)` returns or raises, by rank; the last rank comes once `last_after` is set."""

    def call(world_size, work, *, last_after=None, say=lambda line: None, limit_s=60.0, present=None):
        results, held = [None] * world_size, []  # the store lives as long as rank 0's meeting

        def be(rank):
            if last_after is not None and rank == world_size - 1:
                last_after.wait(50)
            try:
                meeting = meet(Launch(rank, world_size, rank, "127.0.0.1", port), say, limit_s)
                held.append(meeting)
                results[rank] = work(meeting)
            except Exception as error:  # noqa: BLE001 - what a rank raises is what is looked at
                results[rank] = error

        threads = [threading.Thread(target=be, args=(rank,)) for rank in present or range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return call


def test_a_late_rank_is_waited_for_and_named(on_ranks, monkeypatch):
    monkeypatch.setattr("posttrain.distributed.meeting._NOTICE_S", 0.2)
    named = threading.Event()

    def say(line):
        if line == "waiting for rank 2 of 3":
            named.set()

    assert on_ranks(3, lambda meeting: meeting.launch.rank, last_after=named, say=say) == [0, 1, 2]
    assert named.is_set()


def test_a_rank_that_never_comes_ends_the_wait(on_ranks):
    first, second, _ = on_ranks(3, lambda meeting: None, limit_s=3.0, present=[0, 1])
    assert isinstance(first, ConfigError)
    assert "waited 3 s for rank 2 of 3" in str(first)
    assert isinstance(second, ConfigError)


def test_without_rank_0_nobody_keeps_a_store(on_ranks):
    _, alone = on_ranks(2, lambda meeting: None, limit_s=0.5, present=[1])
    assert isinstance(alone, ConfigError)
    assert "nobody keeps a store at 127.0.0.1" in str(alone)


def test_two_processes_with_one_rank_are_noticed(on_ranks, port):
    def twice(meeting):
        meet(Launch(1, 2, 1, "127.0.0.1", port), lambda line: None)

    _, second = on_ranks(2, lambda meeting: twice(meeting) if meeting.launch.rank else None)
    assert isinstance(second, ConfigError)
    assert "rank 1 is there twice" in str(second)


def test_a_rank_with_other_code_is_named_on_every_rank(on_ranks, monkeypatch):
    own = threading.local()
    monkeypatch.setattr(meeting, "code_digest", lambda: own.code)

    def be(here):
        own.code = "sha256:" + "012"[here.launch.rank // 2] * 64
        here.refuse_other_code()

    said = "rank 2 was started otherwise than rank 0: code of posttrain is 111111111111, on rank 0 000000000000; give"
    assert [type(error) for error in on_ranks(2, be)] == [type(None)] * 2
    assert all(str(error).startswith(said) for error in on_ranks(3, be))


def test_a_rank_that_does_not_say_which_code_it_runs_is_named(on_ranks, monkeypatch):
    monkeypatch.setattr(meeting, "_CODE_S", 0.2)

    def be(here):
        return here.refuse_other_code() if here.is_main else here.main_only(lambda: None, 5.0)

    first, second = on_ranks(2, be)
    assert "rank 1 was started otherwise than rank 0: code of posttrain is older, and does not say" in str(first)
    assert isinstance(second, ConfigError)


def test_what_rank_0_does_alone_the_others_wait_for(on_ranks):
    def work():
        time.sleep(0.4)
        return {"score": 0.5}

    assert on_ranks(3, lambda meeting: meeting.main_only(work, 5.0)) == [{"score": 0.5}] * 3


def test_an_error_of_the_user_on_rank_0_is_raised_on_every_rank(on_ranks):
    def work():
        raise DataError("train.jsonl:3: empty")

    found = on_ranks(2, lambda meeting: meeting.main_only(work, 5.0))
    assert [(type(error), str(error)) for error in found] == [(DataError, "train.jsonl:3: empty")] * 2


def raise_(error):
    raise error


def _all_errors(base=PosttrainError):
    return [base, *(error for below in base.__subclasses__() for error in _all_errors(below))]


def test_every_error_of_the_user_is_raised_on_every_rank_as_what_it_is(on_ranks):
    ours = [error for error in _all_errors() if error.__module__.startswith("posttrain.")]
    assert RefusedError in ours
    errors = [kind("the reason", *([404] if kind is RefusedError else [])) for kind in ours]

    def be(here):
        found = []
        for error in errors:
            with pytest.raises(PosttrainError) as caught:
                here.main_only(partial(raise_, error), 5.0)
            found.append((type(caught.value), str(caught.value)))
        return found

    _, second = on_ranks(2, be)
    assert second == [(kind, "the reason") for kind in ours]


def test_a_defect_on_rank_0_ends_the_others_without_a_word_of_their_own(on_ranks):
    def work():
        raise KeyError("x")

    first, second = on_ranks(2, lambda meeting: meeting.main_only(work, 5.0))
    assert isinstance(first, KeyError)
    assert isinstance(second, PeerFailedError)


def test_a_rank_0_that_gives_no_sign_of_life_is_not_waited_for(on_ranks):
    def be(meeting):
        if meeting.is_main:
            time.sleep(1.0)
            return None
        return meeting.main_only(lambda: None, 0.3)

    _, second = on_ranks(2, be)
    assert isinstance(second, PeerFailedError)
    assert "no sign of life for 0.3 s" in str(second)


def test_long_work_gives_signs_of_life(on_ranks, monkeypatch):
    monkeypatch.setattr("posttrain.distributed.meeting._BEAT_S", 0.1)
    assert on_ranks(2, lambda meeting: meeting.main_only(lambda: time.sleep(2.5), 2.0)) == [None, None]


def _says(here, error, said):
    """As `posttrain.cli.met` does it."""
    is_mine = here.is_mine_to_say(error)
    if is_mine:
        time.sleep(0.3)
        said.append(here.launch.rank)
        here.has_said()
    return is_mine


def test_an_error_that_all_have_is_said_by_rank_0_alone(on_ranks):
    said = []
    assert on_ranks(3, lambda here: _says(here, DataError("same"), said)) == [True, False, False]
    assert said == [0]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_that_one_rank_has_is_said_by_it_before_the_others_end(failing, on_ranks):
    """Of whom the first to end has its launcher end all."""
    said = []

    def be(here):
        if here.launch.rank == failing:
            return _says(here, DataError("mine"), said)
        return here.another_failed() and list(said)

    found = on_ranks(3, be)
    assert found == [True if rank == failing else [failing] for rank in range(3)]


def test_what_each_rank_does_is_on_rank_0_in_their_order(on_ranks):
    def work(meeting):
        first = meeting.each(lambda: time.sleep(0.2 * (meeting.launch.rank == 2)) or meeting.launch.rank, 5.0)
        return first, meeting.each(lambda: meeting.launch.rank + 10, 5.0)

    assert on_ranks(3, work) == [([0, 1, 2], [10, 11, 12]), ([], []), ([], [])]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_what_one_rank_raises_is_raised_on_all_and_they_go_on_together(on_ranks, failing):
    def work(meeting):
        def part():
            if meeting.launch.rank == failing:
                raise DataError("item 7 has no target")
            return meeting.launch.rank

        with pytest.raises(DataError, match="item 7 has no target"):
            meeting.each(part, 5.0)
        return meeting.main_only(lambda: "on", 5.0)

    assert on_ranks(3, work) == ["on", "on", "on"]


def test_a_defect_of_one_rank_is_named_by_its_rank(on_ranks):
    def work(meeting):
        meeting.each(lambda: 1 // (1 - meeting.launch.rank), 5.0)

    first, second = on_ranks(2, work)
    assert isinstance(first, PeerFailedError)
    assert "rank 1: ZeroDivisionError" in str(first)
    assert isinstance(second, ZeroDivisionError)


def test_a_part_may_take_longer_than_the_silence(on_ranks, monkeypatch):
    monkeypatch.setattr("posttrain.distributed.meeting._BEAT_S", 0.1)
    slow = on_ranks(2, lambda meeting: meeting.each(lambda: time.sleep(2.5 * meeting.launch.rank), 2.0))
    assert slow == [[None, None], []]


def test_a_rank_that_says_nothing_is_named(on_ranks):
    def work(meeting):
        return meeting.each(lambda: None, 0.5) if meeting.is_main else None

    first, _ = on_ranks(2, work)
    assert isinstance(first, PeerFailedError)
    assert "rank 1 gave no sign of life for 0.5 s" in str(first)


def test_a_rank_whose_store_went_with_rank_0_leaves_the_error_to_it(port):
    meetings = {}

    def be(rank):
        meetings[rank] = meet(Launch(rank, 2, rank, "127.0.0.1", port), lambda line: None)

    threads = [threading.Thread(target=be, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del meetings[0]
    assert not meetings[1].is_mine_to_say(DataError("item 7 has no target"))


def test_a_rank_does_not_wait_for_a_store_whose_keeper_stands_still(port, tmp_path, monkeypatch):
    """Its connection stays open, so that a question would wait for ever."""
    monkeypatch.setattr(meeting, "_ANSWER_S", 0.5)
    launch = Launch(0, 2, 0, "127.0.0.1", port)
    keeper = start(lambda: (meet(launch, print), time.sleep(60)), tmp_path / "err")
    mine = meet(replace(launch, rank=1), print)
    os.kill(keeper, signal.SIGSTOP)
    try:
        with pytest.raises(PeerFailedError, match="rank 0 gave no sign of life"):
            mine.main_only(lambda: None, 0.5)
        assert mine.another_failed()
        assert not mine.is_mine_to_say(ConfigError("x"))
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)
