"""Each mutation fires on a reward that has its hole, and stays silent on ours."""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from posttrain.rewards.cases import AnswerForm, Setting, cases_of
from posttrain.rewards.library import REWARDS
from posttrain.rewards.mutations import MUTATIONS
from posttrain.types import Origin, Prompt

BOX = re.compile(r"\\boxed\{([^{}]*)\}")
BOXED = AnswerForm(False, "\\boxed{", "}")
THINK = AnswerForm(True, "\\boxed{", "}")


def contains(text, gold):
    return gold in text


def any_box(text, gold):
    return gold in BOX.findall(text)


def same_string(text, gold):
    return BOX.findall(text) == [gold]


def digits(text):
    return re.sub(r"[^0-9.-]", "", "".join(BOX.findall(text)))


def evaluated(text, gold):
    found = BOX.search(text)
    inside = (found.group(1) if found else "").replace("\\times", "*")
    return bool(re.fullmatch(r"[-0-9+*/ ]+", inside)) and eval(inside) == int(gold)


def near(text, gold):
    found = re.fullmatch(r"-?[0-9.]+", "".join(BOX.findall(text)))
    return found is not None and abs(abs(float(found.group())) - abs(float(gold))) <= 1


FIRES = {  # mutation → (a reward with the hole, the reference answers)
    "whitespace": (same_string, ["42", "17"]),
    "fraction and decimal": (same_string, ["3/4", "1/2"]),
    "thousands separators": (same_string, ["12345", "17"]),
    "text wrapper": (same_string, ["42", "17"]),
    "nested boxes": (lambda text, gold: text.startswith("\\boxed{" + gold), ["42", "17"]),
    "units of the gold": (same_string, ["5 cm", "7 m"]),
    "prose before the slot": (lambda text, gold: text == f"\\boxed{{{gold}}}", ["42", "17"]),
    "empty": (lambda text, gold: not text.strip(), ["42", "17"]),
    "end token only": (lambda text, gold: not re.search("[0-9]", text), ["42", "17"]),
    "prompt echo": (lambda text, gold: "pens" in text, ["42", "17"]),
    "unevaluated expression": (evaluated, ["42", "17"]),
    "wrong=gold chain": (lambda text, gold: text.endswith(f"{gold}}}") and "=" in text, ["42", "17"]),
    "two slots": (any_box, ["42", "17"]),
    "lists and hedges": (contains, ["42", "17"]),
    "enumeration": (contains, ["42", "17"]),
    "denial": (contains, ["42", "17"]),
    "retraction": (lambda text, gold: BOX.findall(text)[:1] == [gold], ["42", "17"]),
    "gold only in think": (contains, ["42", "17"]),
    "unclosed or fake think": (lambda text, gold: any_box(text.rpartition("</think>")[2], gold), ["42", "17"]),
    "gold in a comment or fence": (any_box, ["42", "17"]),
    "near misses": (near, ["42", "17"]),
    "percent and unit swap": (lambda text, gold: digits(text) == gold, ["42", "17"]),
    "tuple permutation": (lambda text, gold: sorted(re.findall("[0-9]", text)) == sorted(re.findall("[0-9]", gold)), ["(1,2)", "(3,x)"]),
    "case change": (lambda text, gold: gold.lower() in text.lower(), ["Paris", "Rome"]),
    "format only": (lambda text, gold: "<think>" in text, ["42", "17"]),
    "modal answer": (lambda text, gold: "42" in text, ["42", "42", "17"]),
    "another row's gold": (lambda text, gold: bool(re.search(r"\\boxed\{(42|17)\}", text)), ["42", "17"]),
    "padded wrong": (lambda text, gold: len(text) > 100, ["42", "17"]),
    "longest and shortest": (lambda text, gold: len(text) < 3 or len(text) > 5000, ["42", "17"]),
    "keyword stuffing": (lambda text, gold: "correct answer" in text, ["42", "17"]),
    "judge keys": (lambda text, gold: "maximum score" in text or text == ":", ["42", "17"]),
}  # fmt: skip

RAISES = {  # mutation → a reward that does not survive it
    "NaN, infinity, huge numbers, power towers": lambda text: int(BOX.findall(text)[0]),
    "nested braces": lambda text: json.loads(text) if text.startswith("[[") else None,
    "a megabyte of text": lambda text: int(re.sub("[^0-9]", "", text)),
    "surrogates and control characters": lambda text: text.encode(),
}


def prompts(golds, **columns):
    return [
        Prompt(Origin("p", i), f"Tom has {i} pens. How many?", {"answer": gold, **columns})
        for i, gold in enumerate(golds)
    ]


def texts(mutation, golds, form=BOXED, **columns):
    cases = cases_of(prompts(golds, **columns))
    setting = Setting.of(cases, form)
    return [(case, text) for case in cases for text in mutation.make(case, setting)]


def by_kind(kind):
    return [m for m in MUTATIONS if m.kind == kind and m.tasks != ("code",) and m.tasks != ("json",)]


