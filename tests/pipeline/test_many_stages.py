"""Stages that follow each other as few try: two of RL, KTO before RL; and how mirrors tell them apart."""

import json
import os

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import shutil

import pytest
from mlflow import MlflowClient

from posttrain.files import digest_json, read_json

SFT = {
    "datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 8,
    "per_device_train_batch_size": 8, "lr_scheduler_type": "constant",
}  # fmt: skip
GRPO = {
    "datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["number"], "learning_rate": 1e-4, "max_steps": 2,
    "num_generations": 2, "num_prompts_per_step": 2, "max_completion_length": 6, "temperature": 2.0,
}  # fmt: skip
GATE = {"baseline": "alias:champion", "guards": [{"suite": "yes", "margin": 0.4}]}


def question(number):
    return [{"role": "user", "content": f"What is {number // 10} plus {number % 10}?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def mlflow_runs(uri):
    client = MlflowClient(uri, uri)
    runs = client.search_runs([client.get_experiment_by_name("yes").experiment_id])
    steps = {run.info.run_name: [m.step for m in client.get_metric_history(run.info.run_id, "reward")] for run in runs}
    return {run.info.run_name: run.info.run_id for run in runs}, steps


@pytest.mark.slow
def test_two_rl_stages_are_two_runs_in_mlflow_which_stay_the_same_where_the_project_is_moved(project, tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    run = project([{"grpo": GRPO}, {"grpo": {**GRPO, "max_steps": 1}}], evals={}, allow_raw_base=True, mlflow=uri)
    run.run()
    before, steps = mlflow_runs(uri)
    assert steps == {"01-grpo": [1, 2], "02-grpo": [1]}
    shutil.move(run.folder, tmp_path / "moved")
    run.folder = tmp_path / "moved"
    shutil.rmtree(run.out / "stages/02-grpo")
    run.run(on_change="rerun")
    after, _ = mlflow_runs(uri)
    assert {name: key for name, key in after.items() if name in before} == before


def test_kto_then_rl_is_promoted_with_a_manifest_of_each(project):
    kto = {"datasets": [{"path": "kto.jsonl"}], "loss_type": "kto", "learning_rate": 1e-4, "max_steps": 2}
    run = project([{"sft": SFT}, {"dpo": kto}, {"grpo": GRPO}], gate=GATE, register={"name": "yes"})
    rows = [
        {"prompt": question(n), "completion": said("Yes." if n % 2 else f"No {n}"), "label": bool(n % 2)}
        for n in range(1, 25)
    ]
    (run.folder / "kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run.run().promoted
    book = run.registry()
    chain = book.chain("yes", 1)
    book.close()
    assert [manifest.stage for manifest in chain] == ["sft", "dpo", "grpo"]
    certificate = read_json(run.out / "stages/03-grpo/certificate.json")
    assert chain[-1].inputs["certificate"] == digest_json(certificate)


@pytest.mark.slow
def test_two_rl_stages_carry_two_certificates_into_the_registry(project):
    second = {**GRPO, "reward_funcs": ["number", "soft_overlong"]}
    run = project([{"sft": SFT}, {"grpo": GRPO}, {"grpo": second}], gate=GATE, register={"name": "yes"})
    assert run.run().promoted
    book = run.registry()
    chain, stored = book.chain("yes", 1), book.records("yes", 1, "certificate")
    book.close()
    assert [manifest.inputs["certificate"] for manifest in chain[1:]] == [digest_json(record) for record in stored]
    assert len({record["reward_digest"] for record in stored}) == 2
