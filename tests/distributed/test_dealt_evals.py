"""Evals, the certificate and live canaries are dealt over ranks: the reports of one process; a stop meanwhile ends all of them."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.distributed.conftest import environment
from tests.pipeline.conftest import GRPO, make_project, stages  # noqa: F401 - a fixture

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import ModelKeys
from posttrain.evals.suite import load_suite
from posttrain.evidence import EvalReport
from posttrain.recipes.measure.certify import certify, read_certificate
from posttrain.recipes.measure.evaluate import evaluate

OWN = '''
def half(completions, target, hint):
    """Looks at a column that only some items have."""
    return [0.5 if hint_ else float(len(text) % 2) for text, hint_ in zip(completions, hint)]
'''
SCRIPT = """
import json, os, sys
from pathlib import Path

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import ModelKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.evals.suite import load_suite
from posttrain.recipes.measure import certify as certifies, evaluate as measures
from posttrain.rollout.embedded import EmbeddedEngine

job, asked = json.loads(sys.argv[1]), []
generate = EmbeddedEngine.generate


def counted(self, requests, params):
    asked.append(len(requests))
    return generate(self, requests, params)


EmbeddedEngine.generate = counted
with join_ranks() as ranks:
    asking = measures.Asking(ranks)
    suites = [(load_suite(name, Path(keys["path"])), SuiteKeys(**keys)) for name, keys in job["suites"].items()]
    measures.evaluate(ModelKeys(base_model=job["model"]), suites, "gate", Path(job["folder"]), asking)
    keys, folder = GRPOKeys.model_validate(job["grpo"]), Path(job["folder"])
    of_evals = list(asked)
    certifies.certify(keys, folder / "certificate.json", asking)
    found = ranks.gather([of_evals, asked[len(of_evals):]])
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""


def _suites(folder):
    """Greedy, sampled, ranked, and by a scorer of one's own; one has fewer items than two ranks."""
    (folder / "own.py").write_text(OWN)
    rows = {
        "greedy": ({"max_tokens": 5}, [{"id": f"g{n}", "prompt": f"{n} and", "target": "x"} for n in range(5)]),
        "sampled": (
            {"max_tokens": 5, "num_samples": 3, "temperature": 1.0},
            [{"id": f"s{n}", "prompt": f"What is {n}?", "target": "x"} for n in range(5)],
        ),
        "ranked": ({}, [{"id": "r", "prompt": "Say", "target": 1, "choices": [" one", " two and more", " 3"]}]),
        "own": (
            {"max_tokens": 5},
            [{"id": "0", "prompt": "A", "target": "x", "scorer": "own.py:half", "hint": "h"}]
            + [{"id": str(n), "prompt": f"B {n}", "target": "x", "scorer": "own.py:half"} for n in range(1, 4)],
        ),
    }
    for name, (_, items) in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return {name: {"path": str(folder / f"{name}.jsonl"), **keys} for name, (keys, _) in rows.items()}


def _grpo(model, data_dir):
    return {
        "base_model": str(model), "datasets": [{"path": str(data_dir / "prompts.jsonl")}], "output_dir": "unused",
        "reward_funcs": ["boxed"], "num_generations": 4, "max_completion_length": 4, "allow_raw_base": True, "seed": 3,
    }  # fmt: skip


def test_two_ranks_measure_what_one_process_does(found_by, model_dir, data_dir, tmp_path):
    model, suites = model_dir("qwen3"), _suites(tmp_path)
    job = {
        "model": str(model), "suites": suites, "folder": str(tmp_path / "two"), "grpo": _grpo(model, data_dir),
    }  # fmt: skip
    (evals, groups), (other_evals, other_groups) = found_by(2, SCRIPT, job)
    assert (evals, other_evals) == ([3, 9, 2], [2, 6, 2])
    assert sum(groups) == sum(other_groups) > 0
    loaded = [(load_suite(name, Path(keys["path"])), SuiteKeys(**keys)) for name, keys in suites.items()]
    one = evaluate(ModelKeys(base_model=str(model)), loaded, "gate", tmp_path / "one")
    for name, report in one.items():
        assert EvalReport.load(tmp_path / "two" / f"{name}-gate").digest == report.digest, name
    certify(GRPOKeys.model_validate(job["grpo"]), tmp_path / "one/certificate.json")
    mine, theirs = (read_certificate(tmp_path / name / "certificate.json") for name in ("one", "two"))
    assert mine.digest == theirs.digest


