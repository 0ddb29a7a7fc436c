"""Stages whose sampler says which experts it took: what is logged, what replay changes, and that a run that goes on is the run that stopped."""

import pytest

from posttrain.config.rl import GRPOKeys
from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer
from posttrain.recipes.experience.engines import EngineSource, _Ask, _vllm_options

TWICE = {"architecture": "qwen3_moe", "num_iterations": 2, "max_steps": 4, "learning_rate": 2e-3, "save_steps": 1}


def asking(how, **rollout):
    return {"rollout": {"routed_experts": how, **rollout}}


def mismatches(runner, folder):
    return [row.get("router/mismatch") for row in runner.rows(folder)]


def same(runner, one, other):
    ours, theirs = runner.weights(one), runner.weights(other)
    return all((tensor == theirs[name]).all() for name, tensor in ours.items())


def test_a_run_that_replays_goes_on_as_it_would_have(train, runner):
    """Stopped after its third step: the second pass over a batch whose experts are in the checkpoint."""
    whole = train("grpo", name="whole", **TWICE, **asking("replay"))
    train("grpo", name="again", **TWICE, **asking("replay"), stop_after=3)
    again = train("grpo", name="again", **TWICE, **asking("replay"))
    assert same(runner, whole, again) and mismatches(runner, whole) == mismatches(runner, again)
    # On the weights that sampled there is none; behind an update the routers would choose otherwise.
    on, off = mismatches(runner, whole)[0::2], mismatches(runner, whole)[1::2]
    assert on == [0.0, 0.0] and off[0] > 0


@pytest.mark.slow
def test_comparing_changes_nothing_and_replay_does(train, runner):
    plain, compared, replayed = (
        train("grpo", name=name, **TWICE, **options)
        for name, options in (("off", {}), ("compare", asking("compare")), ("replay", asking("replay")))
    )
    assert same(runner, plain, compared) and not same(runner, plain, replayed)
    assert mismatches(runner, plain) == [None] * 4 and None not in mismatches(runner, compared)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        asking("replay", max_staleness=1),
        {**asking("replay"), "thinking_budget": 4, "interruption": "So: .", "max_completion_length": 16},
        {**asking("replay"), "adapter": "lora", "lora_r": 4, "gradient_checkpointing": True},
    ],
    ids=["made ahead", "interrupted", "an adapter"],
)
def test_it_goes_with_what_else_samples(options, train, runner):
    whole = train("grpo", name="whole", **TWICE, **options)
    train("grpo", name="again", **TWICE, **options, stop_after=3)
    again = train("grpo", name="again", **TWICE, **options)
    assert same(runner, whole, again)
    assert all(share is not None and share < 0.5 for share in mismatches(runner, whole))


@pytest.mark.slow
def test_ppos_critic_reads_the_same_samples_without_a_router(train, runner):
    folder = train("ppo", architecture="qwen3_moe", value_model=None, max_steps=2, **asking("replay"))
    assert mismatches(runner, folder)[0] == 0.0


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_vllm_on_a_cpu_says_nothing_of_experts_and_is_refused(engine, model_dir):
    keys = GRPOKeys.model_validate({
        "base_model": str(model_dir("qwen3")), "datasets": [{"path": "x.jsonl"}], "reward_funcs": ["r.py:f"],
        **asking("replay", engine=engine),
    })  # fmt: skip
    with pytest.raises(ConfigError, match=rf"replay with rollout.engine: {engine} on a CPU: .*needs Triton; set"):
        _vllm_options(_Ask(EngineSource(keys), keys.rollout, 4), load_tokenizer(keys))
