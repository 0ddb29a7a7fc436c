import json

import pytest

from posttrain.errors import EvalError
from posttrain.evals.suite import CHOICES, load_suite, suite_file_digest

GOOD = {"id": "a", "prompt": "1+1=", "target": "2", "scorer": "exact"}


@pytest.fixture
def suite(tmp_path):
    def write(*rows, text=None):
        path = tmp_path / "suite.jsonl"
        path.write_text(text if text is not None else "".join(json.dumps(row) + "\n" for row in rows))
        return load_suite("s", path)

    return write


def test_items_with_their_columns(suite):
    chat = [{"role": "user", "content": "Hi"}]
    made = suite(GOOD | {"hint": "x", "cluster": "c", "split": "dev"}, {"id": "b", "messages": chat, "target": 7})
    first, second = made.items
    assert (first.prompt, first.target, first.cluster, first.split) == ("1+1=", "2", "c", "dev")
    assert first.columns == {"hint": "x"}
    assert (second.prompt, second.target, second.split) == (tuple(chat), "7", "gate")
    assert made.on("dev") == (first,)
    assert made.sizes("dev") == (1, 1)
    assert made.on("gate+dev") == (first, second)
    assert made.sizes("gate+dev") == (2, 1)
    assert made.sizes("gate") == (1, 0)


def test_an_explicit_null_is_as_if_left_out(suite):
    (item,) = suite({"id": "a", "messages": None, "prompt": "x", "target": "1", "split": None, "cluster": None}).items
    assert (item.prompt, item.split, item.cluster, item.scorer) == ("x", "gate", None, "exact")


