"""Instructions of a teacher: asked once each, the same when asked again, none of them a repeat, and trainable as written."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.judge_server import CUT, judging

from posttrain.config.instruct import InstructKeys
from posttrain.config.load_data import load_data_keys
from posttrain.data.formats import detect_format
from posttrain.data.opened import read_rows
from posttrain.data.origin import data_origins, write_origin
from posttrain.errors import ConfigError, DataError, RewardError
from posttrain.synthesis.instruct import write_instructions

SEEDS = [
    {"prompt": [{"role": "user", "content": f"Name {n} rivers of a country in alphabetical order."}]} for n in range(6)
]
FILES = ("rows.jsonl", "left.jsonl", "report.json")


@pytest.fixture
def write(tmp_path):
    """`write(url, **keys)`: the keys of a teacher at this address that is shown six prompts."""

    def keys(url, rows=SEEDS, **changes):
        (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {
            "datasets": [{"path": "seeds.jsonl"}],
            "model": "teacher",
            "url": url,
            "retries": 0,
            "output_dir": "out",
        }
        (tmp_path / "instruct.yaml").write_text(json.dumps(given | changes))
        return load_data_keys(InstructKeys, "data instruct", tmp_path / "instruct.yaml")

    return keys


def read(keys, name="rows.jsonl"):
    return [json.loads(line) for line in Path(keys.output_dir, name).read_text().splitlines()]


def different(question, body):
    """A teacher that never says the same: five words that follow from its seed."""
    return " ".join(f"w{body['seed'] >> shift & 255}" for shift in range(0, 25, 5)) + f" of {body['seed']}"


def test_self_instruct_shows_several_and_each_question_is_asked_once(write):
    with judging(different) as (url, requests):
        keys = write(url, num_instructions=9)
        assert write_instructions(keys) == {"asked": 9, "rows": 9, "left": {}}
        assert len(requests) == 9
        assert all(request["messages"][-1]["content"].count("rivers") == 4 for request in requests)
        before = [Path(keys.output_dir, name).read_bytes() for name in FILES]
        write_instructions(keys)
        assert len(requests) == 9
        assert [Path(keys.output_dir, name).read_bytes() for name in FILES] == before
    rows = read(keys)
    assert {row["prompt"][0]["role"] for row in rows} == {"user"}
    assert [len(row["provenance"]["shown"]) for row in rows] == [4] * 9
    by_seed = {request["seed"]: request for request in requests}
    for row in rows:  # made again from its provenance
        assert row["prompt"][0]["content"] == different("", by_seed[row["provenance"]["seed"]])
    write_origin(Path(keys.datasets[0].path), {"made_by": "hand"})
    write_instructions(keys)
    origin = data_origins([f"{keys.output_dir}/rows.jsonl"])["rows.jsonl"]
    assert origin["method"] == "self_instruct"
    assert origin["data_origins"]["seeds.jsonl"]["made_by"] == "hand"
    assert (
        detect_format(
            read_rows(keys.datasets[0].model_copy(update={"path": f"{keys.output_dir}/rows.jsonl"})), "prompts"
        ).name
        == "prompt"
    )


def test_evolve_takes_each_prompt_and_repeats_of_it_leave(write):
    def parrot(question, body):
        (number,) = re.findall(r"Name (\d) rivers", question)
        text = f"Name {number} rivers of a country in alphabetical order."
        return text.upper() if int(number) < 2 else different(question, body)

    with judging(parrot) as (url, requests):
        keys = write(url, method="evolve")
        assert write_instructions(keys) == {"asked": 6, "rows": 4, "left": {"duplicate": 2}}
    assert sorted(re.findall(r"Name (\d)", str(requests))) == list("012345")
    assert read(keys, "left.jsonl")[0]["reason"] == "duplicate: the same as row 1 of datasets"


def test_back_translation_writes_the_question_to_an_answer(write):
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"The answer is {n}."}]}
        for n in range(3)
    ]

    def rule(question, body):
        return "What is it that comes out as number " + re.findall(r"answer is (\d)", question)[0]

    with judging(rule) as (url, _):
        keys = write(url, rows=rows, method="back_translate", dedup="exact")
        write_instructions(keys)
    assert [[m["content"] for m in row["messages"]] for row in read(keys)] == [
        [f"What is it that comes out as number {n}", f"The answer is {n}."] for n in range(3)
    ]


def test_rows_without_an_answer_are_named_and_where_no_other_is_there_that_is_an_error(write):
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": said}]}
        for said in ("", "Two rivers meet here.")
    ]
    with judging(different) as (url, requests):
        keys = write(url, rows=rows, method="back_translate")
        assert write_instructions(keys) == {"asked": 1, "rows": 1, "left": {"skipped": 1}}
        (left,) = read(keys, "left.jsonl")
        assert left["origin"].endswith("seeds.jsonl:1")
        for number in (None, 3):
            with pytest.raises(DataError, match=r"seeds.jsonl: has no row that can be shown to a teacher: "):
                write_instructions(write(url, rows=rows[:1], method="back_translate", num_instructions=number))
        assert len(requests) == 1


def test_prompts_of_a_suite_and_overlong_and_empty_ones_leave(write, tmp_path):
    (tmp_path / "heldout.jsonl").write_text(
        json.dumps({"id": "1", "prompt": "name all of the rivers in Peru", "target": "x"}) + "\n"
    )
    says = {0: "Please name all of the rivers in Peru now", 1: " ", 2: "far " * 30}

    def rule(question, body):
        return says.get(int(re.findall(r"Name (\d)", question)[0])) or different(question, body)

    with judging(lambda q, b: " " if "Name 1 " in q else rule(q, b)) as (url, _):
        keys = write(url, method="evolve", max_chars=60, decontaminate=["heldout.jsonl"])
        assert write_instructions(keys)["left"] == {"length": 2, "contaminated": 1}


def test_where_no_instruction_is_left_none_of_an_earlier_choice_lies_there(write):
    with judging(different) as (url, requests):
        keys = write(url, method="evolve")
        write_instructions(keys)
        with pytest.raises(DataError, match="no instruction is left of 6: length: "):
            write_instructions(write(url, method="evolve", max_chars=1))
        assert not Path(keys.output_dir, "rows.jsonl").exists()
        assert len(requests) == 6


def test_an_instruction_that_was_cut_leaves_also_when_it_is_read_again_and_may_be_kept(write):
    def rule(question, body):
        return different(question, body) + (CUT if "Name 2 " in question else "")

    with judging(rule) as (url, requests):
        for _ in range(2):
            assert write_instructions(write(url, method="evolve"))["left"] == {"cut": 1}
        assert write_instructions(write(url, method="evolve", keep_truncated=True))["left"] == {}
        assert len(requests) == 6


def test_what_a_teacher_thinks_is_no_part_of_the_instruction(write):
    says = {
        0: "<think>Rivers, then.</think>\n\nName all rivers.",
        1: "So lakes it is.</think>Name all lakes of one place.",
        2: "<think>Hm",
    }

    def rule(question, body):
        return says.get(int(re.findall(r"Name (\d)", question)[0])) or different(question, body)

    with judging(rule) as (url, _):
        keys = write(url, method="evolve")
        assert write_instructions(keys)["left"] == {"length": 1}
    assert [row["prompt"][0]["content"] for row in read(keys)[:2]] == [
        "Name all rivers.",
        "Name all lakes of one place.",
    ]


def test_a_run_that_is_killed_asks_only_what_is_missing_and_ends_with_the_same_bytes(write, tmp_path):
    with judging(different) as (url, _):
        whole = write(url, num_instructions=12, at_once=1, output_dir="whole")
        write_instructions(whole)
    gate = threading.Semaphore(5)

    def slowly(question, body):
        gate.acquire()
        return different(question, body)

    with judging(slowly) as (url, requests):
        killed = write(url, num_instructions=12, at_once=1, output_dir="killed")
        command = [sys.executable, "-m", "posttrain.cli.app", "data", "instruct", str(tmp_path / "instruct.yaml")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").rglob("replies/*/*.json"))) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        gate.release(100)
        asked = len(requests)
        write_instructions(killed)
        assert len(requests) - asked == 7
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_teacher_that_is_not_there_is_one_error_and_one_that_refuses_leaves_its_reason(write):
    with judging(different) as (url, _):
        pass
    with pytest.raises((DataError, RewardError), match=r"did not answer|no answer yet"):
        write_instructions(write(url))
    with judging(different, failures=[400, 400]) as (url, _):
        keys = write(url, method="evolve", at_once=1)
        assert write_instructions(keys)["left"] == {"unanswered": 2}
        assert write_instructions(keys)["left"] == {}, "started again, it is asked again"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "Write a task."}, r"prompt: has no \{shown\}"),
        ({"method": "evolve", "num_shown": 2}, "num_shown does nothing with method: evolve"),
        ({"url": "localhost:8000"}, "expected http://HOST"),
        ({"methode": "evolve"}, "did you mean method"),
        ({"datasets": [{"path": "seeds.jsonl", "val_size": 1}]}, "datasets: val_size of entry 1 does nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said, write):
    with pytest.raises(ConfigError, match=said):
        write(**{"url": "http://127.0.0.1:1/v1", **changes})


@pytest.mark.skipif(any(find_spec(name) is None for name in ("fastapi", "uvicorn", "llguidance", "prometheus_client")), reason="a server needs posttrain[serve]")  # fmt: skip
def test_our_own_server_teaches_the_same_twice_and_as_the_model_in_this_process(write, make_model_in, tmp_path):
    from tests.serving import serving

    folder = make_model_in(tmp_path / "served" / "teacher", "qwen3", initializer_range=0.2)
    options = {"method": "evolve", "max_tokens": 12, "keep_truncated": True, "dedup": "off", "at_once": 2}
    said = []
    with serving(folder) as address:
        for out in ("first", "second"):
            keys = write(f"{address}/v1", output_dir=out, **options)
            write_instructions(keys)
            said.append(read(keys))
    assert said[0] == said[1]
    assert len(said[0]) == 6
    here = write(None, model=str(folder), output_dir="here", **options)
    assert write_instructions(here)["rows"] == 6
    assert str(tmp_path) not in Path(here.output_dir, "rows.jsonl").read_text(), (
        "no place of this machine is written down"
    )
