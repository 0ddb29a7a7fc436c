"""The notebook runs from top to bottom: in a few steps here, and as it stands in a kernel of its own."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
NOTEBOOK = json.loads((QUICKSTART / "notebook.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name in ("base", "data", "evals"):
        shutil.copytree(QUICKSTART / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(path, kept):
    """The first items that the gate decides on."""
    rows = [line for line in path.read_text().splitlines() if json.loads(line).get("split", "gate") == "gate"]
    path.write_text("\n".join(rows[:kept]) + "\n")


def test_its_cells_run_in_order_in_two_steps_each(project):
    shortened(project / "evals" / "heldout.jsonl", 8)
    names = {}
    for cell in CODE:
        exec(compile(re.sub(r"(max_steps(?:=|\": ))\d+", r"\g<1>2", cell), "notebook", "exec"), names)
    assert names["rl"].status == "done" and len(names["rl"].metrics) == 2
    assert names["verdict"].tests[0].num_items == 8


def test_it_is_stored_without_outputs():
    assert [cell for cell in NOTEBOOK["cells"] if cell.get("outputs") or cell.get("execution_count")] == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("nbclient") is None, reason="a kernel needs posttrain[docs]: make docs")
def test_it_runs_as_it_stands_and_the_model_has_learned(project):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.reads(json.dumps(NOTEBOOK), as_version=4)
    NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(project)}}
    ).execute()
    outputs = [one for cell in notebook.cells if cell.cell_type == "code" for one in cell.outputs]
    shown = [one.data["text/plain"] for one in outputs if one.output_type == "execute_result"]
    assert any("RL does not start" in one.get("text", "") for one in outputs), "the first reward is refused"
    before, after, verdict = re.fullmatch(
        r"\(([\d.]+), ([\d.]+), .*?'?(PASS|FAIL|INCONCLUSIVE)'?.*\)", shown[-2]
    ).groups()
    assert float(before) == 0.0 and float(after) > 0.3 and verdict == "PASS"
    assert r"\\boxed" in shown[-1] or r"\boxed" in shown[-1]
