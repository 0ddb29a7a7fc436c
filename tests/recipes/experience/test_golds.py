"""Golds are scored by the stage's real rewards, in worker processes."""

import pytest

from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.errors import RewardError
from posttrain.recipes.experience.golds import gold_check, unreadable_golds
from posttrain.types import Origin, Prompt


def prompts(*answers, column="answer"):
    return [Prompt(Origin("p.jsonl", i), f"Question {i}?", {column: a}) for i, a in enumerate(answers, 1)]


def keys(*rewards, **more):
    return GRPOKeys(base_model="x", datasets=[{"path": "p.jsonl"}], reward_funcs=list(rewards), **more)


def test_golds_that_the_reward_knows_are_silent_and_others_say_what_they_get(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "def whole(prompts, completions, answer, **columns):\n"
        "    return [float(str(g).isdigit() and c.endswith('#### ' + g)) for c, g in zip(completions, answer)]\n"
    )
    reasons = unreadable_golds(keys(f"{file}:whole"), prompts("4", "17", "one half", None, "35", "1/2"))
    assert [i for i, reason in enumerate(reasons) if reason] == [2, 5]
    assert reasons[2] == "the rewards give 0 for gold 'one half', and 1 for others"
    assert unreadable_golds(keys("boxed"), prompts("4", "17", "12")) == [None] * 3


def test_who_is_asked():
    check = gold_check(keys("boxed"))
    assert check is not None and check(prompts("4", "5")) == [None, None]
    assert gold_check(keys("boxed", reward_check="off")) is None
    assert gold_check(SFTKeys(base_model="x", datasets=[{"path": "p.jsonl"}])) is None


def test_rewards_that_do_not_look_at_the_gold_say_nothing():
    assert unreadable_golds(keys("think_format"), prompts("4", "17")) == [None, None]
    assert unreadable_golds(keys("boxed"), prompts(None, None)) == [None, None]


def test_options_of_a_model_that_pays_beside_it_stop_no_check(tmp_path):
    """A model's opinion is not asked; nor are its options, or its weight."""
    options = {"prm": {"aggregate": "mean"}, "boxed": {}}
    beside = keys("model:./prm", "boxed", reward_kwargs=options, reward_weights=[5.0, 1.0])
    assert unreadable_golds(beside, prompts("4", "5")) == [None, None]


def test_a_reward_of_ones_own_and_one_that_fails(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "def mine(prompts, completions, answer, **columns):\n"
        "    return [None if g == '13' else float(int(g) == int(c.split()[-1])) for c, g in zip(completions, answer)]\n"
    )
    reasons = unreadable_golds(keys(f"{file}:mine"), prompts("4", "13", "5", "x7", "6"))
    assert [reasons[i] for i in (0, 2, 4)] == [None] * 3
    assert reasons[1] == "the rewards give None for gold '13'"
    assert reasons[3].startswith("gold 'x7' is unscored: mine: raised ValueError: invalid literal")


def test_a_row_whose_answer_is_written_in_another_form_is_known(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "def two(prompts, completions, answer, **columns):\n"
        "    forms = [f'<answer>{g}</answer>' if len(g) > 4 else f'#### {g}' for g in answer]\n"
        "    return [float(c.endswith(form)) for c, form in zip(completions, forms)]\n"
    )
    assert unreadable_golds(keys(f"{file}:two"), prompts("4", "17", "12", "12345")) == [None] * 4


def test_a_column_that_the_rewards_need_and_the_rows_do_not_have_is_an_error(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("def two(prompts, completions, answer, unit):\n    return [0.0 for _ in completions]\n")
    with pytest.raises(RewardError, match="needs the column unit"):
        unreadable_golds(keys(f"{file}:two"), prompts("4"))
