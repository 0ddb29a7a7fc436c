"""A task of lm-eval as a suite of a whole run: gated, registered, shown, and looked for in the training data."""

import json
from importlib.util import find_spec

import pytest
from tests.pipeline.conftest import GATE, REGISTER, SFT, question, said, stages, write_rows

from posttrain.errors import DataError
from posttrain.evidence import EvalReport, Verdict
from posttrain.report.build import build_report
from posttrain.report.records import read_run
from posttrain.report.tables import before_after

if find_spec("lm_eval") is None:
    pytest.skip("needs lm-eval: posttrain[eval]", allow_module_level=True)

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: FILES}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "Yes."
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
num_fewshot: 0
metric_list: [{metric: exact_match}]
"""
GATED = {**GATE, "primary": [{"suite": "sums", "min_delta": 0.35}]}


@pytest.fixture
def run(make_project, tmp_path):
    """A run whose only suite is the task, of 40 documents."""
    suite = {"path": "lm-eval:./sums.yaml?apply_chat_template=true", "max_tokens": 6}
    made = make_project(
        tmp_path / "project", stages(("sft", SFT)), evals={"sums": suite}, gate=GATED, register=REGISTER
    )
    docs = [{"question": question(200 + n)[0]["content"]} for n in range(40)]
    file = write_rows(made.folder / "docs.jsonl", docs)
    (made.folder / "sums.yaml").write_text(TASK.replace("FILES", json.dumps({"test": str(file)})))
    return made


def test_a_task_is_gated_registered_and_shown_in_the_report(run):
    outcome = run.run()
    assert (outcome.verdict, outcome.promoted) == (Verdict.PASS, True)
    gate = json.loads((run.out / "gates" / "final" / "verdict.json").read_text())
    [primary] = [test for test in gate["tests"] if test["role"] == "primary"]
    assert (primary["suite"], primary["num_items"], primary["verdict"]) == ("sums", 40, "PASS")
    reports = [EvalReport.load(path.parent) for path in run.out.glob("evals/*/sums-gate/report.json")]
    means = sorted(sum(item.scores[0] for item in report.items) / 40 for report in reports)
    assert means == [primary["baseline_mean"], primary["candidate_mean"]]
    assert {len(item.completions) for report in reports for item in report.items} == {1}
    [row] = before_after(read_run(run.out))
    assert (row.suite, row.scores[-1].mean) == ("sums", pytest.approx(primary["candidate_mean"]))
    page = build_report(run.out).read_text()
    assert "What is 20 plus" in page or "What is 21 plus" in page, "the question, and not the number of its document"
    assert "item " not in page.partition('class="ask"')[2][:200]


def test_a_task_whose_documents_are_in_the_training_data_is_found_before_the_run(run):
    with open(run.folder / "sft.jsonl", "a") as file:
        for n in range(3):
            file.write(json.dumps({"messages": question(200 + n) + said("Yes.")}) + "\n")
    with pytest.raises(DataError, match=r"contamination: 3 rows \(11\.1%, refused above 1%\).*sums"):
        run.run()
    assert not run.out.exists()
