import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tests.processes import all_gone

from posttrain.errors import ConfigError, RewardError
from posttrain.rewards.workers import CHUNK_SIZE, MAX_UNSCORED, RewardPool
from posttrain.types import RewardBreakdown

REWARDS = r"""
import asyncio, ctypes, math, os, sys, time

def bad(prompts, completions):
    if "hang" in completions:
        time.sleep(1000)
    if "spin" in completions:
        9 ** 9 ** 9
    if "exit" in completions:
        os._exit(3)
    if "segfault" in completions:
        ctypes.string_at(0)
    if "stop" in completions:
        sys.exit(0)
    if "raise" in completions:
        raise ValueError("not this one")
    if "memory" in completions:
        bytearray(1 << 45)
    values = {"nan": math.nan, "inf": math.inf, "text": "1", "none": None, "true": True, "object": object()}
    return [values.get(c, 1.0) for c in completions]

def length(completions, **columns):
    print("noise on stdout")
    return [float(len(c)) for c in completions]

async def slow(completions):
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)

def short(completions):
    return [1.0]

def scalar(completions):
    return 1.0

def needs(completions, answer):
    return [float(c == a) for c, a in zip(completions, answer)]

def pid(completions):
    return [float(os.getpid())] * len(completions)

def slow_pid(completions):
    time.sleep(0.2)
    return pid(completions)

def modules(completions):
    return [float("torch" in sys.modules)] * len(completions)

def forever(completions):
    time.sleep(1000)

def mutating(prompts, completions):
    if "clear" in completions:
        completions.clear()
    if "pop" in completions:
        completions.pop(completions.index("pop"))
    if "sort" in completions:
        completions.sort(reverse=True)
    if "prompts" in completions:
        prompts.append("one more")
    return [float(len(c)) for c in completions]

def descriptors():
    # Pipes have high numbers where whoever made them had many files open.
    return [number for name in os.listdir("/proc/self/fd") if (number := int(name)) > 2]

def scribbling(completions):
    for word in ("garbage", "line\n", '{"values": [9], "reasons": [null]}\n'):
        if word in completions:
            for descriptor in descriptors():
                try:
                    os.write(descriptor, word.encode())
                except OSError:
                    pass
    if "close" in completions:
        os.closerange(3, max(descriptors()) + 1)
    return [1.0] * len(completions)

def daemon(prompts, completions):
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open(f"{prompts[0]}/{os.getpid()}", "w").close()
            os.close(write)
            time.sleep(1000)
        os._exit(0)
    os.close(write)
    os.read(read, 1)  # until the daemon runs
    if "exit" in completions:
        os._exit(3)
    return [1.0] * len(completions)

def crashing(completions):
    if "exit" in completions:
        os._exit(3)
    if "wait" in completions:
        time.sleep(0.3)
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "r.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def bad(folder):
    with RewardPool(["r.py:bad"], timeout_s=0.7, folder=folder) as pool:
        yield pool


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("hang", "took longer than 0.7 s and was killed"),
        ("spin", "took longer than 0.7 s and was killed"),
        ("exit", "the reward process died (exit status 3)"),
        ("segfault", "killed by SIGSEGV"),
        ("stop", "raised SystemExit"),
        ("raise", "raised ValueError: not this one (r.py:"),
        ("memory", "raised MemoryError"),
        ("nan", "returned nan"),
        ("inf", "returned inf"),
        ("text", "returned str '1', expected a number or None"),
        ("object", "returned object, expected a number or None"),
    ],
)
def test_a_failure_costs_its_own_completion_and_is_never_zero(bad, text, reason):
    scores = bad.score(["p"] * 4, ["a", text, "b", "c"])
    assert [s.total for s in scores] == [1.0, None, 1.0, 1.0]
    assert scores[1].parts == {"bad": None}
    assert reason in scores[1].error


def test_none_is_a_choice_and_true_is_a_number(bad):
    none, true = bad.score(["p"] * 2, ["none", "true"])
    assert none == RewardBreakdown(None, {"bad": None}, None)
    assert true.total == 1.0


def test_the_total_is_the_weighted_sum_of_what_was_scored(folder):
    with RewardPool(["r.py:bad", "r.py:length", "r.py:slow"], [2.0, 0.1, 1.0], folder=folder) as pool:
        scored, none, failed = pool.score(["p"] * 3, ["ok", "none", "raise"])
    assert scored.total == pytest.approx(2.0 + 0.2 + 0.5)
    assert none.total == pytest.approx(0.4 + 0.5)  # as TRL's nansum
    assert failed.total is None and failed.parts == {"bad": None, "length": 5.0, "slow": 0.5}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "returned 1 values for 3 completions"),
        ("scalar", "returned float for 3 completions"),
        ("needs", "needs the column answer; the dataset has topic"),
    ],
)
def test_a_broken_contract_is_an_error_and_the_pool_lives_on(folder, name, message):
    with RewardPool([f"r.py:{name}"], folder=folder) as pool:
        for _ in range(2):
            with pytest.raises(RewardError, match=message):
                pool.score(["p"] * 3, ["c"] * 3, {"topic": [1, 2, 3]})
        if name == "needs":
            assert pool.score(["p"], ["c"], {"answer": ["c"]})[0].total == 1.0


def test_results_do_not_depend_on_the_number_of_workers(folder):
    texts = ["x" * (i % 7) if i % 11 else "raise" for i in range(3 * CHUNK_SIZE + 5)]
    results = []
    for num_workers in (1, 3):
        with RewardPool(["r.py:bad", "r.py:length"], num_workers=num_workers, folder=folder) as pool:
            results.append(pool.score(["p"] * len(texts), texts))
    assert results[0] == results[1]


def test_work_is_spread_over_the_workers(folder):
    with RewardPool(["r.py:pid"], num_workers=2, folder=folder) as pool:
        pids = {s.total for s in pool.score(["p"] * 8 * CHUNK_SIZE, ["c"] * 8 * CHUNK_SIZE)}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


def test_workers_import_no_torch_and_chat_completions_arrive_whole(folder):
    with RewardPool(["r.py:modules", "boxed"], folder=folder) as pool:
        score = pool.score(
            [[{"role": "user", "content": "?"}]], [[{"role": "assistant", "content": r"\boxed{4}"}]], {"answer": ["4"]}
        )[0]
    assert score.parts == {"modules": 0.0, "boxed": 1.0}


def test_load_failures_are_reported_before_the_first_call(folder):
    (folder / "broken.py").write_text("import nothing_like_this\ndef f(completions): pass")
    with (
        pytest.raises(ConfigError, match=r"broken\.py:1: importing the reward file raised ModuleNotFoundError"),
        RewardPool(["broken.py:f"], folder=folder),
    ):
        pass
    with pytest.raises(ConfigError, match="no function 'g'"):
        RewardPool(["broken.py:g"], folder=folder)
    with pytest.raises(ConfigError, match="reward_weights has 2 entries for 1"):
        RewardPool(["boxed"], [1, 2])
    with pytest.raises(ConfigError, match=r"reward_weights: got \[nan\]; expected finite numbers"):
        RewardPool(["boxed"], [float("nan")])
    with pytest.raises(ConfigError, match="no reward 'length'"):
        RewardPool(["boxed"], kwargs={"length": {}})


def test_big_texts_and_surrogates_pass_through(folder):
    with RewardPool(["r.py:length"], folder=folder) as pool:
        assert [s.total for s in pool.score(["p"] * 2, ["a" * 3_000_000, "\ud800"])] == [3_000_000, 1]


@pytest.mark.parametrize("reward", ["forever", "daemon"])
def test_workers_and_what_they_started_die_with_the_process_that_started_them(folder, tmp_path, reward):
    program = (
        "import os, sys, threading, time\nfrom pathlib import Path\nfrom posttrain.rewards.workers import RewardPool\n"
        f"pool = RewardPool(['r.py:{reward}'], timeout_s=100, folder=Path({str(folder)!r}))\npool.__enter__()\n"
        f"Path({str(tmp_path)!r}, str(pool._workers[0].process.supervisor.pid)).touch()\n"
        f"Path({str(tmp_path)!r}, str(pool._workers[0].process.pid)).touch()\n"
        f"threading.Timer(1.0, lambda: os.kill(os.getpid(), 9)).start()\npool.score([{str(tmp_path)!r}], ['c'])\ntime.sleep(100)"
    )
    subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == (3 if reward == "daemon" else 2)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(is_alive, pids)):
        time.sleep(0.1)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("text", ["clear", "pop", "prompts"])
def test_a_reward_that_changes_its_inputs_costs_its_own_completions(folder, text):
    with RewardPool(["r.py:mutating"], timeout_s=30, folder=folder) as pool:
        scores = pool.score(["p"] * 4, ["a", "bb", text, "ccc"])
    assert [s.total for s in scores] == [1.0, 2.0, None, 3.0]
    assert "in place" in scores[2].error


def test_a_reward_that_sorts_its_inputs_gives_each_completion_its_own_score(folder):
    with RewardPool(["r.py:mutating"], timeout_s=30, folder=folder) as pool:
        scores = pool.score(["p"] * 4, ["a", "bb", "sort", "ccc"])
    assert [s.total for s in scores] == [1.0, 2.0, 4.0, 3.0]


@pytest.mark.parametrize("text", ["garbage", "line\n", '{"values": [9], "reasons": [null]}\n', "close"])
def test_a_reward_that_writes_to_the_answer_pipe_costs_its_own_completions(folder, text):
    with RewardPool(["r.py:scribbling"], timeout_s=30, num_workers=2, folder=folder) as pool:
        scores = pool.score(["p"] * 3, ["a", text, "b"])
        assert [s.total for s in scores] == [1.0, None, 1.0]
        assert [s.total for s in pool.score(["p"] * 2, ["a", "b"])] == [1.0, 1.0]


def test_replacing_one_worker_takes_no_time_from_the_others(folder):
    """Both answers lie in their pipes before the dead worker's successor has loaded a slow file."""
    (folder / "slow_start.py").write_text("import time\ntime.sleep(1.5)\n" + REWARDS)
    texts = (["exit"] + ["a"] * (CHUNK_SIZE - 1)) + ["wait"] * 3 * CHUNK_SIZE
    with RewardPool(["slow_start.py:crashing"], timeout_s=1.2, num_workers=2, folder=folder) as pool:
        scores = pool.score(["p"] * len(texts), texts)
    assert [i for i, s in enumerate(scores) if s.total is None] == [0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("doing", ["idle", "scoring"])
def test_a_worker_struck_from_outside_costs_at_most_what_it_had(folder, how, doing):
    asked = ["a"] * 4 * CHUNK_SIZE
    with RewardPool(["r.py:slow_pid"], timeout_s=2.0, num_workers=2, folder=folder) as pool:
        [struck, *_] = sorted({int(one.total) for one in pool.score(asked, asked, {})})
        timer = threading.Timer(0.0 if doing == "idle" else 0.1, os.kill, [struck, how])
        timer.start()
        if doing == "idle":
            timer.join()
        found = pool.score(asked, asked, {}, max_unscored=1.0)
        assert sum(one.total is None for one in found) <= CHUNK_SIZE
        again = pool.score(asked, asked, {})
        assert all(one.total is not None and int(one.total) != struck for one in again)
        assert all_gone([struck])


@pytest.mark.parametrize("text", ["stay", "exit"])
def test_a_daemon_that_a_reward_leaves_behind_is_reaped(folder, tmp_path, text):
    with RewardPool(["r.py:daemon"], timeout_s=30, folder=folder) as pool:
        pool.score([str(tmp_path)], [text])
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) >= 1
    assert [pid for pid in pids if is_alive(pid)] == []


