"""`import posttrain as pt`: Python values in, a run out, with the YAML's errors."""

import json
import subprocess
import sys

import pytest

import posttrain as pt
from posttrain.api.inputs import as_keys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.errors import ConfigError, DataError, EvalError

SFT = {"learning_rate": 3e-3, "max_steps": 2, "per_device_train_batch_size": 2, "sequence_len": 128, "bf16": False}
GRPO = {
    "max_steps": 2, "num_generations": 4, "num_prompts_per_step": 2, "max_completion_length": 6, "sequence_len": 128,
    "reward_check": "off", "bf16": False,
}  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_rows_in_a_model_out(model_dir, data_dir, tmp_path):
    run = pt.sft(base_model=model_dir("llama"), datasets=rows_of(data_dir / "sft.jsonl"), show=False, **SFT)
    assert run.status == "done" and run.folder == tmp_path / "runs/sft"
    assert [row["step"] for row in run.metrics] == [1, 2] and len(run.metrics.column("loss")) == 2
    model, tokenizer = run.load()
    assert model.num_parameters() > 0 and tokenizer.eos_token_id is not None
    assert "<html" in run.report.path.read_text() and "srcdoc" in run.report._repr_html_()
    assert pt.load_run(run.folder) == run
    assert list(run.metrics.to_pandas()["step"]) == [1, 2]


def test_a_yaml_with_arguments_above_it_is_the_run_of_the_command(model_dir, data_dir, tmp_path):
    text = f"base_model: {model_dir('llama')}\ndatasets: [{{path: {data_dir / 'sft.jsonl'}}}]\n"
    (tmp_path / "mine.yaml").write_text(text + "".join(f"{key}: {value}\n" for key, value in SFT.items()))
    run = pt.sft("mine.yaml", max_steps=1, show=False)
    assert len(run.metrics) == 1 and run.folder == tmp_path / "runs/mine"
    by_rows = pt.sft("mine.yaml", max_steps=1, datasets=rows_of(data_dir / "sft.jsonl"), output_dir="other", show=False)
    assert by_rows.metrics[0]["loss"] == run.metrics[0]["loss"]


def test_a_function_of_a_notebook_is_a_reward(model_dir, data_dir):
    scale = 3.0

    def few_letters(completions, **columns):
        return [scale - len(str(completion)) % 5 for completion in completions]

    given = dict(base_model=model_dir("llama"), datasets=data_dir / "prompts.jsonl", show=False, **GRPO)
    run = pt.grpo(reward_funcs=[few_letters], **given)
    assert run.status == "done" and all("rewards/few_letters/mean" in row for row in run.metrics)
    again = pt.grpo(reward_funcs=few_letters, **given)
    assert again.metrics[-1] == run.metrics[-1], "the same function is the same input: nothing runs again"


def test_a_reward_that_hangs_meets_the_same_deadline(model_dir, data_dir):
    def hangs(completions, **columns):
        while True:
            pass

    with pytest.raises(pt.errors.RewardError, match="took longer than"):
        pt.grpo(
            base_model=model_dir("llama"), datasets=data_dir / "prompts.jsonl", reward_funcs=[hangs],
            reward_timeout_s=0.3, show=False, **GRPO,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"max_step": 3}, ConfigError, r"argument: max_step: .*did you mean.*max_steps"),
        ({"learning_rate": "fast"}, ConfigError, "argument: learning_rate"),
        ({"datasets": [{"text": object()}]}, DataError, r"datasets\[0\]"),
        ({"datasets": []}, ConfigError, r"argument: datasets: got \[\]"),
        ({"datasets": 7}, DataError, "got int; expected a path"),
    ],
)
def test_errors_are_those_of_the_yaml(changed, error, words, model_dir, data_dir):
    with pytest.raises(error, match=words):
        pt.sft(
            **{"base_model": model_dir("llama"), "datasets": data_dir / "sft.jsonl", "show": False, **SFT, **changed}
        )


def test_evaluate_and_gate(model_dir, tmp_path):
    suite = tmp_path / "tiny.jsonl"
    items = [{"id": str(n), "prompt": f"{n}+1=", "target": str(n + 1), "scorer": "exact"} for n in range(6)]
    suite.write_text("".join(json.dumps(item) + "\n" for item in items))
    (tmp_path / "gate.yaml").write_text("guards: [{suite: tiny, margin: 0.5}]\n")
    first = pt.evaluate(model_dir("llama"), suite, out="a", max_tokens=4)
    second = pt.evaluate(model_dir("qwen3"), [suite], out="b", max_tokens=4)
    verdict = pt.gate(second, first, "gate.yaml")
    assert verdict.tests[0].num_items == 6 and verdict.baseline_digest == first["tiny"].model_digest
    assert pt.gate(second, first, {"guards": [{"suite": "tiny", "margin": 0.5}]}) == verdict
    with pytest.raises(ConfigError, match=r"argument: guards.*margn"):
        pt.gate(second, first, {"guards": [{"suite": "tiny", "margn": 0.5}]})


def test_two_files_that_would_be_one_suite_are_refused(tmp_path):
    item = json.dumps({"id": "1", "prompt": "1+1=", "target": "2", "scorer": "exact"})
    files = [tmp_path / folder / "sums.jsonl" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(item)
    with pytest.raises(EvalError, match="would both be suite 'sums'"):
        pt.evaluate("never-loaded", files)


def test_every_kind_of_stage_is_a_function():
    assert set(STAGE_KINDS) <= set(pt.__all__)


def test_importing_loads_nothing_heavy():
    code = "import sys, posttrain as pt; print([n for n in ('torch', 'pydantic') if n in sys.modules], pt.__version__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("[] 0.")


def test_a_name_that_is_not_there_names_those_that_are():
    with pytest.raises(AttributeError, match=r"it has .*sft"):
        pt.trane  # noqa: B018


def test_validation_sets_may_be_given_by_name(tmp_path):
    row = {"prompt": "What is 1 + 1?", "completion": "2"}
    keys = as_keys({"eval_datasets": {"math": [row], "chat": ["chat.jsonl", "more.jsonl"]}}, tmp_path)
    names = [(entry["eval_name"], entry["path"].rpartition("/")[2][:13]) for entry in keys["eval_datasets"]]
    assert names == [("math", "eval_datasets"), ("chat", "chat.jsonl"), ("chat", "more.jsonl")]