LONGEST_S = 20
WAITS = """
import time
from pathlib import Path

from posttrain.rewards.library import boxed

MARK = Path(__file__).parent


def _waits(what):
    while (MARK / f"hold-{what}").exists():
        (MARK / f"holding-{what}").touch()
        time.sleep(0.1)


def scores(completions, **columns):
    _waits("evals")
    return [1.0 for _ in completions]


def pays(prompts, completions, **columns):
    if list(MARK.glob("runs/yes/evals/base/*/report.json")):  # the rewards are tried before anything is begun, too
        _waits("certificate")
    return boxed(prompts, completions, **columns)
"""


@pytest.mark.slow
def test_a_stop_within_evals_and_certificate_ends_all_ranks_with_75_and_the_next_start_goes_on(
    make_project,  # noqa: F811
    tmp_path,
):
    """And what rank 0 does alone may take longer than the others wait for each other (`ddp_timeout`)."""
    own = {"allow_raw_base": True, "max_steps": 1, "ddp_timeout": LONGEST_S}
    grpo = GRPO | {"reward_funcs": ["waits.py:pays"], "reward_check": "require"} | own
    project = make_project(tmp_path / "project", stages(("grpo", grpo)))
    project.values["evals"]["yes"]["path"] = "held.jsonl"
    (project.folder / "waits.py").write_text(WAITS)
    rows = [
        json.loads(line) | {"scorer": "waits.py:scores"}
        for line in (project.folder / "yes.jsonl").read_text().splitlines()
    ]
    (project.folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for what in ("evals", "certificate"):
        (project.folder / f"hold-{what}").touch()
        ranks = _started(project)
        _until(ranks, (project.folder / f"holding-{what}").exists)
        ranks.send_signal(signal.SIGTERM)
        _, err = ranks.communicate(timeout=600)
        assert ranks.returncode == 75, err[-3000:]
        assert err.count("start again to go on") == 1, err[-3000:]
        assert project.state.status == "stopped"
        (project.folder / f"hold-{what}").unlink()
    (project.folder / "hold-certificate").touch()
    (project.folder / "holding-certificate").unlink()
    ranks = _started(project)
    _until(ranks, (project.folder / "holding-certificate").exists)
    time.sleep(LONGEST_S + 4)
    (project.folder / "hold-certificate").unlink()
    _, err = ranks.communicate(timeout=600)
    assert project.state.status == "done", err[-3000:]


def _started(project):
    words = [
        sys.executable,
        "-m",
        "posttrain.cli.app",
        "run",
        str(project.path),
        "-q",
        "--ray",
        "local",
        "--workers",
        "2",
    ]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def _until(process, condition):
    until = time.monotonic() + 600
    while process.poll() is None and not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()[-3000:]
    assert condition()


COUNTING = """
import os, pathlib

def spread(prompts, completions, answer, **columns):
    with pathlib.Path("{place}").open("a") as scored:
        scored.write(f"{{os.environ.get('RANK', 'alone')}} {{len(completions)}}\\n")
    return [sum(map(ord, c[0]["content"])) % 17 / 17.0 for c in completions]
"""


@pytest.mark.slow
def test_held_out_prompts_are_dealt_and_their_reward_is_that_of_one_process(
    torchrun, write_yaml, runner, data_dir, tmp_path
):
    held_out = data_dir / "dev-prompts.jsonl"
    rows, found = len(held_out.read_text().splitlines()), {}
    for ranks in (1, 2):
        scored = tmp_path / f"scored-{ranks}"
        (tmp_path / f"counts{ranks}.py").write_text(COUNTING.format(place=scored))
        keys = {"reward_funcs": [f"{tmp_path}/counts{ranks}.py:spread"], "eval_datasets": [{"path": str(held_out)}]}
        run = tmp_path / f"run-{ranks}"
        torchrun(ranks, "grpo", write_yaml("grpo", max_steps=1, output_dir=str(run), save_steps=0, **keys))
        [row] = [row for row in runner.rows(run / "stages/01-grpo") if "eval_reward" in row]
        lines = [line.split() for line in scored.read_text().splitlines()]
        found[ranks] = row["eval_reward"], lines
    assert found[2][0] == found[1][0]
    # The last call of each process is of the held-out rows: the first one's are of the batch.
    last = {who: int(count) for who, count in found[2][1]}
    assert sorted(last.values()) == sorted([rows // 2, rows - rows // 2])
    assert int(found[1][1][-1][1]) == rows
