"""Each loop end to end on a tiny model, and what must not change its numbers."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.datasets import DatasetKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.rl import GRPOKeys, SamplingKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import TrainingError
from posttrain.models import decode
from posttrain.models.batch import pack
from posttrain.models.trie import LEAST_SHARED
from posttrain.recipes import policy_step
from posttrain.recipes.batches import MicroBatch
from posttrain.types import Sample

ATOL = 1e-6


def close(a, b, atol=ATOL):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).abs().max() <= atol, name


@pytest.fixture
def kto(data_dir):
    return {"loss_type": "kto", "datasets": [{"path": str(data_dir / "kto.jsonl")}]}


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "qwen3_moe", "mamba"])
def test_sft_lowers_the_loss_and_its_model_loads(architecture, train, runner):
    folder = train("sft", architecture=architecture)
    losses = runner.losses(folder)
    assert losses[-1] < losses[0] - 0.5
    AutoModelForCausalLM.from_pretrained(folder / "model")
    result = json.loads((folder / "result.json").read_text())
    assert (result["kind"], result["steps"]) == ("sft", 4)
    assert ("aux_loss" in runner.rows(folder)[0]) == (architecture == "qwen3_moe")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {}),
        ("sft", {"loss_type": "dft"}),
        ("dpo", {}),
        ("dpo", {"loss_type": "sppo_hard", "rpo_alpha": 0.5}),
        ("dpo", {"loss_type": ["dpop", "sft"], "ld_alpha": 0.5, "use_weighting": True}),
        ("dpo", {"loss_type": "aot"}),
        ("dpo", {"loss_type": "aot_unpaired"}),
        ("kto", {}),
    ],
)
def test_eight_rows_at_once_equal_eight_times_one(kind, options, train, runner, kto):
    if kind == "kto":
        kind, options = "dpo", kto
    whole = train(kind, name="whole", per_device_train_batch_size=8, learning_rate=1e-4, **options)
    split = train(
        kind, name="split", per_device_train_batch_size=1, gradient_accumulation_steps=8, learning_rate=1e-4, **options
    )
    assert runner.losses(split) == pytest.approx(runner.losses(whole), abs=ATOL, rel=ATOL)
    close(runner.weights(split), runner.weights(whole), atol=2e-6)


@pytest.mark.parametrize("kind", ["dpo", "reward_model"])
def test_turns_of_conversations_are_computed_once_and_teach_the_same(kind, train, runner, data_dir, monkeypatch):
    """Pairs of two conversations behind one system prompt, each conversation with turns that its pairs share."""
    recipe = importlib.import_module(f"posttrain.recipes.{kind}")
    tokens, folders = {}, {}
    for least_shared in (LEAST_SHARED, math.inf):

        def counted(families, least_shared=least_shared):
            batch = pack(families, least_shared)
            tokens.setdefault(least_shared, []).append(batch.input_ids_N.numel())
            return batch

        monkeypatch.setattr(recipe, "pack", counted)
        data = [{"path": str(data_dir / "turns.jsonl")}]
        folders[least_shared] = train(
            kind, name=str(least_shared), datasets=data, sequence_len=512, optim="sgd", learning_rate=0.05, max_steps=2
        )
    deep, by_pairs = (folders[least_shared] for least_shared in (LEAST_SHARED, math.inf))
    assert sum(tokens[LEAST_SHARED]) < 0.6 * sum(tokens[math.inf])
    assert runner.losses(deep) == pytest.approx(runner.losses(by_pairs), abs=2 * ATOL)
    close(runner.weights(deep), runner.weights(by_pairs), atol=5e-6)


def test_a_group_larger_than_a_micro_batch_is_cut_along_its_tree():
    """Eight samples of one prompt, every second one going on from another turn: two micro-batches, each with one of the turns."""
    prompt, turns = tuple(range(50)), (tuple(range(100, 200)), tuple(range(200, 300)))
    samples = [(*prompt, *turns[n % 2], 300 + n, 400) for n in range(8)]
    group = tuple(
        Sample(np.array(ids, np.int32), np.arange(len(ids)) >= 50, advantage=np.full(len(ids) - 50, 0.5, np.float32))
        for ids in samples
    )
    keys = GRPOKeys(
        base_model="x", datasets=[DatasetKeys(path="x")], reward_funcs=["x.py:f"], per_device_train_batch_size=4
    )
    micros = policy_step.micro_batches_of([group], lambda _: True, keys.per_device_train_batch_size, SingleProcess())
    assert [[int(sample.ids[-2]) for part in micro.rows for sample in part] for micro in micros] == [
        [300, 302, 304, 306], [301, 303, 305, 307],
    ]  # fmt: skip
    assert sum(pack(micro.rows).input_ids_N.numel() for micro in micros) == 2 * (50 + 100 + 4)
    plain = tuple(group[::2])
    assert policy_step._by_branches(plain) == plain


def test_packing_changes_no_loss_per_token(train, runner):
    """All twelve rows in one step, as rows and as one packed micro-batch."""
    rows = train("sft", name="rows", per_device_train_batch_size=12, max_steps=2, learning_rate=1e-4)
    packed = train("sft", name="packed", per_device_train_batch_size=12, max_steps=2, packing=True, learning_rate=1e-4)
    assert runner.losses(packed) == pytest.approx(runner.losses(rows), abs=ATOL)
    close(runner.weights(packed), runner.weights(rows), atol=2e-6)


def test_many_epochs(train, runner):
    folder = train("sft", max_steps=-1, num_train_epochs=4.5, packing=True)
    epochs = [row["epoch"] for row in runner.rows(folder)]
    assert epochs == sorted(epochs)
    assert epochs[-1] == pytest.approx(4.5, abs=0.5)
    assert len(epochs) == json.loads((folder / "result.json").read_text())["steps"]


def test_the_first_step_of_dpo_is_ln_2_and_the_margin_grows(train, runner):
    rows = runner.rows(train("dpo"))
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert rows[-1]["rewards/margins"] > 0.5
    assert rows[-1]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}])
def test_a_precomputed_reference_equals_a_live_one(options, train, runner):
    kept, live = (
        train("dpo", name=str(on), precompute_ref_log_probs=on, learning_rate=1e-4, **options) for on in (True, False)
    )
    assert runner.losses(kept) == pytest.approx(runner.losses(live), abs=ATOL)
    close(runner.weights(kept), runner.weights(live), atol=2e-6)


def test_the_adapter_reference_equals_a_precomputed_one(train, runner):
    kept, live = (
        train("dpo", name=str(on), adapter="lora", lora_r=4, precompute_ref_log_probs=on) for on in (True, False)
    )
    assert runner.losses(kept) == pytest.approx(runner.losses(live), abs=1e-5)


def test_kto_starts_at_one_half(train, runner, kto):
    rows = runner.rows(train("dpo", **kto))
    assert rows[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert rows[0]["kl"] == pytest.approx(0.0, abs=1e-5)


GRPO = {
    "plain": {},
    "kl": {"beta": 0.1},
    "kl in reward": {"beta": 0.1, "kl_in_reward": True},
    "two iterations": {"num_iterations": 2},
    "two steps a generation": {"steps_per_generation": 2},
    "masked": {"mask_truncated_completions": True},
    "masked under a kl": {
        "mask_truncated_completions": True,
        "beta": 0.1,
        "importance_sampling_correction": "token_truncate",
        "num_prompts_per_step": 8,
    },
    "gspo": {"loss_type": "gspo", "num_iterations": 2},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "corrected": {"importance_sampling_correction": "token_truncate"},
    "adapter": {"adapter": "lora", "lora_r": 4, "beta": 0.1},
    "overlong": {"soft_overlong_cache": 3},
    "two rewards": {"reward_funcs": ["spread", "constant"], "multi_objective_aggregation": "normalize_then_sum"},
    "entropy": {"entropy_coef": 0.01},
    # Of a gradient that is only rounding AdamW makes no step as large as its rate.
    "uncertain tokens": {"top_entropy_quantile": 0.2, "adam_epsilon": 1e-6},
    "clip_cov": {
        "loss_type": "clip_cov",
        "clip_cov_ratio": 0.2,
        "clip_cov_lb": -50,
        "clip_cov_ub": 50,
        "adam_epsilon": 1e-6,
    },
    "kl_cov": {
        "loss_type": "kl_cov",
        "kl_cov_ratio": 0.2,
        "ppo_kl_coef": 1.0,
        "num_iterations": 2,
        "adam_epsilon": 1e-6,
    },
    "one by one": {"architecture": "mamba"},
}


@pytest.mark.parametrize("variant", GRPO)
def test_grpo_runs_and_starts_on_policy(variant, train, runner):
    folder = train("grpo", max_steps=3, **GRPO[variant])
    rows = runner.rows(folder)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length"} <= rows[0].keys()
    assert any(row.get("grad_norm", 0.0) > 0 for row in rows) or variant == "masked"
    if "importance_ratio/mean" in rows[0]:
        assert rows[0]["importance_ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def test_grpo_moves_off_policy_only_in_later_steps_of_a_batch(train, runner):
    rows = runner.rows(train("grpo", num_iterations=2, learning_rate=1e-2))
    assert rows[0]["importance_ratio/mean"] == pytest.approx(1.0, abs=1e-4)
    assert abs(rows[1]["importance_ratio/mean"] - 1.0) > 1e-3
    assert rows[2]["importance_ratio/mean"] == pytest.approx(1.0, abs=1e-4)


def test_tokens_of_high_covariance_are_chosen_over_the_step_and_only_where_that_acts(train, runner):
    rows = runner.rows(train("grpo", max_steps=2, **GRPO["clip_cov"]))
    assert [0.1 < row["clip_cov/share"] <= 0.2 for row in rows] == [True, True]
    rows = runner.rows(train("grpo", name="kl", max_steps=2, **GRPO["kl_cov"]))
    assert ["kl_cov/share" in row for row in rows] == [False, True], (
        "on the weights that sampled there is nothing to hold"
    )
    assert {"covariance/mean"} <= rows[1].keys()


def test_grpo_does_not_depend_on_its_micro_batches(train, runner):
    options = {"num_prompts_per_step": 4, "learning_rate": 1e-4, "max_steps": 2}
    whole, split = (train("grpo", name=str(n), per_device_train_batch_size=n, **options) for n in (16, 4))
    assert runner.losses(split) == pytest.approx(runner.losses(whole), abs=ATOL)
    close(runner.weights(split), runner.weights(whole), atol=5e-6)


@pytest.mark.parametrize(
    "variant",
    [
        "plain",
        "gspo",
        "masked under a kl",
        "uncertain tokens",
        *(
            pytest.param(variant, marks=pytest.mark.slow)
            for variant in ("dr_grpo", "kl", "corrected", "entropy", "masked", "clip_cov", "kl_cov")
        ),
    ],
)
def test_a_group_split_over_micro_batches_gives_the_losses_of_the_whole_one(variant, train, runner):
    options = {"max_steps": 2, "learning_rate": 1e-4, "max_completion_length": 8, **GRPO[variant]}
    whole, *split = (train("grpo", name=str(n), per_device_train_batch_size=n, **options) for n in (8, 3, 1))
    for folder in split:
        assert runner.rows(folder)[0] == pytest.approx(runner.rows(whole)[0], abs=2e-5, rel=1e-4)
        assert runner.losses(folder) == pytest.approx(runner.losses(whole), abs=ATOL)
        close(runner.weights(folder), runner.weights(whole), atol=5e-6)


def test_training_and_scoring_take_no_more_completions_at_once_than_the_micro_batch(train, monkeypatch):
    from posttrain.recipes import scorers

    sizes = []
    for module in (scorers, policy_step):
        original = module.pack
        monkeypatch.setattr(
            module, "pack", lambda families, pack=original: sizes.append(sum(map(len, families))) or pack(families)
        )
    train("grpo", max_steps=1, num_generations=5, per_device_train_batch_size=2, **GRPO["kl"])
    assert sorted(sizes, reverse=True)[:8] == [2] * 8 and max(sizes) == 2


def test_groups_without_spread_weigh_nothing_and_count(train, runner, monkeypatch):
    """Leaving them out gives the gradient of keeping them in."""
    from posttrain.recipes import grpo

    options = {"reward_funcs": ["last_digit"], "num_prompts_per_step": 4, "learning_rate": 1e-4, "max_steps": 3}
    skipped = train("grpo", name="skipped", **options)
    monkeypatch.setattr(grpo, "micro_batches_of", lambda groups, *rest: [MicroBatch([g]) for g in groups])
    kept = train("grpo", name="kept", **options)
    shares = [row["frac_reward_zero_std"] for row in runner.rows(skipped)]
    sampled = sum(row["completions/mean_length"] * 4 * 4 for row in runner.rows(skipped))
    trained = runner.rows(skipped)[-1]["num_tokens"]
    assert 0 < trained < sampled, "what was left out was not trained on"
    assert any(0 < share < 1 for share in shares), shares
    assert runner.losses(skipped) == pytest.approx(runner.losses(kept), abs=ATOL)
    close(runner.weights(skipped), runner.weights(kept), atol=2e-6)


def test_the_mean_inside_of_a_prompt_does_not_hang_on_how_its_group_is_split(train, runner):
    options = {"loss_reduction": "prompt_mean_of_token_mean", "num_generations": 5, "num_prompts_per_step": 3,
               "stop": list("aeiou "), "learning_rate": 1e-4, "max_steps": 2}  # fmt: skip
    whole, split = (train("grpo", name=f"by{n}", per_device_train_batch_size=n, **options) for n in (15, 2))
    assert all(row["completions/min_length"] < row["completions/max_length"] for row in runner.rows(whole))
    assert runner.losses(split) == pytest.approx(runner.losses(whole), abs=ATOL, rel=ATOL)
    close(runner.weights(split), runner.weights(whole), atol=2e-6)


def test_filtered_prompts_are_in_no_denominator(train, runner):
    """The first step's gradient is that of a mean over fewer prompts."""
    options = {
        "reward_funcs": ["last_digit"],
        "num_prompts_per_step": 8,
        "num_generations": 2,
        "temperature": 0.3,
        "max_steps": 1,
        "max_grad_norm": 1e9,
    }
    for loss_type in ("grpo", "dr_grpo"):
        plain, filtered = (
            runner.rows(
                train("grpo", name=f"{loss_type}{on}", loss_type=loss_type, zero_variance_filtering=on, **options)
            )[0]
            for on in (False, True)
        )
        left = 1 - plain["frac_reward_zero_std"]
        assert 0 < left < 1, left
        assert filtered["grad_norm"] == pytest.approx(plain["grad_norm"] / left, rel=1e-4)
    flat = runner.rows(train("grpo", reward_funcs=["constant"], zero_variance_filtering=True, max_steps=1))
    assert flat[0]["empty_step"] == 1.0


