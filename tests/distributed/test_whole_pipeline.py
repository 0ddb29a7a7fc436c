"""A whole pipeline on two ranks: certificate, stages, evals, gate, registry; and a reward that keeps state."""

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
def test_a_pipeline_on_two_ranks_ends_in_the_registry_as_on_one(make_project, torchrun, runner, tmp_path):  # noqa: F811
    sft = SFT | {"per_device_train_batch_size": 4, "num_processes": 2}
    dpo = DPO | {"per_device_train_batch_size": 2, "num_processes": 2}
    grpo = GRPO | {"reward_funcs": ["boxed"], "reward_check": "require", "beta": 0.1}
    rows = stages(("sft", sft), ("dpo", dpo), ("grpo", grpo))
    projects = [make_project(tmp_path / name, rows, gate=GATE, register=REGISTER) for name in ("one", "two")]
    for num_processes, project in enumerate(projects, start=1):
        done = torchrun(num_processes, "run", project.path, "-q")
        assert done.stderr.count("rewards: pass") == 1
        assert done.stderr.count("registered yes@1, now champion") == 1
        assert done.stdout.count("report  ") == 1
    for stage in ("01-sft", "02-dpo", "03-grpo"):
        mine, theirs = (runner.losses(project.out / "stages" / stage) for project in projects)
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4), stage
    two = projects[1]
    assert two.state.num_processes == 2
    for num_processes in (2, 1):
        again = torchrun(num_processes, "run", two.path, "-q")
        assert again.stderr.count("done before with the same inputs") == 3
    assert [gate["verdict"] for gate in json.loads((two.out / "pipeline.json").read_text())["gates"]] == ["PASS"]


@pytest.mark.slow
def test_a_reward_with_state_has_one_state_a_rank(write_yaml, torchrun, runner, tmp_path):
    (tmp_path / "rewards.py").write_text(STATEFUL)
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        path = write_yaml("grpo", output_dir=str(folder), reward_funcs=["rewards.py:counts"], max_steps=3)
        torchrun(num_processes, "grpo", path, "-q")
    one, two = (runner.losses(tmp_path / name / "stages/01-grpo") for name in ("1", "2"))
    assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
