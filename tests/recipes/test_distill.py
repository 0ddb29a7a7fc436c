"""Distillation: teachers are learned from, on the policy's own answers or on given ones, and one's equal teaches nothing."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.config.distill import DistillKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import DataError
from posttrain.models.batch import pack
from posttrain.models.load import load_policy
from posttrain.objectives.distill import DistillSpec
from posttrain.objectives.reduce import Normalizer
from posttrain.recipes.distill import loss, micro_batches
from posttrain.recipes.teachers import Teachers
from posttrain.types import Origin, Prompt, Sample

LOSSES = {"opd": {}, "opd with top-k": {"teacher_top_k": 8}, "forward_kl": {}, "reverse_kl": {}, "jsd": {}}
RICHER = {"model": "policy", "prompt": "{prompt} A correct solution: {answer}"}
OWN = ("loss", "teacher/gap")


@pytest.fixture
def teacher(other_weights):
    return {"model": str(other_weights)}


def named(name):
    return {"loss_type": name.split()[0], **LOSSES[name]}


def given(data_dir, **options):
    return {"datasets": [{"path": str(data_dir / "sft.jsonl")}], "on_policy_share": 0.0, **options}


def mean(rows, name, part):
    return float(np.mean([row[name] for row in rows[part] if name in row]))


# --- learning --------------------------------------------------------------------------------------------------------


FAST = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "num_prompts_per_step": 4,
    "per_device_train_batch_size": 16,
}


@pytest.mark.parametrize(
    "name", ["jsd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("forward_kl", "reverse_kl"))]
)
def test_the_policy_becomes_like_its_teacher_on_its_own_answers(name, train, runner, teacher):
    rows = runner.rows(train("distill", teachers=[teacher], max_steps=10, loss_type=name, **FAST))
    assert mean(rows, "loss", slice(-3, None)) < 0.75 * mean(rows, "loss", slice(0, 3))


@pytest.mark.parametrize(
    "name", ["jsd", *(pytest.param(n, marks=pytest.mark.slow) for n in ("forward_kl", "reverse_kl"))]
)
def test_the_policy_becomes_like_its_teacher_on_given_answers(name, train, runner, teacher, data_dir):
    rows = runner.rows(train("distill", teachers=[teacher], max_steps=10, **given(data_dir, loss_type=name), **FAST))
    assert mean(rows, "loss", slice(-3, None)) < 0.6 * mean(rows, "loss", slice(0, 3))
    assert mean(rows, "teacher/agreement", slice(-3, None)) > mean(rows, "teacher/agreement", slice(0, 3))


@pytest.mark.parametrize("top_k", [0, 8])
def test_opd_measures_the_gap_and_moves(top_k, train, runner, teacher):
    """That it goes where the reverse KL goes is enumerated in tests/objectives/test_distill.py."""
    row = runner.rows(train("distill", teachers=[teacher], max_steps=1, teacher_top_k=top_k))[0]
    assert row["grad_norm"] > 0 and abs(row["teacher/gap"]) > 1e-2
    assert row["loss"] == pytest.approx(row["teacher/gap"], rel=1e-4 if top_k == 0 else 0.5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_that_is_the_policy_moves_nothing(name, train, runner, model_dir):
    health = {rule: {"enabled": False} for rule in ("zero_gradient", "policy_not_moving")}
    options = named(name) | {"teachers": [{"model": "policy"}], "max_steps": 1, "health": health}
    row = runner.rows(train("distill", **options))[0]
    assert abs(row["loss"]) < 1e-6 and row["teacher/gap"] == 0.0 and row["grad_norm"] < 1e-5


def test_a_policy_learns_what_a_hint_tells_it(train, runner):
    """Self-distillation: the same weights, told the solution, are the teacher."""
    rows = runner.rows(train("distill", teachers=[RICHER], loss_type="reverse_kl", max_steps=10, **FAST))
    assert mean(rows, "loss", slice(-3, None)) < 0.8 * mean(rows, "loss", slice(0, 3))


def test_rows_are_their_own_or_the_data_s_by_the_share_that_is_asked_for(train, runner, teacher, data_dir):
    data = given(data_dir, loss_type="jsd", teachers=[teacher], max_steps=1, num_prompts_per_step=6)
    tokens = {}
    for share in (0.0, 0.5):
        rows = runner.rows(train("distill", **{**data, "on_policy_share": share}))
        tokens[share] = [row["loss_tokens"] for row in rows]
        assert all(("completions/mean_length" in row) is (share > 0) for row in rows)
    assert tokens[0.0] != tokens[0.5]


# --- the loss --------------------------------------------------------------------------------------------------------


def sample(*ids, prompt=3):
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= prompt)


def lessons():
    asked = Prompt(Origin("rows.jsonl", 3), ({"role": "user", "content": "1 plus 2?"},), {"answer": "3"})
    return [
        (asked, (sample(5, 6, 7, 8, 9), sample(5, 6, 7, 10, 11, 12), sample(5, 6, 7, 20))),
        (asked, (sample(15, 16, 17, 18, 19, 21, 22),)),
    ]


def made(folder, data_dir, runner, teachers, **options):
    keys = runner.keys_of("distill", folder, data_dir, teachers=teachers, **options)
    policy = load_policy(keys).without_dropout()
    return policy, Teachers.of(keys.teachers, keys, policy, SingleProcess()), keys


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3",
        pytest.param("gemma2", marks=pytest.mark.slow),
        pytest.param("gpt2", marks=pytest.mark.slow),
        pytest.param("qwen3_moe", marks=pytest.mark.slow),
    ],
)
def test_how_rows_are_split_does_not_change_the_gradient(
    name, architecture, model_dir, data_dir, runner, make_local_model
):
    """Two teachers, one of them with its own prompt; models with capped, padded and routed forwards."""
    # A router's balancing loss is a mean over what went through it together, so it is another one for each split.
    changes = {"router_aux_loss_coef": 0.0} if architecture == "qwen3_moe" else {}
    folder = make_local_model(architecture, **changes)
    path = folder / "model.safetensors"
    save_file({n: 0.9 * v for n, v in load_file(path).items()}, path, metadata={"format": "pt"})
    policy, teachers, _ = made(
        model_dir(architecture, **changes), data_dir, runner, [{"model": str(folder)}, {**RICHER, "weight": 0.5}]
    )
    spec, norm, found = DistillSpec(**named(name)), Normalizer(10.0, 4.0), []
    for at_once in (100, 2, 1):
        policy.model.zero_grad()
        total = 0.0
        for micro in micro_batches(lessons(), at_once):
            terms = loss(policy, teachers, micro, spec, norm)
            terms.loss.backward()
            total += float(terms.metrics["loss"].num)
        found.append((total, torch.cat([p.grad.flatten() for _, p in policy.trainable() if p.grad is not None])))
    for total, gradient in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-4, abs=5e-6)  # of `opd` a sum of differences of either sign
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-5)
    assert found[0][1].abs().max() > 1e-3


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_the_reverse_kl_is_that_of_the_whole_logits_of_transformers(
    architecture, model_dir, data_dir, runner, make_local_model
):
    folder = make_local_model(architecture, initializer_range=0.2)
    policy, teachers, _ = made(model_dir(architecture), data_dir, runner, [{"model": str(folder)}])
    found = loss(policy, teachers, lessons(), DistillSpec("reverse_kl"), Normalizer(10.0, 4.0)).metrics["loss"].num
    other = load_policy(runner.keys_of("sft", folder, data_dir), trainable=False)
    expected = 0.0
    with torch.no_grad():
        for _, group in lessons():
            for one in group:
                own, taught = (torch.log_softmax(p.score_logits(one.ids), -1) for p in (Whole(policy), Whole(other)))
                at = np.flatnonzero(one.loss_mask) - 1
                expected += float((own.exp() * (own - taught)).sum(-1)[at].sum())
    assert found == pytest.approx(expected, rel=1e-3)


class Whole:
    """All logits of one sequence, with the padded attention of transformers."""

    def __init__(self, policy):
        self.model = policy.model

    def score_logits(self, ids):
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager")
        logits = self.model(input_ids=torch.from_numpy(ids).long()[None]).logits[0].float()
        self.model.set_attn_implementation(before)
        return logits


def test_a_group_that_is_split_keeps_its_prompt():
    found = micro_batches(lessons(), 2)
    assert [[len(group) for _, group in micro] for micro in found] == [[2], [1, 1]]
    assert all(prompt.columns == {"answer": "3"} for micro in found for prompt, _ in micro)
    assert pack([group for _, group in found[0]]).num_sequences == 2


# --- what it is given ------------------------------------------------------------------------------------------------


def test_held_out_rows_are_measured_and_choose_the_best(train, runner, teacher, data_dir):
    dev = [{"path": str(data_dir / "dev-prompts.jsonl")}]
    folder = train(
        "distill",
        teachers=[teacher],
        max_steps=4,
        eval_datasets=dev,
        eval_steps=1,
        load_best_model_at_end=True,
        save_steps=1,
    )
    losses = [row["eval_loss"] for row in runner.rows(folder)]
    best = json.loads((folder / "checkpoints/best.json").read_text())
    assert best == {"step": 1 + losses.index(min(losses)), "score": -min(losses)}


def test_a_row_that_cannot_be_sampled_for_is_named(train, teacher, data_dir, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "The answer is 7."}\n')
    options = {"datasets": [{"path": str(path)}], "teachers": [teacher], "loss_type": "jsd", "max_steps": 1}
    with pytest.raises(DataError, match=r"texts\.jsonl:1: the row has no prompt before its answer.*on_policy_share: 0"):
        train("distill", on_policy_share=0.5, **options)
    assert train("distill", on_policy_share=0.0, **options)
    with pytest.raises(DataError, match=r"a prompt of \d+ tokens > sequence_len - max_completion_length = 2"):
        train(
            "distill",
            teachers=[teacher],
            sequence_len=128,
            max_completion_length=126,
            overflow="truncate",
            **{**given(data_dir), "loss_type": "jsd", "on_policy_share": 0.5},
        )


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"teachers": []}, "teachers"),
        ({"on_policy_share": 0.5}, "which is told from the policy's own samples"),
        ({"on_policy_share": 0.5, "loss_type": "jsd"}, "rows with answers have no other columns"),
        ({"rollout": {"max_staleness": 1}}, "samples from the weights that it trains"),
        ({"rollout": {"exact": True}}, r"rollout\.exact: true in distill, which samples from the weights that it trains"),
        ({"teachers": [{"model": "x"}], "loss_type": "jsd", "on_policy_share": 0, "rollout": {"engine": "vllm"}}, "does nothing with on_policy_share: 0"),
    ],
)  # fmt: skip
def test_what_distillation_cannot_do_is_refused(options, why, runner, model_dir, data_dir):
    with pytest.raises(ValueError, match=why):
        runner.keys_of("distill", model_dir("qwen3"), data_dir, **options)


def test_rows_are_prompts_or_answers():
    base = {"base_model": "m", "datasets": [{"path": "d.jsonl"}], "teachers": [{"model": "start"}]}
    keys = DistillKeys.model_validate(base)
    assert (keys.row_kind, keys.holds_reference, keys.rows_per_step(2)) == ("prompts", True, 32)
    assert DistillKeys.model_validate({**base, "loss_type": "jsd", "on_policy_share": 0.5}).row_kind == "examples"
