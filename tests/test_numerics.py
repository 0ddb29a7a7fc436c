"""Golden values of everything that `posttrain.numerics` has a row for: other numbers need another revision.

`RECORD=1 pytest tests/test_numerics.py` writes what
this version computes under the revisions in force, for a revision that is new (or was never released).
"""

import json
import os
from pathlib import Path

import pytest

from posttrain.grading.scorers import SCORERS
from posttrain.numerics import REVISIONS, changes_between, revision
from posttrain.rewards.library import REWARDS

GOLDEN = Path(__file__).with_name("golden") / "numerics.json"
ANSWERS = (
    ("boxed", r"so \boxed{12}", "12"),
    ("boxed", r"so \boxed{13}", "12"),
    ("number", "The answer is 7", "7"),
    ("last_number", "3 and 4, so 7", "7"),
    ("last_number", "3 and 4, so 8", "7"),
    ("choice", "B", "B"),
    ("exact", "Yes.", "Yes."),
    ("exact", "yes", "Yes."),
    ("contains", "it is Paris", "Paris"),
)


def curve(kind, folder, model_dir, data_dir, runner):
    """Loss and gradient norm of four steps."""
    keys = runner.keys_of(kind, model_dir("qwen3"), data_dir)
    assert runner.run_stage(kind, folder, keys) is not None
    return [row[name] for row in runner.rows(folder) for name in ("loss", "grad_norm")]


def scores():
    return [SCORERS[name](text, target, {}) for name, text, target in ANSWERS]


def rewarded():
    texts = [r"2 + 5 = \boxed{7}", "7", "8", ""]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns = {"prompts": [[]] * 4, "completions": completions, "answer": ["7"] * 4}
    return [value for name in ("number", "boxed") if name in REWARDS for value in REWARDS[name].fn(**columns)]


@pytest.fixture(scope="module")
def computed(tmp_path_factory, model_dir, data_dir, runner):
    """What this version computes, for every row."""
    folder = tmp_path_factory.mktemp("numerics")
    values = {
        kind: curve(kind, folder / kind, model_dir, data_dir, runner)
        for kind in (
            "sft",
            "dpo",
            "reward_model",
            "process_reward_model",
            "grpo",
            "ppo",
            "online_dpo",
            "distill",
            "ebft",
        )
    }
    values |= {"grading": scores(), "rewards": rewarded()}
    if os.environ.get("RECORD"):
        golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        for what, row in values.items():
            golden.setdefault(what, {})[revision(what)] = row
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    return values


@pytest.mark.parametrize("what", REVISIONS)
def test_other_numbers_need_another_revision(computed, what):
    golden = json.loads(GOLDEN.read_text())[what]
    assert list(golden) == [str(number) for number in range(1, len(REVISIONS[what]) + 1)], "a golden value per revision"
    expected = golden[revision(what)]
    assert computed[what] == pytest.approx(expected, rel=2e-3, abs=1e-5), (
        f"{what} computes other numbers than revision {revision(what)}: add an entry to REVISIONS[{what!r}] in "
        "posttrain/numerics.py that says what changed, and record it (RECORD=1, see the head of this file)"
    )


def test_an_upgrade_is_told_in_words():
    assert changes_between("sft", "0", "1") == REVISIONS["sft"][0]
    assert changes_between("sft", "1", "1") == ""
    assert changes_between("sft", "1", None) == ""
    assert changes_between("unheard", "1", "2") == ""
