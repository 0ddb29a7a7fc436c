"""Every kind of stage with every loss, and every other choice that a loss is made of, takes on two and on four ranks the steps of one process.

The rows are read off the keys, so that a loss that is added is run here.
"""

from typing import Literal, get_args, get_origin

import pytest
from tests.distributed.test_two_ranks import ROUNDING, torchrun_jobs

from posttrain.config.effects import without_effect
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.stages import TrainKeys
from posttrain.objectives.distill import DistillSpec
from posttrain.objectives.preference import PreferenceSpec
from posttrain.objectives.spec import PolicySpec
from posttrain.objectives.terms import spec_from

OF_A_LOSS = {
    "loss_type", "f_divergence_type", "kl_estimator", "kl_reduction", "multi_objective_aggregation", "loss_reduction",
    "importance_sampling_level", "importance_sampling_correction", "scale_rewards", "advantage_estimator", "teacher_advantage", "mode",
    "embed_method",
}  # fmt: skip
OF_NO_LOSS = {
    "credit": "what it tells apart is in episodes: test_episodes.py",
    "preset": "a row of test_two_ranks.py",
    "precompute_ref_log_probs": "rows of test_two_ranks.py",
    "packing_strategy": "how rows are laid out before they are dealt",
    "train_on": "which tokens of a row have a loss",
    "reward_check": "whether there is a certificate",
}
"""Choices that are no part of what ranks add up, or are tried elsewhere."""
COMMON = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.05, "save_steps": 0}
"""A step of SGD is as long as its gradient is large, so what is only rounding stays so."""
TEACHERS = [{"model": "start"}, {"model": "policy", "prompt": "{prompt} It is {answer}."}]
OWN = {
    "dpo": {"per_device_train_batch_size": 2},
    "grpo": {"beta": 0.1, "num_iterations": 2, "num_prompts_per_step": 3},
    "ppo": {"beta": 0.1, "num_iterations": 2, "critic_learning_rate": 0.05, "kl_in_reward": False},
    "online_dpo": {"num_prompts_per_step": 3, "num_iterations": 2},
    "ebft": {"num_prompts_per_step": 3, "ce_coef": 0.1, "advantage_estimator": "group"},
}
BESIDE = {
    ("loss_type", "kto"): {"data": "kto"},
    ("loss_type", "robust"): {"label_smoothing": 0.1},
    ("loss_type", "exo_pair"): {"label_smoothing": 0.1},
    ("loss_type", "luspo"): {"importance_sampling_level": "sequence"},
    ("loss_type", "clip_cov"): {"clip_cov_ratio": 0.3, "clip_cov_lb": -50, "clip_cov_ub": 50},
    ("loss_type", "kl_cov"): {"kl_cov_ratio": 0.3},
    ("multi_objective_aggregation", "normalize_then_sum"): {"reward_funcs": ["spread", "last_digit"]},
    ("teacher_advantage", "opd"): {"teachers": TEACHERS},
    ("teacher_advantage", "rlsd"): {"teachers": TEACHERS},
    ("mode", "strided"): {"max_completion_length": 3},
}
"""What a choice needs to be one."""
APART = ("loss_type", "multi_objective_aggregation", "scale_rewards")
ALSO = {"grpo": [{"kl_in_reward": True}], "ppo": [{"kl_in_reward": True}]}
"""What else a loss is made of."""
SPECS = {"dpo": PreferenceSpec, "grpo": PolicySpec, "distill": DistillSpec}
"""What says whether a loss is defined with its keys."""
NOT_IN = {"online_dpo": {"kto", "sft"}}
"""Losses that a kind refuses."""


def choices(annotation):
    """The names among which a key chooses, in order."""
    if get_origin(annotation) is Literal:
        return [name for name in get_args(annotation) if isinstance(name, str)]
    return list(dict.fromkeys(name for part in get_args(annotation) for name in choices(part)))


def own_choices(kind):
    """The keys of a kind that choose among names, beside those of every stage."""
    keys = STAGE_KINDS[kind].keys.model_fields
    found = {name: choices(field.annotation) for name, field in keys.items() if name not in TrainKeys.model_fields}
    return {name: names for name, names in found.items() if names}


