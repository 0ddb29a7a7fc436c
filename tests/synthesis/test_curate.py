"""What is wrong with a set leaves it, with its reason; what is right stays."""

import json
import random
from pathlib import Path

import pytest

from posttrain.config.curate import CurateKeys
from posttrain.config.load_data import load_data_keys
from posttrain.data.origin import data_origins
from posttrain.errors import ConfigError, DataError
from posttrain.synthesis.curate import curate_rows

WORDS = [
    f"{a}{b}"
    for a in ["ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu"]
    for b in ["lar", "men", "dis", "tok", "ban", "ser", "vil", "pon", "gat", "rum"]
]


def sentence(made, length):
    return [made.choice(WORDS) for _ in range(length)]


def row(question, answer, **columns):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


@pytest.fixture
def write(tmp_path):
    """`write(rows, **keys)`: the keys for these rows."""

    def keys(rows, **changes):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
        given = {"datasets": [{"path": "data.jsonl"}], **changes}
        (tmp_path / "curate.yaml").write_text(json.dumps(given))
        return load_data_keys(CurateKeys, "data curate", tmp_path / "curate.yaml")

    return keys


def read(keys, name):
    with open(f"{keys.output_dir}/{name}") as lines:
        return [json.loads(line) for line in lines]


def test_planted_faults_among_five_thousand_rows_leave_and_nothing_else_does(write, tmp_path):
    made = random.Random(7)
    items = [" ".join(sentence(made, 16)) for _ in range(50)]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps({"id": str(n), "prompt": text, "target": "x"}) + "\n" for n, text in enumerate(items)))  # fmt: skip
    (tmp_path / "scorer.py").write_text("def kind(completions, **_):\n    return [0.0 if 'refuse' in c[0]['content'] else 1.0 for c in completions]\n")  # fmt: skip
    clean = [(sentence(made, 20), sentence(made, 40)) for _ in range(3800)]
    planted = [("clean", question, answer) for question, answer in clean]
    for question, answer in clean[:200]:  # half of the near ones' distance and more: they stay
        planted.append(("clean", question, [*answer[:8], "x", *answer[9:20], "y", *answer[21:32], "z", *answer[33:]]))
    for question, answer in clean[200:500]:
        planted.append(("duplicate", question, [word.upper() for word in answer]))
    for question, answer in clean[500:800]:
        at = made.randrange(5, 35)
        planted.append(("near duplicate", question, [*answer[:at], "other", *answer[at + 1 :]]))
    planted += [("contaminated", [made.choice(items)], sentence(made, 40)) for _ in range(200)]
    planted += [("length", sentence(made, 20), sentence(made, 1)) for _ in range(100)]
    planted += [("quality", sentence(made, 20), ["refuse", *sentence(made, 39)]) for _ in range(100)]
    first, rest = planted[:3800], planted[3800:]
    made.shuffle(rest)
    kinds = [kind for kind, _, _ in first + rest]
    rows = [row(" ".join(question), " ".join(answer), number=n) for n, (_, question, answer) in enumerate(first + rest)]
    assert len(rows) == 5000
    keys = write(
        rows, decontaminate=["heldout.jsonl"], min_chars=20, quality=[{"scorer": "scorer.py:kind", "min": 0.5}]
    )
    report = curate_rows(keys)
    left = {one["row"]["number"]: one["reason"].partition(":")[0] for one in read(keys, "left.jsonl")}
    stayed = {one["number"] for one in read(keys, "rows.jsonl")}
    assert stayed | left.keys() == set(range(5000)) and stayed.isdisjoint(left)
    assert report == {"read": 5000, "kept": len(stayed), "left": report["left"]}
    for kind in ("duplicate", "near duplicate", "contaminated", "length", "quality"):
        wanted = {n for n, one in enumerate(kinds) if one == kind}
        found = {n for n, one in left.items() if one == kind}
        assert len(wanted & found) / len(wanted) >= 0.99, kind
        assert len(wanted & found) / len(found) >= 0.99, kind


def test_rows_leave_by_a_number_in_them_and_one_without_it_is_named(write):
    rows = [row(f"q {n}", f"answer {n} {n * 7}", provenance={"pass@1": n / 10}) for n in range(11)]
    keys = write(rows, dedup="off", ranges=[{"column": "provenance.pass@1", "min": 0.2, "max": 0.8}])
    curate_rows(keys)
    assert [one["provenance"]["pass@1"] for one in read(keys, "rows.jsonl")] == [n / 10 for n in range(2, 9)]
    assert read(keys, "left.jsonl")[0]["reason"] == "range: provenance.pass@1 is 0"
    with pytest.raises(DataError, match=r"data.jsonl:3: ranges: provenance.pass@1 is None; expected a number"):
        curate_rows(write([*rows[2:4], row("a", "b")], ranges=[{"column": "provenance.pass@1", "min": 0.2}]))


def test_a_number_that_is_none_is_named(write):
    with pytest.raises(DataError, match=r"data.jsonl:2: ranges: score is nan; expected a number"):
        curate_rows(write([row("a", "b", score=1.0), row("c", "d", score=float("nan"))], ranges=[{"column": "score", "min": 0}]))  # fmt: skip


def test_a_share_is_that_of_its_decimals(write, tmp_path):
    (tmp_path / "scorer.py").write_text("def same(completions, **_):\n    return [1.0] * len(completions)\n")
    rows = [row(f"q {n}", f"answer {n}") for n in range(25)]
    keys = write(rows, dedup="off", quality=[{"scorer": "scorer.py:same", "keep_share": 0.28}])
    assert curate_rows(keys)["kept"] == 7


