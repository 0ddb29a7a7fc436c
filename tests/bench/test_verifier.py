"""The planted rates of error hold, a verdict is the answer's for good, and the bench goes all the way from one model to its row."""

import importlib.util
from pathlib import Path

import pytest

import verifier
from stage_posttrain import QUICKSTART
from time_to_accuracy import Done, Options

FLIPPED = Path(verifier.__file__).parent / "rewards" / "flipped.py"


@pytest.fixture(scope="module")
def flipped():
    spec = importlib.util.spec_from_file_location("flipped", FLIPPED)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.flipped


def rows(count, said):
    prompts = [[{"role": "user", "content": f"{number} + 1?"}] for number in range(count)]
    answers = [str(number + 1) for number in range(count)]
    return prompts, [[{"role": "assistant", "content": said(gold)}] for gold in answers], answers


def right(gold):
    return f"\\boxed{{{gold}}}"


def wrong(gold):
    return f"\\boxed{{{gold}7}}"


def test_the_planted_rates_hold_and_each_touches_its_own_kind_only(flipped):
    for positive, negative in ((0.0, 0.0), (0.3, 0.0), (0.0, 0.1), (0.4, 0.2)):
        paid = {
            said: sum(flipped(*rows(4000, said), false_positive=positive, false_negative=negative)) / 4000
            for said in (right, wrong)
        }
        # Four standard errors.
        assert paid[wrong] == pytest.approx(positive, abs=4 * (positive * (1 - positive) / 4000) ** 0.5)
        assert paid[right] == pytest.approx(1 - negative, abs=4 * (negative * (1 - negative) / 4000) ** 0.5)


def test_a_verdict_depends_on_question_and_answer_alone(flipped):
    prompts, completions, answers = rows(200, wrong)
    at_once = flipped(prompts, completions, answers, false_positive=0.5)
    by_one = [flipped([p], [c], [a], false_positive=0.5)[0] for p, c, a in zip(prompts, completions, answers, strict=True)]  # fmt: skip
    assert at_once == by_one and 0 < sum(at_once) < 200
    strict, loose = (flipped(prompts, completions, answers, false_positive=rate) for rate in (0.1, 0.6))
    assert all(one <= other for one, other in zip(strict, loose, strict=True))


def test_a_run_with_planted_errors_ends_in_a_row_of_the_table(tmp_path):
    """One step from the base, in its own process as the bench runs it: every right answer unpaid, every wrong one paid."""
    options = Options((1,), 1, 1, "dev", tmp_path)
    base = ("base", str(QUICKSTART / "base"))
    done = verifier.run_rates((1.0, 1.0), 1, base, options, 1)
    [reward] = verifier.logged(done, "reward")
    held = done.reports["heldout"]
    assert reward > 1 - held.mean - 0.3
    text = verifier.render({1: Done({}, Path(), done.reports)}, {(1, (1.0, 1.0)): done}, 1)
    assert f"| 100 % | 100 % | {100 * held.mean:.1f} %" in text.splitlines()[-1]
    assert text.splitlines()[-1].endswith(f"| {reward:.2f} |")