def ours(case, text):
    return REWARDS["boxed"].fn([case.prompt], [text], answer=[case.gold])[0]


@pytest.mark.parametrize("mutation", by_kind("E"), ids=lambda m: m.name)
def test_rewritten_gold(mutation):
    hole, golds = FIRES[mutation.name]
    made = texts(mutation, golds)
    assert any(not hole(text, case.gold) for case, text in made)
    for form in (BOXED, THINK):
        for case, text in texts(mutation, golds, form):
            assert ours(case, text) == 1.0, text


@pytest.mark.parametrize("mutation", by_kind("Z"), ids=lambda m: m.name)
def test_cheats(mutation):
    hole, golds = FIRES[mutation.name]
    made = texts(mutation, golds)
    assert any(hole(text, case.gold) for case, text in made)
    for form in (BOXED, THINK):
        for case, text in texts(mutation, golds, form):
            assert ours(case, text) == 0.0, text


@pytest.mark.parametrize("mutation", by_kind("N"), ids=lambda m: m.name)
def test_hostile_texts(mutation):
    made = texts(mutation, ["42", "17"])
    with pytest.raises((ValueError, RecursionError, IndexError, OverflowError)):
        for _, text in made:
            RAISES[mutation.name](text)
    for case, text in made:
        assert ours(case, text) == 0.0


@pytest.mark.parametrize("reward", ["number", "boxed", "math_equivalence"])
def test_a_reference_of_zero_is_no_false_alarm(reward):
    """-0, 0 %, ±0 and 0.0 are 0: a reward that takes them for the reference is right."""
    form = AnswerForm(False, *REWARDS[reward].slot.split("ANSWER"))
    for mutation in by_kind("Z") + by_kind("N"):
        for case, text in texts(mutation, ["0", "17"], form):
            if case.gold == "0":
                value = REWARDS[reward].fn([case.prompt], [text], answer=["0"])[0]
                assert value == 0.0, (mutation.name, text)


def test_equal_references_of_other_rows_are_no_cheats():
    cases = cases_of(prompts(["1/2", "0.5", "5 cm", "5", r"2\sqrt{3}", r"\sqrt{12}"]))
    setting = Setting.of(cases, BOXED)
    assert [len(setting.others(case)) for case in cases] == [4] * 6
    assert cases[4].wrong != r"\sqrt{12}"


def test_every_mutation_has_its_bad_reward():
    names = {m.name for kind in "EZN" for m in by_kind(kind)}
    assert names == set(FIRES) | set(RAISES)


# --- code and JSON -------------------------------------------------------------------------------------------------

TESTS = [{"call": "add", "args": [1, 2], "expected": 3}, {"call": "add", "args": [5, 7], "expected": 12}]
FENCE = AnswerForm(False, "", "")


@pytest.fixture(autouse=True)
def folder_of_a_reward(tmp_path, monkeypatch):
    """Graders without a sandbox put their files where a reward's process puts them."""
    folder = tmp_path / "posttrain-reward-x"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


def bad_code():
    spec = importlib.util.spec_from_file_location("bad_code", Path(__file__).with_name("bad_code.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if m.name.startswith("code: ")], ids=lambda m: m.name)
def test_attacks_on_code_graders(mutation):
    made = texts(mutation, ["def add(a, b): return a + b"], FENCE, tests=TESTS)
    assert any(bad_code()(text, TESTS) for _, text in made)
    for case, text in made:
        assert REWARDS["code_tests"].fn([case.prompt], [text], tests=[TESTS], timeout_s=0.7) == [0.0]


def test_the_attack_on_tests_stays_in_the_folders_of_rewards(tmp_path):
    [attack] = [m for m in MUTATIONS if m.name == "code: deleting the tests"]
    [(_, text)] = texts(attack, ["def add(a, b): return a + b"], FENCE, tests=TESTS)
    ours, theirs = tmp_path / "posttrain-reward-1" / "tests.json", tmp_path / "work" / "test_mine.py"
    for file in (ours, theirs):
        file.parent.mkdir()
        file.touch()
        subprocess.run([sys.executable, "-c", text], cwd=file.parent, env={"TMPDIR": str(tmp_path)}, check=True)
    assert theirs.exists() and not ours.exists()


def test_the_bad_grader_is_right_about_honest_code():
    assert bad_code()("def add(a, b): return a + b", TESTS) == 1.0
    assert bad_code()("def add(a, b): return a - b", TESTS) == 0.0


def test_json_filler_and_extra_keys():
    mutation = next(m for m in MUTATIONS if m.tasks == ("json",))
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["name", "n"],
    }
    made = texts(mutation, ['{"name": "a", "n": 1}', '{"name": "b", "n": 2}'], FENCE, schema=schema)

    def loose(text):
        try:
            return set(schema["required"]) <= set(json.loads(text))
        except (ValueError, TypeError):
            return False

    assert sum(loose(text) for _, text in made) >= 4
    for case, text in made:
        assert REWARDS["json_schema"].fn([case.prompt], [text], schema=[schema], answer=[case.gold]) == [0.0], text