def test_sets_of_one_file_name_are_each_told_in_the_origin(write, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "set.jsonl").write_text(json.dumps(row(f"What of {folder}?", f"It is {folder}.")) + "\n")
    keys = write([], datasets=[{"path": "one/set.jsonl"}, {"path": "two/set.jsonl"}])
    assert curate_rows(keys)["kept"] == 2
    origin = data_origins([f"{keys.output_dir}/rows.jsonl"])["rows.jsonl"]
    assert sorted(origin["data"]) == ["one/set.jsonl", "two/set.jsonl"]


@pytest.mark.parametrize("name", ["rows.jsonl", "left.jsonl"])
def test_what_is_read_is_never_written_over(name, write, tmp_path):
    (tmp_path / "out").mkdir()
    before = json.dumps(row("a", "b")) + "\n"
    (tmp_path / "out" / name).write_text(before)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "out" / name)
    for path in (f"out/{name}", "link.jsonl"):
        with pytest.raises(ConfigError, match=rf"curate.yaml: output_dir: .*out would write {name} over .*, which is read"):  # fmt: skip
            curate_rows(write([], datasets=[{"path": path}], output_dir="out"))
    assert (tmp_path / "out" / name).read_text() == before


def test_the_best_share_stays_and_what_cannot_be_scored_leaves(write, tmp_path):
    (tmp_path / "scorer.py").write_text(
        "def size(completions, grade, **_):\n    return [None if g < 0 else float(g) for g in grade]\n"
    )
    rows = [{"prompt": f"q{n}", "completion": f"answer number {n}", "grade": n if n else -1} for n in range(10)]
    keys = write(rows, dedup="exact", quality=[{"scorer": "scorer.py:size", "keep_share": 0.5}])
    curate_rows(keys)
    assert [one["grade"] for one in read(keys, "rows.jsonl")] == [5, 6, 7, 8, 9]
    assert {one["reason"].partition(":")[0] for one in read(keys, "left.jsonl")} == {"unscored", "quality"}


def test_pairs_are_scored_by_their_chosen_answer_and_prompts_by_none(write, tmp_path):
    (tmp_path / "scorer.py").write_text(
        "def good(completions, word='none', **_):\n    return [float(word in c) for c in completions]\n"
    )
    pairs = [{"prompt": f"q{n}", "chosen": f"{'good' if n else 'poor'} {n}", "rejected": f"bad {n}"} for n in range(3)]
    keys = write(pairs, quality=[{"scorer": "scorer.py:good", "scorer_kwargs": {"word": "good"}, "min": 1}])
    curate_rows(keys)
    assert [one["prompt"] for one in read(keys, "rows.jsonl")] == ["q1", "q2"]
    with pytest.raises(DataError, match="this row is a prompt alone"):
        curate_rows(write([{"prompt": "q", "answer": "1"}], quality=[{"scorer": "scorer.py:good", "min": 1}]))


def test_rows_that_a_format_skips_leave_with_its_reason_and_columns_take_our_names(write):
    rows = [{"question": "a", "reply": "one two"}, {"question": "b", "reply": ""}]
    keys = write(rows)
    keys = write(rows, datasets=[{"path": "data.jsonl", "columns": {"prompt": "question", "completion": "reply"}}])
    report = curate_rows(keys)
    assert report["kept"] == 1
    assert read(keys, "rows.jsonl") == [{"prompt": "a", "completion": "one two"}]
    assert read(keys, "left.jsonl")[0]["reason"].startswith("skipped: ")
    origin = data_origins([f"{keys.output_dir}/rows.jsonl"])["rows.jsonl"]
    assert (origin["made_by"], list(origin["data"])) == ("posttrain data curate", ["data.jsonl"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"min_chars": 9, "max_chars": 3}, r"curate.yaml:1: m\w+_chars: .*keeps no row"),
        ({"dedup": "exact", "near": 0.9}, "near does nothing with dedup: exact"),
        ({"quality": [{"scorer": "exact"}]}, "needs one of min and keep_share"),
        ({"ranges": [{"column": "score"}]}, "column: score needs min, max or both"),
        ({"ranges": [{"column": "score", "min": 2, "max": 1}]}, "min: 2 above max: 1 keeps no row"),
        ({"quality": [{"scorer": "gone.py:f", "min": 1}]}, "gone.py does not exist"),
        ({"datasets": [{"path": "data.jsonl", "weight": 1}]}, "weight of entry 1 does nothing"),
        ({"minchars": 3}, "did you mean min_chars"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, said, write):
    with pytest.raises(ConfigError, match=said):
        write([row("a", "b")], **changes)


def test_options_that_a_process_reward_model_has_not_are_refused_before_any_row_is_read(write, tmp_path):
    (tmp_path / "prm").mkdir()
    (tmp_path / "prm" / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForTokenClassification"]}))
    bad = {"scorer": "model:prm", "scorer_kwargs": {"aggregate": "max"}, "min": 0.5}
    keys = write([row("a", "b")], quality=[bad])
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(ConfigError, match="quality: scorer_kwargs: prm: aggregate: got 'max', expected one of min"):
        curate_rows(keys)


def test_nothing_left_is_an_error_that_counts_why(write):
    rows = [row("a", "b"), row("c", "d")]
    curate_rows(write(rows))
    keys = write(rows, min_chars=5)
    with pytest.raises(DataError, match=r"no row of 2 is left: \{'length': 2\}"):
        curate_rows(keys)
    assert not Path(keys.output_dir, "rows.jsonl").exists(), (
        "rows of another choice do not lie beside this one's report"
    )
    assert [one["row"] for one in read(keys, "left.jsonl")] == rows
