"""The page that shows GRPO: it learns what it says, and stays a page."""

import importlib.util
from pathlib import Path

PAGE = Path(__file__).parents[2] / "examples/minimal_grpo.py"


def test_the_page_learns_to_answer_in_digits():
    spec = importlib.util.spec_from_file_location("minimal_grpo", PAGE)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    history = page.main(12)
    assert sum(history[-3:]) / 3 > sum(history[:3]) / 3 + 0.1, history


def test_it_is_one_page_of_public_names():
    text = PAGE.read_text()
    assert len(text.splitlines()) < 150
    assert "posttrain._" not in text and "._" not in text
