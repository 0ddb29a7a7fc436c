"""Bad rewards, bad numbers and bad files, through a whole run: what it says, and what is left on disk."""

import pytest

from posttrain.checkpoint.store import CheckpointStore
from posttrain.errors import ConfigError, DataError, RewardError, TrainingError
from posttrain.report.records import read_run
from posttrain.report.summary import render_summary

GRPO = {
    "datasets": [{"path": "prompts.jsonl"}], "reward_check": "off", "learning_rate": 1e-4, "max_steps": 2,
    "num_generations": 4, "num_prompts_per_step": 4, "max_completion_length": 5, "temperature": 2.0, "reward_timeout_s": 1.0,
}  # fmt: skip
BAD = '''
import math, time

calls = 0

def nan(prompts, completions, **columns):
    return [math.nan for _ in completions]

def raising(prompts, completions, **columns):
    raise KeyError("gold")

def hanging(prompts, completions, **columns):
    time.sleep(60)
    return [0.0 for _ in completions]

def short(prompts, completions, **columns):
    return [1.0]

def one_in_sixteen(prompts, completions, **columns):
    """Fails on the first prompt only: fewer than 10 % of a step."""
    if len(completions) > 1:
        raise ValueError("not as a batch")
    if "What is 0 plus 1?" in prompts[0][0]["content"]:
        raise ValueError("this one never")
    return [float(len(completions[0][0]["content"]))]
'''


@pytest.fixture
def rl(project):
    def make(function, **keys):
        run = project([{"grpo": {**GRPO, "reward_funcs": [f"bad.py:{function}"], **keys}}], evals={})
        (run.folder / "bad.py").write_text(BAD)
        return run

    return make


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nan", "16 of 16 completions are unscored; at most 10% may be. First reasons: nan: returned nan."),
        (
            "raising",
            "2 of 16 completions are unscored already; at most 10% may be. First reasons: raising: raised KeyError: 'gold' (bad.py:10)",
        ),
        ("short", "bad.py:16: reward 'short' returned 1 values for 16 completions"),
    ],
)
def test_a_reward_that_breaks_its_contract_stops_the_run(rl, function, message):
    run = rl(function)
    with pytest.raises(RewardError) as refusal:
        run.run()
    assert message in str(refusal.value)
    assert (run.state.status, run.state.stages[0].status) == ("error", "running")
    assert not (run.out / "stages/01-grpo/model").exists()


def test_a_reward_that_hangs_is_unscored_after_its_deadline(rl):
    run = rl("hanging", num_prompts_per_step=1, num_generations=2)
    with pytest.raises(RewardError, match=r"1 of 2 completions are unscored already.*reward_timeout_s"):
        run.run()


def test_a_few_unscored_completions_are_counted_and_the_run_goes_on(rl):
    run = rl("one_in_sixteen", num_prompts_per_step=24, num_generations=2, max_steps=1)
    assert run.run().status == "done"
    (metrics,) = read_run(run.out).stages[0].metrics
    assert metrics["frac_unscored"] == pytest.approx(2 / 48)
    assert metrics["rewards/one_in_sixteen/mean"] >= 0


def test_an_unknown_reward_function_is_refused_before_any_work(rl):
    run = rl("nann")
    with pytest.raises(ConfigError, match="nann"):
        run.run()
    assert not (run.out / "stages").exists()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(project):
    """The learning rate jumps to what no weight survives, after two good steps were saved."""
    keys = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-3, "max_steps": 2, "save_steps": 1,
            "per_device_train_batch_size": 8, "lr_scheduler_type": "constant"}  # fmt: skip
    wild = {
        **keys,
        "learning_rate": 1e38,
        "max_steps": 6,
        "max_grad_norm": 0,
        "health_rollbacks": 0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
    }
    run = project([{"sft": wild}], evals={})
    with pytest.raises(TrainingError, match=r"step \d: nonfinite.*(loss|grad_norm) (nan|inf)") as failure:
        run.run()
    assert "is the last healthy one" in str(failure.value)
    stage = run.out / "stages/01-sft"
    assert not (stage / "model").exists()
    assert not (stage / "result.json").exists()
    newest = CheckpointStore(stage / "checkpoints").newest_valid()
    failed_at = int(str(failure.value).split("step ", 1)[1].split(":", 1)[0])
    assert newest is not None
    assert newest.step == failed_at - 1
    assert run.state.status == "error"
    assert "The run stopped with an error" in render_summary(run.out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ('{"messages": [}\n', r"sft\.jsonl:1"),
        ('{"wrong": 1}\n', "wrong"),
    ],
    ids=["empty", "broken", "columns"],
)
def test_a_data_file_that_cannot_be_used_is_refused_before_any_work(project, text, message):
    run = project([{"sft": {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1}}])
    (run.folder / "sft.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        run.run()
    assert not (run.out / "stages").exists()


def test_an_unknown_key_names_the_nearest_and_its_line(project, capsys):
    run = project([{"sft": {"datasets": [{"path": "sft.jsonl"}], "lerning_rate": 1e-3}}])
    assert run.command() == 64
    error = capsys.readouterr().err
    assert "did you mean learning_rate?" in error
    line = next(n for n, text in enumerate(run.path.read_text().splitlines(), 1) if "lerning_rate" in text)
    assert f"pipeline.yaml:{line}" in error


def test_a_wrong_type_names_the_line(project, capsys):
    run = project([{"sft": {"datasets": [{"path": "sft.jsonl"}], "learning_rate": "fast"}}])
    assert run.command() == 64
    error = capsys.readouterr().err
    assert "got 'fast', expected a number" in error
    assert "pipeline.yaml:" in error


def test_a_target_that_matches_nothing_is_refused(project):
    from posttrain.errors import PosttrainError

    run = project(
        [{"sft": {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1, "adapter": "lora", "lora_target": ["q_prj"]}}]
    )
    with pytest.raises(PosttrainError, match="q_prj"):
        run.run()