def test_a_step_without_any_spread_moves_nothing(train, runner, model_dir):
    from safetensors.torch import load_file

    folder = train("grpo", reward_funcs=["constant"], max_steps=2)
    assert [row["frac_reward_zero_std"] for row in runner.rows(folder)] == [1.0, 1.0]
    before = load_file(model_dir("qwen3") / "model.safetensors")
    close({k: v for k, v in runner.weights(folder).items() if k in before}, before, atol=0)


def test_dynamic_sampling_replaces_groups_without_spread(train, runner):
    rows = runner.rows(
        train("grpo", reward_funcs=["last_digit"], dynamic_sampling=True, num_prompts_per_step=3, max_steps=3)
    )
    assert all(row["frac_reward_zero_std"] == 0.0 for row in rows)
    assert max(row["sampling/rounds"] for row in rows) > 1
    flat = runner.rows(
        train("grpo", reward_funcs=["constant"], dynamic_sampling=True, dynamic_sampling_max_rounds=2, max_steps=1)
    )
    assert flat[0]["sampling/rounds"] == 2
    assert flat[0]["frac_reward_zero_std"] == 1.0


def test_a_loss_that_is_not_finite_stops_and_saves_nothing_over_the_good_checkpoint(train, tmp_path, monkeypatch):
    from posttrain.checkpoint.store import CheckpointStore
    from posttrain.recipes import sft

    original, calls = sft.loss, []

    def poisoned(*args):
        calls.append(1)
        terms = original(*args)
        if len(calls) < 3:
            return terms
        metrics = {name: type(ratio)(float("nan"), ratio.den) for name, ratio in terms.metrics.items()}
        return type(terms)(terms.loss * torch.nan, metrics)

    monkeypatch.setattr(sft, "loss", poisoned)
    with pytest.raises(TrainingError, match=r"step 3: nonfinite: .*Training stops here; the checkpoint of step 2 is"):
        train("sft", name="poisoned", save_steps=1, health_rollbacks=0)
    newest = CheckpointStore(tmp_path / "poisoned/checkpoints").newest_valid()
    assert newest is not None and newest.step == 2
    assert not (tmp_path / "poisoned/model").exists()
    monkeypatch.setattr(sft, "loss", original)
    train("sft", name="poisoned", save_steps=1, health_rollbacks=0)
    assert (tmp_path / "poisoned/result.json").exists()