def rows_of(kind):
    """Of those in `APART` a row for each; of the others, which go together, the first of each in one row, the second in the next."""
    own = {name: names for name, names in own_choices(kind).items() if name in OF_A_LOSS}
    apart = [{name: choice} for name in APART for choice in own.pop(name, ()) if choice not in NOT_IN.get(kind, ())]
    longest = max(map(len, own.values()), default=0)
    others = [{name: names[place % len(names)] for name, names in own.items()} for place in range(longest)]
    return [*apart, *others, *ALSO.get(kind, [])] or [{}]


ROWS = {
    f"{kind}, {' '.join(map(str, row.values()))}" if row else kind: (kind, row)
    for kind in STAGE_KINDS
    for row in rows_of(kind)
}


def options_of(kind, row, data_dir):
    options = COMMON | OWN.get(kind, {})
    for choice in row.items():
        options |= BESIDE.get(choice, {})
    options |= row
    if "data" in options:
        options["datasets"] = [{"path": str(data_dir / f"{options.pop('data')}.jsonl")}]
    return options if STAGE_KINDS[kind].rewarded else options | {"num_processes": 2}


def test_every_choice_of_a_kind_is_run_here_or_said_to_be_of_no_loss(runner):
    known = OF_A_LOSS | OF_NO_LOSS.keys()
    for kind in STAGE_KINDS:
        assert own_choices(kind).keys() <= known, "name a new choice in OF_A_LOSS, or in OF_NO_LOSS and why"
        assert kind in runner.FILES and kind in runner.OWN, "a new kind of stage has no row on ranks"
    assert known == {name for kind in STAGE_KINDS for name in own_choices(kind)}


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_what_a_row_chooses_has_an_effect(kind, runner, data_dir):
    for row in rows_of(kind):
        keys = runner.keys_of(kind, data_dir, data_dir, **options_of(kind, row, data_dir))
        assert not without_effect(keys, row.__contains__), row
        if kind in SPECS:
            spec_from(SPECS[kind], keys)


@pytest.fixture(scope="module")
def on_ranks(runner, model_dir, data_dir, tmp_path_factory):
    """`on_ranks(4, name)`: the folder of that row's stage; all rows are run once by so many ranks."""
    done = {}

    def call(ranks, name):
        if ranks not in done:
            done[ranks] = tmp_path_factory.mktemp(f"on-{ranks}")
            common = {"model": str(model_dir("llama")), "data": str(data_dir)}
            jobs = [
                {
                    "kind": kind,
                    "folder": str(done[ranks] / str(i)),
                    "options": options_of(kind, row, data_dir),
                    **common,
                }
                for i, (kind, row) in enumerate(ROWS.values())
            ]
            torchrun_jobs(runner, jobs, ranks, timeout=3000)
        return done[ranks] / str(list(ROWS).index(name))

    return call


@pytest.mark.slow
@pytest.mark.xdist_group("every loss")
@pytest.mark.parametrize("name", ROWS)
def test_two_and_four_ranks_take_the_steps_of_one_process(name, on_ranks, runner, model_dir, data_dir, tmp_path):
    kind, row = ROWS[name]
    runner.run_stage(
        kind, tmp_path, runner.keys_of(kind, model_dir("llama"), data_dir, **options_of(kind, row, data_dir))
    )
    expected = runner.weights(tmp_path)
    for ranks in (2, 4):
        folder = on_ranks(ranks, name)
        assert runner.losses(folder) == pytest.approx(runner.losses(tmp_path), rel=1e-6, abs=ROUNDING), ranks
        for mine, one in zip(runner.rows(folder), runner.rows(tmp_path), strict=True):
            assert mine == pytest.approx(one, abs=ROUNDING, rel=5e-6), (ranks, one["step"])
        found = runner.weights(folder)
        assert found.keys() == expected.keys()
        for tensor in expected:
            assert (found[tensor] - expected[tensor]).abs().max() < ROUNDING, (ranks, tensor)
