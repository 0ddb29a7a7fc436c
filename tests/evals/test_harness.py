"""Tasks of lm-eval as suites: items, digests, and what is said of those that cannot be had."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.config import hub
from posttrain.config.paths import _suite
from posttrain.errors import EvalError
from posttrain.evals.harness import TaskSpec
from posttrain.evals.suite import load_suite, suite_file_digest, suite_files

YAML = """
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {test: FILE}
test_split: test
output_type: OUTPUT
doc_to_text: "Q: {{question}} A:"
doc_to_target: answer
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
"""

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: posttrain[eval]")


@pytest.fixture
def task(tmp_path):
    """`task(output_type, questions)`: the task's YAML."""

    def make(output_type="multiple_choice", questions=("is it", "was it")):
        rows = [json.dumps({"question": question, "answer": n % 2}) for n, question in enumerate(questions)]
        (tmp_path / "docs.jsonl").write_text("\n".join(rows) + "\n")
        text = YAML.replace("FILE", str(tmp_path / "docs.jsonl")).replace("OUTPUT", output_type)
        (tmp_path / "mine.yaml").write_text(text)
        return tmp_path / "mine.yaml"

    return make


@needs_lm_eval
def test_the_documents_of_a_task_are_items_in_the_split_gate(task):
    suite = load_suite("mine", f"lm-eval:{task()}")
    assert [(item.id, item.prompt, item.target, item.choices) for item in suite.on("gate")] == [
        ("0", "Q: is it A:", "yes", ("yes", "no")), ("1", "Q: was it A:", "no", ("yes", "no")),
    ]  # fmt: skip
    assert suite.scorer == "lm-eval:mine.yaml" and suite.sizes("gate") == (2, 0)
    assert suite_files(suite.path) == {}


@needs_lm_eval
def test_the_digest_is_that_of_the_yaml_and_its_documents(task):
    file = task()
    path = Path(f"lm-eval:{file}")
    before = suite_file_digest(path)
    assert suite_file_digest(path) == before
    assert suite_file_digest(Path(f"{path}?num_fewshot=1")) != before
    file.write_text(file.read_text().replace("Q:", "Question:"))
    assert suite_file_digest(path) != before
    task(questions=("is it", "will it be"))
    assert suite_file_digest(path) != before
    task()
    assert suite_file_digest(path) == before


@needs_lm_eval
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("OUTPUT", "loglikelihood_rolling"), "perplexity of a text is no score"),
        (("?", "?metric=f1"), "no metric f1; it has acc"),
        (("?", "?num_shots=3"), "no option num_shots; expected num_fewshot"),
        (("?", "?num_fewshot=many"), "expected a number, or true or false"),
        (("test: ", "other: "), "the data of lm-eval's task"),
    ],
)
def test_a_task_that_is_no_suite_is_refused(task, change, said):
    before, after = change
    file = task(after if before == "OUTPUT" else "multiple_choice")
    if before == "test: ":
        file.write_text(file.read_text().replace(before, after))
    with pytest.raises(EvalError, match=rf"evals\.mine: .*{said}"):
        load_suite("mine", f"lm-eval:{file}{after if before == '?' else ''}")


@needs_lm_eval
@pytest.mark.slow
def test_a_task_that_is_not_there_or_not_reachable_is_one_line(monkeypatch):
    import huggingface_hub.constants as client

    monkeypatch.setattr(hub, "why_unreachable", lambda endpoint: "no route to host")
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(client, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name, said in (("arc_easy", "the hub cannot be reached"), ("arc_eezy", "lm-eval has no task 'arc_eezy'")):
        with pytest.raises(EvalError, match=said) as caught:
            load_suite("arc", f"lm-eval:{name}")
        assert "\n" not in str(caught.value)


def test_a_tasks_file_is_relative_to_the_yaml_and_a_name_is_none(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    assert _suite("lm-eval:./mine.yaml?metric=acc", tmp_path) == f"lm-eval:{tmp_path / 'mine.yaml'}?metric=acc"
    assert _suite("lm-eval:arc_easy", tmp_path) == "lm-eval:arc_easy"
    with pytest.raises(ValueError, match="does not exist"):
        _suite("lm-eval:./yours.yaml", tmp_path)


def test_options_stand_behind_the_task():
    spec = TaskSpec.parse("lm-eval:arc_easy?num_fewshot=5&apply_chat_template=true&metric=acc_norm", "evals.arc")
    assert spec == TaskSpec("arc_easy", 5, True, False, "acc_norm")
