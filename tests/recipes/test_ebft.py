"""Energy-based fine-tuning: features by transformers' own forward, and what a stage does with them."""

import json
import logging

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from posttrain.data.load import load_sft
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import DataError
from posttrain.models.load import freeze_reference, load_policy, load_tokenizer
from posttrain.recipes.scorers import FeatureScorer
from posttrain.types import TokenSeq

STRIDED = {"mode": "strided", "max_completion_length": 2, "stride": 4}
SEQUENCES = [
    [TokenSeq((5, 6, 7, 8, 9), (False, False, True, True, True)), TokenSeq((5, 6, 3), (False, False, True))],
    [TokenSeq((11, 12, 13, 14), (False, True, True, True)), TokenSeq((11, 12, 13, 14), (False, True, True, True))],
]


def scorer_of(policy, **options):
    values = {"depths": [0.5, 1.0], "embed_method": "last_token", "normalize_layers": False, "at_once": 3, **options}
    return FeatureScorer(policy, ranks=SingleProcess(), **values)


@pytest.fixture
def policy_of(runner, model_dir, data_dir):
    def make(architecture, **options):
        return load_policy(runner.keys_of("ebft", model_dir(architecture), data_dir, **options)).without_dropout()

    return make


def by_transformers(model, seq, how):
    """One sequence alone, nothing packed: the states of each layer at each token, joined and of length 1."""
    with torch.no_grad():
        states = model(input_ids=torch.tensor([seq.ids]), output_hidden_states=True, use_cache=False).hidden_states
    layers = [states[1][0].double(), states[2][0].double()]
    if how["normalize_layers"]:
        layers = [layer / layer.norm(dim=-1, keepdim=True) for layer in layers]
    joined = torch.cat(layers, -1)
    joined = joined / joined.norm(dim=-1, keepdim=True)
    return joined[-1] if how["embed_method"] == "last_token" else joined[list(seq.loss_mask)].mean(0)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize(("embed_method", "normalize_layers"), [("last_token", False), ("mean_pooling", True)])
def test_features_are_those_of_sequences_alone(architecture, embed_method, normalize_layers, policy_of):
    policy, how = policy_of(architecture), {"embed_method": embed_method, "normalize_layers": normalize_layers}
    freeze_reference(policy)
    expected = [by_transformers(policy.model, seq, how) for group in SEQUENCES for seq in group]
    policy.model.apply(lambda module: [p.data.mul_(1.5) for p in module.parameters(recurse=False)] and None)
    found = scorer_of(policy, **how).features(SEQUENCES)
    for vector, one in zip(found, expected, strict=True):
        np.testing.assert_allclose(vector, one.numpy(), atol=2e-5)


def test_features_are_of_the_model_without_its_adapter(policy_of):
    plain, adapted = policy_of("qwen3"), policy_of("qwen3", adapter="lora", lora_r=4)
    freeze_reference(plain)
    for _, parameter in adapted.trainable():
        torch.nn.init.normal_(parameter)
    for vector, one in zip(*(scorer_of(policy).features(SEQUENCES) for policy in (adapted, plain)), strict=True):
        np.testing.assert_allclose(vector, one, atol=2e-5)


def test_equal_completions_have_equal_features_to_the_bit(policy_of):
    """Also where a batch ends between them: rounding is not to be whitened."""
    policy = policy_of("qwen3")
    freeze_reference(policy)
    one, other = SEQUENCES[0]
    found = scorer_of(policy).features([[one, other, one, TokenSeq((5, 6, 4), other.loss_mask), one]])
    assert found[0].tobytes() == found[2].tobytes() == found[4].tobytes() != found[1].tobytes()


# --- learning --------------------------------------------------------------------------------------------------------


LEARNING = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "num_generations": 8,
    "num_prompts_per_step": 4,
    "per_device_train_batch_size": 32,
}


def curve(folder, runner, name):
    values = [row[name] for row in runner.rows(folder) if name in row]
    return np.mean(values[:3]), np.mean(values[-3:])


def test_completions_become_like_the_answers(train, runner):
    folder = train("ebft", max_steps=10, use_whitening=False, **LEARNING, **STRIDED)
    before, after = curve(folder, runner, "features/distance")
    assert after < 0.85 * before


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [STRIDED, {"max_completion_length": 12, "embed_method": "mean_pooling", "use_whitening": False}]
)
def test_they_do_in_other_ways_too(options, train, runner):
    """Whitened features have no distance of their own to fall; the answers' share in them grows."""
    folder = train("ebft", max_steps=30, **LEARNING, **options)
    before, after = curve(folder, runner, "features/alignment")
    assert after > before + 0.03


def test_cross_entropy_is_that_of_the_steps_rows(train, runner, model_dir, data_dir):
    """With nothing else to learn from: the loss of the first step by hand, and weights that it alone moves."""
    folder = train("ebft", max_steps=1, alignment_coef=0.0, diversity_coef=0.0, ce_coef=0.5, num_prompts_per_step=12)
    keys = runner.keys_of("ebft", model_dir("qwen3"), data_dir)
    policy, rows = load_policy(keys), load_sft(keys, load_tokenizer(keys)).rows
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logp = policy.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        trained = [t for t in range(1, len(row.ids)) if row.loss_mask[t]]
        total, count = total - sum(float(logp[t - 1, row.ids[t]]) for t in trained), count + len(trained)
    (step,) = (row for row in runner.rows(folder) if "ce_loss" in row)
    assert step["ce_loss"] == pytest.approx(total / count, rel=1e-5)
    assert step["update_norm"] > 0 and "loss" not in step


def test_a_step_in_which_all_are_worth_the_same_moves_nothing(train, runner):
    folder = train("ebft", max_steps=2, alignment_coef=0.0, diversity_coef=0.0)
    assert [row["empty_step"] for row in runner.rows(folder)[:2]] == [1.0, 1.0]
    assert all("update_norm" not in row for row in runner.rows(folder))


def test_rows_that_ask_for_nothing_are_told_of(train, data_dir, tmp_path, caplog):
    short = {"type": "text", "path": str(tmp_path / "texts.jsonl")}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "abc " * 12)))
    with caplog.at_level(logging.WARNING):
        train("ebft", max_steps=1, datasets=[short], **STRIDED)
    (note,) = [record.getMessage() for record in caplog.records if "behind its first anchor" in record.getMessage()]
    assert note.startswith("1 of 2 rows have") and "texts.jsonl:1" in note
    with pytest.raises(DataError, match=r"texts\.jsonl:1: the row has less than max_completion_length = 100"):
        train("ebft", max_steps=1, datasets=[short], mode="strided", max_completion_length=100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 2}, "unbiased_baseline: true with num_generations: 2"),
        ({"feature_layers": [0.5, 1.5]}, r"feature_layers\n.*1.5 is no share of the model's depth"),
        ({"mode": "strided", "max_completion_length": 121}, "needs rows of 129 tokens, and sequence_len is 128"),
        ({"teachers": [{"model": "start"}]}, "use grpo or distill"),
        ({"rollout": {"engine": "vllm_server", "max_staleness": 1}}, "rollout.max_staleness: 1 in ebft"),
        ({"rollout": {"exact": True}}, "rollout.exact: true in ebft"),
        ({"sharding": {"sp_size": 2}}, "features are those of whole sequences"),
    ],
)
def test_what_is_not_defined_is_refused(options, message, runner, model_dir, data_dir):
    with pytest.raises(ValidationError, match=message):
        runner.keys_of("ebft", model_dir("qwen3"), data_dir, **options)
