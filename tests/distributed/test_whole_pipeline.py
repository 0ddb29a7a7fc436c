"""A whole pipeline on two ranks: stages, evals, gate, registry; with a reward that keeps state."""

import json

import pytest
from tests.pipeline.conftest import DPO, GATE, GRPO, REGISTER, SFT, make_project, stages  # noqa: F401 - a fixture

STATEFUL = '''

CALLS = []


def counts(prompts, completions, answer, **columns):
    """Keeps what it was asked before, as a reward with a cache does."""
    CALLS.extend(answer)
    return [float(len(c[0]["content"]) % 3) for c in completions]
'''


@pytest.mark.slow
def test_a_pipeline_on_two_ranks_ends_in_the_registry(make_project, torchrun, runner, tmp_path):  # noqa: F811
    sft = SFT | {"per_device_train_batch_size": 4, "num_processes": 2}
    dpo = DPO | {"per_device_train_batch_size": 2, "num_processes": 2}
    grpo = GRPO | {"reward_funcs": ["rewards.py:counts"], "eval_steps": 1}
    grpo |= {"val_size": 3}
    rows = stages(("sft", sft), ("dpo", dpo), ("grpo", grpo))
    projects = [make_project(tmp_path / name, rows, gate=GATE, register=REGISTER) for name in ("one", "two")]
    for num_processes, project in enumerate(projects, start=1):
        with (project.folder / "rewards.py").open("a") as file:
            file.write(STATEFUL)
        done = torchrun(num_processes, "run", project.path, "-q")
        assert "registered yes@1, now champion" in done.stderr
        assert done.stdout.count("report  ") == 1
    two = projects[1]
    assert two.state.status == "passed"
    assert two.state.num_processes == 2
    for stage in ("01-sft", "02-dpo", "03-grpo"):
        mine, theirs = (runner.losses(project.out / "stages" / stage) for project in projects)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4), stage
    again = torchrun(2, "run", two.path, "-q")
    assert again.stderr.count("done before with the same inputs") == 3
    with_one = torchrun(1, "run", two.path, "-q")
    assert with_one.stderr.count("done before with the same inputs") == 3
    assert [gate["verdict"] for gate in json.loads((two.out / "pipeline.json").read_text())["gates"]] == ["PASS"]
