"""The story that examples/reward-hacking tells, as it is shipped: `run.sh` shows the lines that its README quotes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.report.records import read_run

EXAMPLE = Path(__file__).parents[2] / "examples" / "reward-hacking"
ALARM = "reward_without_score"


@pytest.fixture
def example(shipped):
    return shipped("reward-hacking")


def tell(example, *options, parts="123"):
    """(exit code, lines) of run.sh."""
    command = example.parent / "posttrain"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m posttrain.cli.app "$@"\n')
    command.chmod(0o755)
    told = {
        "POSTTRAIN": str(command),
        "PYTHON": sys.executable,
        "PARTS": parts,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [str(example / "run.sh"), *options], env=os.environ | told, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.splitlines()


def shape(line):
    """Without its digits; a quoted line that ends in … says no more."""
    return re.sub(r"[0-9]+", "#", line.rstrip())


def quoted(part):
    """The lines of the README's block on one part; of the alarms only the one that the story is about."""
    block = (EXAMPLE / "README.md").read_text().split("```")[1::2][part - 1]
    lines = [line for line in block.splitlines() if line and (" finding: " not in line or ALARM in line)]
    return [line for line in lines if re.match(r"[$ a-z]", line)]


def missing(wanted, lines):
    got = [shape(line) for line in lines]
    return [
        line
        for line in wanted
        if not any(one == shape(line) or (line.endswith("…") and one.startswith(shape(line[:-1]))) for one in got)
    ]


def test_the_short_story_shows_its_alarm(example):
    """The forced run alone, twenty steps of fifty."""
    code, lines = tell(example, "--set", "grpo.max_steps=20", parts="2")
    assert code == 0
    alarm = next(place for place, line in enumerate(quoted(2)) if ALARM in line)
    assert missing(quoted(2)[: alarm + 1], lines) == []
    assert read_run(example / "runs" / "forced").registered is None


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_reward_that_can_be_fooled_is_refused_then_found_out_then_blocked_and_one_that_holds_is_promoted(example):
    code, lines = tell(example)
    assert code == 0
    assert [missing(quoted(part), lines) for part in (1, 2, 3)] == [[], [], []]
    assert not list(example.glob("runs/hackable/stages/*/metrics.jsonl"))  # refused before the first step

    (stage,) = (example / "runs" / "forced" / "stages").glob("*-grpo")
    reports = lines_of(stage / "metrics.jsonl")
    scores = [report["eval_score"] for report in reports if "eval_score" in report]
    rewards = [report["reward"] for report in reports]
    assert sum(rewards[-5:]) > sum(rewards[:5])
    assert scores[-1] < scores[0] - 0.3
    record = read_run(example / "runs" / "forced")
    assert record.status == "failed" and record.registered is None

    record = read_run(example / "runs" / "certified")
    assert [certificate["verdict"] for certificate in record.certificates.values()] == ["pass"]
    assert record.registered is not None and record.registered["alias"] == "champion"
    (stage,) = (example / "runs" / "certified" / "stages").glob("*-grpo")
    assert ALARM not in [event["rule"] for event in lines_of(stage / "events.jsonl") if event["kind"] == "finding"]
