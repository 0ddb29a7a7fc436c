"""Rows made of samples: what is kept is what the rewards say, every other completion has its reason, and all can be made again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from datetime import date
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from posttrain.cli.app import main
from posttrain.config.load_data import load_data_keys
from posttrain.config.synth import SynthKeys
from posttrain.data.origin import data_origins, write_origin
from posttrain.errors import ConfigError, DamagedFileError, DataError
from posttrain.evals.run import pass_at_k
from posttrain.models.provenance import source_digest
from posttrain.synthesis.synth import remake, synthesize

REWARDS = """
import glob, os, time

def held(prompts, completions, **columns):
    beside = os.path.dirname(os.path.abspath(__file__))
    while os.path.exists(f"{beside}/hold") and len(glob.glob(f"{beside}/killed/samples/part*")) >= 2:
        time.sleep(0.01)
    return even(prompts, completions)

def even(prompts, completions, **columns):
    return [float(sum(map(ord, _text(c))) % 2 == 0) for c in completions]

def graded(prompts, completions, **columns):
    return [sum(map(ord, _text(c))) % 7 / 7 for c in completions]

def _text(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]
"""


@pytest.fixture
def make(tmp_path, model_dir):
    """`make(keep="pairs")`: the keys of a folder with eight prompts, two of which are the same."""
    prompts = [
        {"prompt": [{"role": "user", "content": f"What is {n} plus 1?"}], "answer": str(n + 1), "kind": "odd" if n % 3 else "even"}
        for n in range(7)
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*prompts, prompts[0]]))
    (tmp_path / "rewards.py").write_text(REWARDS)

    def keys(**changes):
        given = {
            "base_model": str(model_dir("qwen3")), "datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:even"],
            "num_generations": 4, "max_completion_length": 6, "keep_truncated": True, "prompts_per_part": 3, "seed": 5,
        } | changes  # fmt: skip
        (tmp_path / "synth.yaml").write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
        return load_data_keys(SynthKeys, "data synth", tmp_path / "synth.yaml")

    return keys


def read(keys, name="rows.jsonl"):
    with open(f"{keys.output_dir}/{name}") as lines:
        return [json.loads(line) for line in lines]


def samples(keys):
    """Every completion by prompt, as the parts on disk hold them."""
    folder = f"{keys.output_dir}/samples"
    return {
        one["prompt"]: one["candidates"] for name in sorted(os.listdir(folder)) for one in json.loads(Path(folder, name).read_text())
    }  # fmt: skip


def test_all_correct_keeps_what_is_correct_and_every_other_completion_has_its_reason(make):
    keys = make()
    report = synthesize(keys)
    rows, left, made = read(keys), read(keys, "left.jsonl"), samples(keys)
    kept = {(row["provenance"]["prompt"], row["provenance"]["samples"][0]) for row in rows}
    gone = {(row["prompt"], row["sample"]) for row in left if "sample" in row}
    assert kept.isdisjoint(gone)
    assert kept | gone == {(name, n) for name, found in made.items() for n in range(len(found))}
    assert all(row["provenance"]["rewards"] == [1.0] for row in rows)
    assert rows and report["rows"] == len(rows)
    for row in left:
        if row["reason"].startswith("not correct"):
            assert row["reward"] == 0.0
    assert sum(report["left"].values()) == len(left)
    assert report["left"]["duplicate prompt"] == 1
    assert set(rows[0]) == {"messages", "provenance"}
    assert rows[0]["messages"][-1]["role"] == "assistant"


def test_a_prompt_that_cannot_be_asked_is_named_with_why(make, tmp_path):
    keys = make(sequence_len=60)
    with (tmp_path / "prompts.jsonl").open("a") as prompts:
        prompts.write(json.dumps({"prompt": "far too long " * 30}) + "\n")
    report = synthesize(keys)
    (left,) = [row for row in read(keys, "left.jsonl") if "origin" in row]
    assert left["origin"].endswith("prompts.jsonl:9")
    assert left["reason"] == "skipped: longer than sequence_len"
    assert report["left"]["skipped"] == 1


def test_a_prompt_with_a_column_that_is_no_json_is_named(make, tmp_path):
    (tmp_path / "nan.jsonl").write_text('{"prompt": "a", "score": NaN}\n')
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "when": [date(2020, 1, 1)]}), tmp_path / "day.parquet")
    for name in ("nan.jsonl", "day.parquet"):
        with pytest.raises(DataError, match=rf"{name}:1: a column is no JSON, .*; write it as text, or take it out"):
            synthesize(make(datasets=[{"path": name}]))


def test_in_a_pair_the_chosen_reward_is_always_higher_and_by_the_margin_where_one_is_asked_for(make):
    for margin in (0.0, 0.3):
        keys = make(keep="pairs", reward_funcs=["rewards.py:graded"], num_generations=6, min_margin=margin, output_dir=f"m{margin}")  # fmt: skip
        synthesize(keys)
        rows, made = read(keys), samples(keys)
        assert len(rows) >= 7
        for row in rows:
            found = made[row["provenance"]["prompt"]]
            better, worse = (found[n] for n in row["provenance"]["samples"])
            assert better["reward"] - worse["reward"] > margin
            assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == (better["text"], worse["text"])


def test_top1_is_the_best_of_each_prompt_and_min_reward_sets_its_floor(make):
    keys = make(keep="top1", reward_funcs=["rewards.py:graded"])
    synthesize(keys)
    made = samples(keys)
    best = {name: max(one["reward"] for one in found) for name, found in made.items()}
    assert {row["provenance"]["prompt"]: row["provenance"]["rewards"][0] for row in read(keys)} == best
    floor = sorted(best.values())[3]
    synthesize(make(keep="top1", reward_funcs=["rewards.py:graded"], min_reward=floor))
    assert len(read(keys)) == sum(reward >= floor for reward in best.values()) < len(best)


def test_the_difficulty_window_is_that_of_a_recount(make):
    keys = make(keep="prompts", keep_truncated=None, difficulty={"k": 2, "min": 0.2, "max": 0.9})
    synthesize(keys)
    wanted = {
        name
        for name, found in samples(keys).items()
        if 0.2 <= pass_at_k(len(found), sum(one["reward"] >= 1 for one in found), 2) <= 0.9
    }
    rows = read(keys)
    assert {row["provenance"]["prompt"] for row in rows} == wanted
    assert 0 < len(wanted) < 7
    assert all(row["answer"] and row["prompt"][0]["role"] == "user" for row in rows)


def test_a_row_is_made_again_to_the_byte_and_a_changed_one_is_seen(make):
    keys = make()
    synthesize(keys)
    assert len(remake(keys)) == len(read(keys))
    assert all(same for _, same in remake(keys))
    path = f"{keys.output_dir}/rows.jsonl"
    lines = Path(path).read_text().splitlines()
    changed = json.loads(lines[1])
    changed["messages"][-1]["content"] += "."
    Path(path).write_text("\n".join([lines[0], json.dumps(changed, ensure_ascii=False), *lines[2:]]) + "\n")
    assert remake(keys, [1, 2]) == [(1, True), (2, False)]
    with pytest.raises(DataError, match=r"has no line 99; expected 1 to"):
        remake(keys, [99])


def test_a_row_whose_provenance_was_edited_differs(make):
    keys = make()
    synthesize(keys)
    path = Path(keys.output_dir, "rows.jsonl")
    rows = read(keys)
    del rows[0]["provenance"]
    rows[1]["provenance"]["prompt"] = "another"
    rows[2]["provenance"]["samples"] = [99]
    rows[3]["provenance"]["samples"] = "0"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert remake(keys, [1, 2, 3, 4, 5]) == [(1, False), (2, False), (3, False), (4, False), (5, True)]


def test_what_only_selects_may_change_and_what_samples_may_not(make):
    first = make()
    synthesize(first)
    before = samples(first)
    synthesize(make(keep="top1"))
    assert samples(first) == before
    assert len(read(first)) == 7
    with pytest.raises(
        ConfigError, match=r"made with another rewards and seed; put it back, or set another output_dir"
    ):
        synthesize(make(seed=6, reward_funcs=["rewards.py:graded"]))
    with pytest.raises(ConfigError, match="made with another bf16"):
        synthesize(make(bf16=True))
    with pytest.raises(ConfigError, match="made with another revision"):
        synthesize(make(revision="main"))


def test_a_damaged_part_is_named_with_what_to_do(make):
    keys = make()
    synthesize(keys)
    part = f"{keys.output_dir}/samples/part-00001.json"
    Path(part).write_text("[{")
    with pytest.raises(DamagedFileError, match=r"part-00001.json.*start again: it is sampled anew"):
        synthesize(keys)
    before = Path(keys.output_dir, "rows.jsonl").read_text()
    os.unlink(part)
    synthesize(keys)
    assert Path(keys.output_dir, "rows.jsonl").read_text() == before


def test_prompts_of_a_suite_never_become_rows(make, tmp_path):
    suite = [{"id": "a", "messages": [{"role": "user", "content": "What is 3 plus 1?"}], "target": "4"}]
    (tmp_path / "heldout.jsonl").write_text(json.dumps(suite[0]) + "\n")
    keys = make(keep="top1", decontaminate=["heldout.jsonl"])
    report = synthesize(keys)
    assert report["left"]["contaminated"] == 1
    assert all("What is 3 plus 1?" not in row["messages"][0]["content"] for row in read(keys))


def test_of_two_suites_of_one_file_name_each_is_kept_out_and_named(make, tmp_path):
    for number in (3, 5):
        asked = {"id": "a", "messages": [{"role": "user", "content": f"What is {number} plus 1?"}], "target": "4"}
        (tmp_path / f"of{number}").mkdir()
        (tmp_path / f"of{number}" / "heldout.jsonl").write_text(json.dumps(asked) + "\n")
    keys = make(keep="top1", decontaminate=["of3/heldout.jsonl", "of5/heldout.jsonl"])
    assert synthesize(keys)["left"]["contaminated"] == 2
    asked = "".join(row["messages"][0]["content"] for row in read(keys))
    assert "What is 3 plus" not in asked
    assert "What is 5 plus" not in asked
    suites = data_origins([f"{keys.output_dir}/rows.jsonl"])["rows.jsonl"]["decontaminated"]
    assert sorted(suites) == ["of3/heldout.jsonl", "of5/heldout.jsonl"]


def test_balance_holds_the_ratio_and_names_a_column_that_is_missing(make):
    keys = make(keep="top1", balance="kind", balance_ratio=1.4)
    report = synthesize(keys)
    assert report["balance"] == {"even": 3, "odd": 4}
    balanced = synthesize(make(keep="top1", balance="kind"))
    assert balanced["balance"] == {"even": 3, "odd": 3}
    with pytest.raises(DataError, match=r"balance: sort is no column of this prompt; it has answer, kind"):
        synthesize(make(keep="top1", balance="sort"))


def test_nothing_left_is_an_error_that_counts_the_reasons(make):
    keys = make(keep="all_correct")
    synthesize(keys)
    rows = Path(keys.output_dir, "rows.jsonl")
    before = rows.read_text()
    with pytest.raises(DataError, match=r"no row is left of 28 completions: .*not correct"):
        synthesize(make(keep="all_correct", correct_from=2.0))
    assert not rows.exists(), "rows of another choice do not lie beside this one's report"
    assert not Path(f"{rows}.origin.json").exists()
    synthesize(make(keep="all_correct"))
    assert rows.read_text() == before


def test_repeats_of_completions_leave_once(make):
    keys = make(max_completion_length=1, num_generations=8, keep="all_correct")
    synthesize(keys)
    by_prompt = defaultdict(list)
    for row in read(keys):
        by_prompt[row["provenance"]["prompt"]].append(row["messages"][-1]["content"])
    assert all(len(found) == len(set(found)) for found in by_prompt.values())


def test_a_run_that_is_killed_between_parts_ends_with_the_same_bytes(make, tmp_path):
    by_one = {"reward_funcs": ["rewards.py:held"], "reward_timeout_s": 100.0, "prompts_per_part": 1}
    synthesize(make(output_dir="whole", **by_one))
    killed = make(output_dir="killed", **by_one)
    (tmp_path / "hold").touch()
    command = [
        sys.executable,
        "-c",
        "from posttrain.cli.app import main; main()",
        "data",
        "synth",
        str(tmp_path / "synth.yaml"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "killed" / "samples"
    while not (folder.is_dir() and len([name for name in os.listdir(folder) if name.startswith("part")]) >= 2):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "hold").unlink()
    assert len(os.listdir(folder)) < 7
    assert not (tmp_path / "killed" / "rows.jsonl").exists()
    synthesize(killed)
    for name in ("rows.jsonl", "left.jsonl", "report.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


STAGES = {
    "sft": {"keep": "all_correct"},
    "dpo": {"keep": "pairs"},
    "grpo": {"keep": "prompts", "keep_truncated": None},
}


@pytest.mark.parametrize("kind", STAGES)
def test_the_rows_train_as_they_are_and_the_run_says_where_they_are_from(kind, make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = make(**STAGES[kind])
    write_origin(tmp_path / "prompts.jsonl", {"made_by": "a teacher"})
    synthesize(keys)
    config = {
        "base_model": keys.base_model, "datasets": [{"path": "runs/synth/rows.jsonl"}], "output_dir": "trained", "max_steps": 1,
        "per_device_train_batch_size": 4, "lint": {"duplicate": {"action": "warn"}},
    }  # fmt: skip
    if kind == "grpo":
        config |= {
            "reward_funcs": ["rewards.py:even"],
            "reward_check": "off",
            "allow_raw_base": True,
            "max_completion_length": 4,
        }
        config |= {"num_generations": 2, "num_prompts_per_step": 2}
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as caught:
        main([kind, "train.yaml"])
    assert caught.value.code == 0
    (summary,) = (tmp_path / "trained").rglob("summary.json")
    origin = json.loads(summary.read_text())["origins"]["rows.jsonl"]
    assert (origin["made_by"], origin["model"]) == ("posttrain data synth", source_digest(keys.base_model))
    assert origin["kept"]["keep"] == keys.keep
    assert origin["data_origins"]["prompts.jsonl"]["made_by"] == "a teacher"


def test_rows_that_were_edited_have_no_known_origin_and_it_is_said(make, caplog):
    keys = make()
    synthesize(keys)
    path = f"{keys.output_dir}/rows.jsonl"
    assert data_origins([path])["rows.jsonl"]["seed"] == 5
    Path(path).write_text(Path(path).read_text() * 2)
    assert data_origins([path]) == {}
    assert "was changed since rows.jsonl.origin.json was written" in caplog.text


def test_files_of_one_name_have_an_origin_each(make):
    paths = list[str]()
    for folder in ("one", "two"):
        keys = make(output_dir=folder)
        synthesize(keys)
        paths.append(f"{keys.output_dir}/rows.jsonl")
    assert sorted(data_origins(paths)) == ["one/rows.jsonl", "two/rows.jsonl"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": "pairs", "keep_truncated": None, "num_generations": 1}, "num_generations: 1 with keep: pairs"),
        ({"difficulty": {"k": 8}}, "difficulty.k: 8 with num_generations: 4"),
        ({"balance_ratio": 2}, "balance_ratio does nothing with no balance"),
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness: 1 where nothing is trained"),
        ({"datasets": [{"path": "prompts.jsonl", "weight": 2}]}, "weight of entry 1 does nothing"),
        ({"decontaminate": ["gone.jsonl"]}, "gone.jsonl does not exist"),
        ({"datasets": [{"path": "prompts.jsonl"}, {"path": "runs/synth/rows.jsonl"}]}, "would write rows.jsonl over "),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said, make, tmp_path):
    (tmp_path / "runs" / "synth").mkdir(parents=True)
    (tmp_path / "runs" / "synth" / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=said):
        make(**changes)