BAD = {
    "not json": ('{"id": "a"\n', r"suite\.jsonl:1: not JSON: .*one JSON object per line"),
    "no id": ('{"prompt": "x"}\n', r"suite\.jsonl:1: expected an object with a string `id`"),
    "a list": ("[1]\n", r"suite\.jsonl:1: got a list; expected one JSON object"),
    "no prompt": ('{"id": "a", "prompt": ""}\n', r"suite\.jsonl:1: expected `prompt` \(text\) or `messages`"),
    "messages of text": ('{"id": "a", "messages": ["x"]}\n', r"suite\.jsonl:1: expected `prompt`.*found list"),
    "unknown scorer": (
        '{"id": "a", "prompt": "x", "scorer": "exakt"}\n',
        r"suite\.jsonl:1: scorer 'exakt' is unknown; expected one of .*exact",
    ),
    "one choice": (
        '{"id": "a", "prompt": "x", "choices": ["y"], "target": "y"}\n',
        r"suite\.jsonl:1: `choices` needs at least two",
    ),
    "target no choice": (
        '{"id": "a", "prompt": "x", "choices": ["y", "z"], "target": "w"}\n',
        "`target` must be one of them",
    ),
    "index beyond": (
        '{"id": "a", "prompt": "x", "choices": ["y", "z"], "target": 2}\n',
        "`target` must be one of them or an index from 0 to 1, found 2",
    ),
    "choices alike": (
        '{"id": "a", "prompt": "x", "choices": ["y", "y"], "target": 0}\n',
        r"suite\.jsonl:1: `choices` needs at least two texts that differ",
    ),
    "choices beside a scorer that samples": (
        '{"id": "a", "prompt": "x", "choices": ["y", "z"], "target": 1, "scorer": "choice"}\n',
        r"suite\.jsonl:1: scorer 'choice' judges a sampled answer, and `choices` are ranked \(choices, acc, acc_norm\)",
    ),
    "a cluster that is a list": (
        '{"id": "a", "prompt": "x", "cluster": ["y"]}\n',
        r"suite\.jsonl:1: `cluster` is \['y'\]; expected a text or a number",
    ),
    "choices of numbers": ('{"id": "a", "prompt": "x", "choices": [1, 2], "target": 1}\n', "needs at least two texts"),
    "no scorer file": (
        '{"id": "a", "prompt": "x", "scorer": "no.py:f"}\n',
        r"suite\.jsonl: scorer 'no\.py:f': no file .*relative to its suite",
    ),
    "options of a scorer by name": (
        '{"id": "a", "prompt": "x", "target": "y", "scorer": "exact", "scorer_kwargs": {"aggregate": "mean"}}\n',
        r"suite\.jsonl:1: `scorer_kwargs`: scorer 'exact' takes no options",
    ),
    "options that are a text": (
        '{"id": "a", "prompt": "x", "scorer": "s.py:f", "scorer_kwargs": "mean"}\n',
        r"suite\.jsonl:1: `scorer_kwargs` is 'mean'; expected options by name",
    ),
    "empty": ("\n\n", "is empty; expected one JSON object per line"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_with_its_line(case, suite):
    text, message = BAD[case]
    with pytest.raises(EvalError, match=message):
        suite(text=text)


def test_line_numbers_count_blank_lines_and_ids_are_unique(suite):
    line = json.dumps(GOOD)
    with pytest.raises(EvalError, match=r"suite\.jsonl:4: id 'a' was used on line 1; ids pair the answers"):
        suite(text=f"{line}\n\n\n{line}\n")


def test_a_suite_has_one_scorer(suite):
    with pytest.raises(EvalError, match=r"items use several scorers \(choices, exact\); make one suite of each"):
        suite(GOOD, {"id": "b", "prompt": "x", "choices": ["y", "z"], "target": "y"})


def test_the_options_of_a_process_reward_model_are_checked_and_those_of_a_suite_are_alike(suite, tmp_path):
    (tmp_path / "prm").mkdir()
    (tmp_path / "prm" / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForTokenClassification"]}))
    row = {"id": "a", "prompt": "x", "scorer": "model:./prm"}
    made = suite(row | {"scorer_kwargs": {"aggregate": "product"}})
    assert (made.scorer_kwargs, made.items[0].columns) == ({"aggregate": "product"}, {})
    assert made.digest("gate", {}) != suite(row).digest("gate", {})
    with pytest.raises(EvalError, match=r"suite\.jsonl: scorer_kwargs: prm: aggregate: got 'max', expected one of min"):
        suite(row | {"scorer_kwargs": {"aggregate": "max"}})
    with pytest.raises(
        EvalError, match=r"other options \(a: \{'aggregate': 'last'\}, b: \{\}\); make one suite of each"
    ):
        suite(row | {"scorer_kwargs": {"aggregate": "last"}}, row | {"id": "b"})


def test_a_missing_file_and_a_missing_split(suite, tmp_path):
    with pytest.raises(EvalError, match=r"evals\.s: .*nowhere\.jsonl: no such file"):
        load_suite("s", tmp_path / "nowhere.jsonl")
    with pytest.raises(EvalError, match="no items with split 'dev'; it has 1 on gate"):
        suite(GOOD).on("dev")


def test_the_digest_follows_items_scorer_and_decoding(suite):
    greedy = {"temperature": 0.0}
    base = suite(GOOD).digest("gate", greedy)
    assert suite(GOOD).digest("gate", greedy) == base
    assert suite(GOOD, GOOD | {"id": "b", "split": "dev"}).digest("gate", greedy) == base
    changed = [
        suite(GOOD | {"target": "3"}).digest("gate", greedy),
        suite(GOOD | {"scorer": "number"}).digest("gate", greedy),
        suite(GOOD | {"tolerance": 1}).digest("gate", greedy),
        suite(GOOD).digest("gate", {"temperature": 1.0}),
        suite(GOOD, GOOD | {"id": "b"}).digest("gate", greedy),
    ]
    assert len({base, *changed}) == 6


def test_choices_need_no_scorer(suite):
    made = suite({"id": "a", "prompt": "x", "choices": ["y", "z"], "target": "y"})
    assert made.scorer == CHOICES


@pytest.mark.parametrize("scorer", [None, "choices", "acc", "acc_norm"])
def test_an_integer_target_is_an_index(scorer, suite):
    row = {"id": "a", "prompt": "x", "choices": ["7", "1", "0"], "scorer": scorer}
    assert [suite(row | {"target": target}).items[0].target for target in (0, 2, "0", "1")] == ["7", "0", "0", "1"]
    for target in (True, -1, 3, 0.0, None, ["7"]):
        with pytest.raises(EvalError, match="must be one of them or an index"):
            suite(row | {"target": target})


@pytest.mark.parametrize(
    ("target", "text"), [({"a": [1, None]}, '{"a": [1, null]}'), ([1], "[1]"), (True, "true"), (7, "7"), (0.5, "0.5")]
)
def test_a_target_that_is_no_text_is_read_as_json(target, text, suite):
    assert suite({"id": "a", "prompt": "x", "target": target}).items[0].target == text


def test_the_digest_follows_an_own_scorer_and_what_it_imports(suite, tmp_path):
    (tmp_path / "scorers.py").write_text(
        "import helper\ndef half(completions, **columns): return [0.5 for _ in completions]\n"
    )
    (tmp_path / "helper.py").write_text("x = 1\n")
    row = GOOD | {"scorer": "scorers.py:half"}
    first = suite(row).digest("gate", {})
    assert suite(row).digest("gate", {}) == first
    pinned = suite_file_digest(tmp_path / "suite.jsonl")
    (tmp_path / "helper.py").write_text("x = 2\n")
    assert suite(row).digest("gate", {}) != first
    assert suite_file_digest(tmp_path / "suite.jsonl") != pinned
    with pytest.raises(EvalError, match=r"scorer 'scorers\.py:halve': .* defines _, half, helper"):
        suite(GOOD | {"scorer": "scorers.py:halve"})
    (tmp_path / "scorers.py").write_text("def half(:\n")
    with pytest.raises(EvalError, match=r"scorers\.py:1: the file is not valid Python"):
        suite(row)
