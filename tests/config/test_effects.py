import pytest

from posttrain.config import load_stage
from posttrain.config.effects import NO_EFFECT
from posttrain.config.schema import keys_of

MINIMAL = "base_model: ./base\ndatasets: [{path: sft_data.jsonl}]\n"


def notes(write, kind, lines):
    return load_stage(kind, write(MINIMAL + ("reward_funcs: [a]\n" if kind == "grpo" else "") + lines + "\n")).notes


@pytest.mark.parametrize(
    ("kind", "lines", "expected"),
    [
        (
            "sft",
            "lora_r: 8\nlora_alpha: 16",
            "lora_r, lora_alpha: no effect, because adapter is none; set adapter: lora or qlora",
        ),
        ("sft", "adapter: lora\nmerge_onto: original", "merge_onto: no effect, because the base is not in 4 bits"),
        (
            "sft",
            "max_steps: 5\nnum_train_epochs: 2",
            "num_train_epochs: no effect, because max_steps decides; set max_steps: -1",
        ),
        ("sft", "warmup_ratio: 0.1\nwarmup_steps: 5", "warmup_ratio: no effect, because warmup_steps decides"),
        (
            "sft",
            "eval_steps: 5",
            "eval_steps: no effect, because there are no eval_datasets, no val_size and no eval_suite",
        ),
        ("dpo", "loss_type: ipo\nsimpo_gamma: 1", "simpo_gamma: no effect, because loss_type is not simpo"),
        (
            "grpo",
            "beta: 0\nkl_estimator: k1",
            "kl_estimator: no effect, because beta is 0, so there is no KL to the reference",
        ),
        ("grpo", "num_train_epochs: 2", "num_train_epochs: no effect, because max_steps decides"),
        (
            "grpo",
            "gradient_accumulation_steps: 2",
            "gradient_accumulation_steps: no effect, because a step of RL takes",
        ),
        ("grpo", "sapo_temperature_pos: 2", "sapo_temperature_pos: no effect, because loss_type is not sapo"),
        (
            "grpo",
            "epsilon_high: 0.3",
            "epsilon_high: no effect, because each generation batch is trained on in one step",
        ),
        ("grpo", "loss_type: kl_cov", "loss_type: no effect, because what is trained on was sampled with the weights"),
        ("grpo", "loss_type: rloo\nadvantage_eps: 1", "advantage_eps: no effect, because leave-one-out advantages"),
        ("grpo", "loss_type: reinforce_pp\nscale_rewards: none", "scale_rewards: no effect, because only"),
        ("grpo", "loss_type: gspo\nimportance_sampling_level: token", "importance_sampling_level: no effect, because"),
    ],
)
def test_a_key_that_does_nothing_is_noted(write, kind, lines, expected):
    found = notes(write, kind, lines)
    assert len(found) == 1
    assert found[0].startswith(expected)


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("sft", "adapter: lora\nlora_r: 8"),
        ("sft", "adapter: qlora\nmerge_onto: original"),
        ("sft", "eval_steps: 5\neval_datasets: [{path: data/sft.jsonl}]"),
        ("dpo", "loss_type: simpo\nsimpo_gamma: 1"),
        ("grpo", "beta: 0.1\nkl_estimator: k1"),
        ("grpo", "max_steps: -1\nnum_train_epochs: 2"),
    ],
)
def test_a_key_that_works_is_not(write, kind, lines):
    assert notes(write, kind, lines) == ()


@pytest.mark.parametrize("row", NO_EFFECT, ids=lambda row: "-".join(row.keys))
def test_rows_name_keys_of_their_model(row):
    assert set(row.keys) <= set(keys_of(row.model))


@pytest.mark.parametrize(
    "lines",
    [
        "multi_objective_aggregation: normalize_then_sum",
        "loss_type: reinforce_pp\nadvantage_eps: 1",
        "loss_type: cispo\nepsilon_high: 4\nnum_iterations: 2",
    ],
)
def test_a_key_that_acts_is_not_noted(write, lines):
    """One reward normalised first is still whitened over the batch; a whitened advantage is divided whatever scale_rewards is."""
    assert not [note for note in notes(write, "grpo", lines) if "no effect" in note]
