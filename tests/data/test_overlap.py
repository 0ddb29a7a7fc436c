"""Repetition: exact, near, and n-grams of eval prompts."""

import random

import pytest

from posttrain.data import overlap
from posttrain.data.overlap import contaminated, exact_duplicates, hash_words, near_duplicates, words

VOCABULARY = [f"word{i}" for i in range(500)]


def text(rng, size=60):
    return [rng.choice(VOCABULARY) for _ in range(size)]


def shingle_jaccard(a, b):
    """The definition, with plain sets."""
    left, right = ({tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (a, b))
    return len(left & right) / len(left | right)


def test_exact_duplicates_ignore_case_and_space():
    assert exact_duplicates(hash_words(["Two  words.", "other", "two words .", "two words"])) == [(2, 0)]


def test_near_duplicates_are_those_of_the_definition():
    rng = random.Random(1)
    rows = [text(rng) for _ in range(60)]
    for i, changed in enumerate([1, 1, 2, 3, 8, 20]):  # copies with ever more words replaced at the end
        copy = list(rows[i])
        copy[-changed:] = text(rng, changed)
        rows.append(copy)
    found = near_duplicates(hash_words([" ".join(row) for row in rows]))
    expected = [
        (i, j, shingle_jaccard(rows[i], rows[j]))
        for i in range(len(rows))
        for j in range(i)
        if shingle_jaccard(rows[i], rows[j]) >= 0.8
    ]
    assert [(i, j) for i, j, _ in found] == [(i, j) for i, j, _ in expected] == [(60, 0), (61, 1), (62, 2), (63, 3)]
    assert [score for *_, score in found] == pytest.approx([score for *_, score in expected])


def test_near_duplicates_do_not_repeat_exact_ones_and_are_deterministic():
    rng = random.Random(2)
    row = " ".join(text(rng))
    assert near_duplicates(hash_words([row, row])) == []
    rows = [row, row + " more", *(" ".join(text(rng)) for _ in range(20))]
    assert near_duplicates(hash_words(rows)) == near_duplicates(hash_words(rows)) != []


def both(*rows):
    """(prompt, whole text) as the hashes of their words."""
    return [tuple(hash_words(row)) for row in rows]


def test_thirteen_words_of_an_eval_prompt_are_contamination():
    rng = random.Random(3)
    prompt, other = text(rng, 30), text(rng, 30)
    row = other[:10] + prompt[5:18] + other[10:]
    short = other[:10] + prompt[5:17] + other[10:]
    rows = [("", " ".join(row)), ("", " ".join(short))]
    assert contaminated(both(*rows), {"heldout": [" ".join(prompt)]}) == [(0, "heldout")]


def test_the_index_of_the_suites_is_built_once_however_many_rows_there_are(monkeypatch):
    """Not for each chunk of them, which would cost rows × items."""
    built, of = [], overlap._filter
    monkeypatch.setattr(overlap, "_filter", lambda wanted: built.append(len(wanted)) or of(wanted))
    rng = random.Random(3)
    prompt = text(rng, 13)
    rows = [("", " ".join(text(rng, 8)))] * 1000 + [("", " ".join(["so", *prompt]))]
    assert contaminated(both(*rows), {"heldout": [" ".join(prompt)]}) == [(1000, "heldout")]
    assert built == [1]


def test_short_eval_prompts_must_be_there_whole():
    suites = {"heldout": ["Tom has 67 nuts and loses 16. How many are left?"], "tiny": ["2 + 2"]}
    rows = [
        ("Tom has 67 nuts and loses 16. How many are left?", "Tom has 67 nuts and loses 16. How many are left? 51"),
        ("Tom has 67 nuts and loses 17. How many are left?", "Tom has 67 nuts and loses 17. How many are left? 50"),
        ("What is 2 + 2", "What is 2 + 2 4"),
        ("2 + 2", "2 + 2 4"),
    ]
    assert contaminated(both(*rows), suites) == [(0, "heldout"), (3, "tiny")]


def test_words_that_run_from_one_row_into_the_next_are_no_contamination():
    rng = random.Random(4)
    prompt = text(rng, 20)
    rows = [("", " ".join(text(rng, 30) + prompt[:10])), ("", " ".join(prompt[10:] + text(rng, 30)))]
    assert contaminated(both(*rows), {"heldout": [" ".join(prompt)]}) == []
    assert contaminated(both(("", " ".join(prompt)), *rows, ("", "")), {"heldout": [" ".join(prompt)]}) == [
        (0, "heldout")
    ]


def test_the_wording_that_many_items_share_is_not_an_item():
    boiler = "Answer the following question with one letter only and do not explain your choice to anyone"
    suite = [f"{boiler} : item number {i}" for i in range(40)]
    assert contaminated(both((boiler, boiler)), {"mc": suite}) == []
    assert contaminated(both(("", suite[7])), {"mc": suite}) == [(0, "mc")]


def test_words_split_signs_off():
    assert words("Two, THREE\n4+5") == ["two", ",", "three", "4", "+", "5"]
