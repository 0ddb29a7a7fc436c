"""The plain-text table at the end of a run."""

import shutil

from posttrain.report import words
from posttrain.report.summary import render_summary


def test_the_table_has_every_model_and_the_change(finished_run):
    lines = render_summary(finished_run).splitlines()
    assert lines[0].split() == [
        "suite",
        "base",
        "01-sft",
        "02-dpo",
        "03-grpo",
        "change",
        "base",
        "→",
        "03-grpo",
        "(95",
        "%",
        "interval)",
    ]
    assert lines[1].startswith("heldout/gate  13.8 % (10.7–17.5)") and lines[1].endswith("+46.8 (+41.8 to +51.8)")
    assert "gate      PASS: every test passed" in lines
    assert "registry  word-problems v1 → champion" in lines
    assert lines[-1].startswith("The model passed its gate.")


def test_without_evals_it_still_says_something(own_run):
    for part in ("evals", "gates"):
        shutil.rmtree(own_run / part)
    (own_run / "pipeline.json").unlink()
    assert render_summary(own_run) == "No model was compared with another, so this run says nothing about improvement."


def test_a_model_that_skipped_a_suite_has_a_dash(own_run):
    shutil.rmtree(own_run / "evals" / "02-dpo" / "format-gate")
    row = next(line for line in render_summary(own_run).splitlines() if line.startswith("format/gate"))
    assert " – " in row


def test_a_score_that_did_not_move_stayed_at_its_value():
    sentence = words.gain_sentence("clean", 1.0, 1.0, -0.003, 0.003, num_items=400)
    assert sentence.startswith(
        "On “clean” the score stayed at 100.0 %; with 95 % confidence the true change lies between"
    )
    assert "stayed" not in words.gain_sentence("clean", 0.5, 0.6, 0.05, 0.15, num_items=400)
    assert "all differences are equal" in words.gain_sentence("clean", 0.5, 0.75, None, None, num_items=40)
    assert "too few items" in words.gain_sentence("clean", 0.5, 0.75, None, None, num_items=1)
    assert "an item has no score" in words.gain_sentence("clean", float("nan"), 0.75, None, None, num_items=40)
    assert "stayed at 50.0 %" in words.gain_sentence("clean", 0.5, 0.50001, -0.1, 0.1, num_items=400)