def test_a_hanging_reward_is_given_up_once_too_many_completions_are_unscored(folder):
    started = time.monotonic()
    with (
        RewardPool(["r.py:forever"], timeout_s=0.3, num_workers=2, folder=folder) as pool,
        pytest.raises(RewardError, match=r"of 512 completions are unscored.*at most 1% may be.*took longer than 0.3 s"),
    ):
        pool.score(["p"] * 512, ["c"] * 512, max_unscored=0.01)
    assert time.monotonic() - started < 60


def test_a_reward_that_answers_nothing_at_all_is_given_up(folder):
    with (
        RewardPool(["r.py:length", "r.py:forever"], timeout_s=0.2, folder=folder) as pool,
        pytest.raises(RewardError, match=r"reward 'forever' has not answered yet: each of 8 completions took longer"),
    ):
        pool.score(["p"] * 512, ["c"] * 512)


def is_alive(pid):
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_too_many_unscored_is_an_error_with_counts_and_reasons(bad):
    bad.score([], [], max_unscored=MAX_UNSCORED)
    bad.score(["p"] * 10, ["a"] * 9 + ["raise"], max_unscored=MAX_UNSCORED)
    with pytest.raises(
        RewardError,
        match=r"2 of 10 completions are unscored already; at most 10% may be.*bad: raised ValueError: not this one",
    ):
        bad.score(["p"] * 10, ["a"] * 8 + ["raise"] * 2, max_unscored=MAX_UNSCORED)
    with pytest.raises(RewardError, match="every reward returned None"):
        bad.score(["p"] * 4, ["a"] * 2 + ["none"] * 2, max_unscored=MAX_UNSCORED)


class Unsendable:
    """What would be pickled into a request says so."""

    def __reduce__(self):
        raise AssertionError("was sent")


@pytest.mark.parametrize("spec", ["r.py:needs", "boxed", "json_schema"])
def test_columns_that_a_reward_does_not_take_are_not_sent(folder, spec):
    columns = {
        "answer": ["1", "2"],
        "schema": [{}, {}],
        "completion_ids": [Unsendable()] * 2,
        "other": [Unsendable()] * 2,
    }
    with RewardPool([spec], folder=folder) as pool:
        assert len(pool.score(["", ""], ["1", "2"], columns)) == 2
        columns.pop("answer" if spec != "json_schema" else "schema")
        with pytest.raises(
            RewardError, match=r"the dataset has .*completion_ids, other"
        ):  # the message names all of them
            pool.score(["", ""], ["1", "2"], {**columns, "completion_ids": [[1], [2]], "other": [1, 2]})
    with RewardPool(["r.py:length"], folder=folder) as pool, pytest.raises(AssertionError, match="was sent"):
        pool.score(["", ""], ["1", "2"], columns)