def test_the_best_checkpoint_is_what_a_stage_ends_with(train, runner, data_dir, tmp_path):
    dev = {
        "eval_datasets": [{"path": str(data_dir / "dev-sft.jsonl")}],
        "eval_steps": 1,
        "learning_rate": 0.5,
        "max_steps": 6,
    }
    folder = train("sft", name="best", load_best_model_at_end=True, save_total_limit=1, **dev)
    scores = {row["step"]: row["eval_loss"] for row in runner.rows(folder)}
    best = min(scores, key=lambda step: scores[step])
    assert best != 6, "raise learning_rate: the last step must not be the best for this test to say something"
    kept = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert f"step-{best:08d}" in kept
    stopped = train("sft", name="stopped", **{**dev, "max_steps": 6}, stop_after=best)
    from safetensors.torch import load_file

    expected = load_file(stopped / f"checkpoints/step-{best:08d}/weights.safetensors")
    close({k: v for k, v in runner.weights(folder).items() if k in expected}, expected, atol=0)


def test_validation_of_every_kind(train, runner, data_dir, kto):
    def last(kind, file, **options):
        return runner.rows(
            train(kind, max_steps=2, eval_steps=2, eval_datasets=[{"path": str(data_dir / file)}], **options)
        )[-1]

    assert last("sft", "dev-sft.jsonl")["eval_loss"] > 0
    assert 0 <= last("dpo", "dev-pairs.jsonl")["eval_rewards/accuracies"] <= 1
    assert last("dpo", "dev-kto.jsonl", **kto)["eval_loss"] > 0
    assert 0 <= last("grpo", "dev-prompts.jsonl")["eval_reward"] <= 1


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {"adapter": "qlora", "bf16": True}),
        pytest.param("dpo", {"adapter": "lora", "gradient_checkpointing": "offload"}, marks=pytest.mark.slow),
        ("grpo", {"adapter": "lora", "beta": 0.1, "steps_per_generation": 2}),
    ],
)
def test_offloaded_layers_change_no_number_and_a_resumed_run_has_them_too(
    kind, options, runner, model_dir, data_dir, tmp_path, monkeypatch
):
    """Loss, reference, rollouts, the optimizer's steps, checkpoint, merge and export."""
    if options["adapter"] == "qlora":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(decode, "_MOST_COPIED", 0)  # weights of a larger model are not copied to add the adapter
    model = model_dir("qwen3", num_hidden_layers=4)
    options = {"gradient_checkpointing": True, "lora_r": 8, "max_steps": 2, "save_steps": 1, **options}
    whole, offloaded = (runner.keys_of(kind, model, data_dir, **options, layer_offloading=on) for on in (False, True))
    runner.run_stage(kind, tmp_path / "whole", whole)
    runner.run_stage(kind, tmp_path / "offloaded", offloaded, stop_after=1)
    runner.run_stage(kind, tmp_path / "offloaded", offloaded)
    assert runner.rows(tmp_path / "offloaded") == runner.rows(tmp_path / "whole")
    for file in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (tmp_path / "offloaded" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize("kind", [name for name, kind in STAGE_KINDS.items() if issubclass(kind.keys, SamplingKeys)])
def test_every_stage_that_samples_says_how_long_completions_are(kind, train, runner):
    """Reports show it, and a plan is corrected by it."""
    row = runner.rows(train(kind, max_steps=1))[0]
    lengths = [row[f"completions/{name}_length"] for name in ("min", "mean", "max")]
    assert 1 <= lengths[0] <= lengths[1] <= lengths[2] <= 6 and 0 <= row["completions/clipped_ratio"] <= 1
