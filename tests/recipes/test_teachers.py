"""Teachers in RL: who they are, what they read, and that one who says nothing new changes no bit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from posttrain.config.load import load_stage
from posttrain.config.rl import GRPOKeys
from posttrain.distributed.ranks import SingleProcess
from posttrain.errors import ConfigError, DataError, ModelError
from posttrain.models.load import load_policy
from posttrain.recipes.teachers import Teachers, shapes_beside
from posttrain.types import Origin, Prompt, Sample

RICHER = "{prompt} A correct solution: {answer}"


@pytest.fixture
def policy(model_dir, data_dir, runner):
    return load_policy(runner.keys_of("grpo", model_dir("qwen3"), data_dir)).without_dropout()


@pytest.fixture
def teachers(policy, model_dir, data_dir, runner):
    def make(*given, **options):
        keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, teachers=list(given), **options)
        return Teachers.of(keys.teachers, keys, policy, SingleProcess())

    return make


def asked(text="What is 1 plus 2?", **columns):
    return Prompt(Origin("rows.jsonl", 3), ({"role": "user", "content": text},), columns)


def sample(*ids, prompt=3):
    return Sample(np.array(ids, np.int32), np.arange(len(ids)) >= prompt)


LESSON = (asked(answer="3"), (sample(5, 6, 7, 8, 9), sample(5, 6, 7, 10, 11, 12)))


def same_weights(one, other, runner):
    one, other = runner.weights(one), runner.weights(other)
    return all(torch.equal(one[name], other[name]) for name in one)


# --- in a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rlsd", "opd"])
def test_a_teacher_without_weight_or_with_nothing_to_add_is_grpo_to_the_bit(how, train, runner):
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2}
    plain = train("grpo", name="plain", **options)
    silent = train(
        "grpo",
        name="0",
        teachers=[{"model": "policy", "prompt": RICHER}],
        teacher_advantage=how,
        teacher_coef=0,
        **options,
    )
    same = train(
        "grpo", name="same", teachers=[{"model": "policy", "prompt": "{prompt}"}], teacher_advantage=how, **options
    )
    assert same_weights(plain, silent, runner) and same_weights(plain, same, runner)
    assert runner.losses(plain) == runner.losses(silent) == runner.losses(same)
    assert [row["teacher/gap"] for row in runner.rows(same)[::2]] == [0.0]


def test_a_richer_prompt_moves_the_weights_elsewhere(train, runner):
    plain, taught = (
        train("grpo", max_steps=1),
        train("grpo", max_steps=1, teachers=[{"model": "policy", "prompt": RICHER}], teacher_advantage="rlsd"),
    )
    assert not same_weights(plain, taught, runner)
    assert runner.rows(taught)[0]["teacher/gap"] != 0.0 and runner.rows(taught)[0]["teacher/coef"] == 0.5


def test_opd_is_an_advantage_where_rewards_say_nothing(train, runner, other_weights):
    """At ratio 1 the loss is minus the mean advantage: teacher_coef · (log policy − log teacher)."""
    folder = train(
        "grpo", max_steps=1, reward_funcs=["constant"], teachers=[{"model": str(other_weights)}], teacher_coef=0.7
    )
    row = runner.rows(folder)[0]
    assert abs(row["teacher/gap"]) > 1e-2
    assert row["loss"] == pytest.approx(0.7 * row["teacher/gap"], rel=1e-4) and row["grad_norm"] > 0


def test_a_policy_that_leaves_its_teacher_is_noticed(train, other_weights):
    """The reward pulls one way, and the teacher, who has hardly any weight, would go the other."""
    limits = {"steps": 2, "times": 1.0, "nats": 0.0}
    folder = train(
        "grpo", max_steps=14, learning_rate=3e-2, teachers=[{"model": str(other_weights)}], teacher_coef=1e-6,
        health={"teacher_gap": limits},
    )  # fmt: skip
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert any(event["kind"] == "finding" and event["rule"] == "teacher_gap" for event in events), events[-3:]


@pytest.mark.filterwarnings("error:Mean of empty slice", "error:invalid value encountered")
def test_a_batch_without_a_trained_token_has_no_distance_to_its_teacher(train, runner):
    options = {"mask_truncated_completions": True, "max_completion_length": 2, "max_steps": 1}
    row = runner.rows(train("grpo", teachers=[{"model": "policy"}], **options))[0]
    assert row["completions/clipped_ratio"] == 1.0 and "teacher/gap" not in row and row["teacher/coef"] == 0.5


# --- who teaches, and what it reads ----------------------------------------------------------------------------------


def test_a_teacher_reads_its_own_prompt_before_the_same_tokens(teachers, policy):
    one = teachers({"model": "policy", "prompt": RICHER}).all[0]
    prompt, group = LESSON
    for given, made in zip(group, one.asked(prompt, group), strict=True):
        text = policy.tokenizer.decode(made.ids[: int(made.loss_mask.argmax())])
        assert text == "<|im_start|>user\nWhat is 1 plus 2? A correct solution: 3<|im_end|>\n<|im_start|>assistant\n"
        assert made.ids[made.loss_mask].tolist() == given.ids[given.loss_mask].tolist()


def test_several_are_averaged_by_weight_and_chosen_by_column(teachers, other_weights):
    lesson = (asked(answer="3", subject="maths"), LESSON[1])
    one, other = {"model": "policy"}, {"model": str(other_weights)}
    a, b = teachers(one).logp([lesson]), teachers(other).logp([lesson])
    both = teachers({**one, "weight": 3}, other).logp([lesson])
    for x, y, mixed in zip(a, b, both, strict=True):
        assert np.abs(x - y).max() > 1e-3
        np.testing.assert_allclose(mixed, (3 * x + y) / 4, rtol=1e-6)
    apart = teachers({**one, "when": {"subject": "maths"}}, {**other, "when": {"subject": "verse"}})
    found = apart.logp([lesson, (asked(subject="verse"), LESSON[1])])
    for x, y, first, second in zip(a, b, found[:2], found[2:], strict=True):
        np.testing.assert_allclose(first, x, rtol=1e-6)
        np.testing.assert_allclose(second, y, rtol=1e-5)


def test_an_adapter_teaches_what_the_model_merged_with_it_does(teachers, train, model_dir):
    folder = train("sft", adapter="lora", lora_r=4, max_steps=2, learning_rate=3e-2)
    base = {"model": str(model_dir("qwen3"))}
    plain, adapted, merged = (
        teachers(one).logp([LESSON])
        for one in (base, {**base, "adapter": str(folder / "adapter")}, {"model": str(folder / "model")})
    )
    for before, x, y in zip(plain, adapted, merged, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
        assert np.abs(x - before).max() > 1e-2


def test_the_start_teaches_what_the_policy_was(teachers, policy):
    from posttrain.models.load import freeze_reference

    freeze_reference(policy)
    start = teachers({"model": "start"}).logp([LESSON])
    with torch.no_grad():
        next(p for _, p in policy.trainable()).mul_(1.5)
    again, now = teachers({"model": "start"}).logp([LESSON]), teachers({"model": "policy"}).logp([LESSON])
    for a, b, c in zip(start, again, now, strict=True):
        assert (a == b).all() and np.abs(a - c).max() > 1e-3


def test_another_vocabulary_is_refused_by_its_digest(teachers, make_local_model):
    folder = make_local_model("qwen3")
    path = folder / "tokenizer.json"
    body = json.loads(path.read_text())
    vocab = body["model"]["vocab"]
    first, second = [token for token in vocab if len(token) == 1][:2]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(body))
    with pytest.raises(
        ModelError, match=r"teachers\.0\.model: .* has another vocabulary \(digest [0-9a-f]{12}…\) than the policy"
    ):
        teachers({"model": str(folder)})


def test_rows_that_nobody_can_teach_are_named_before_the_first_step(teachers):
    rows = [(asked(subject="verse"), (5, 6))]
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3: no teacher teaches this prompt; expected columns with \{'subject': 'maths'\}"
    ):
        teachers({"model": "policy", "when": {"subject": "maths"}}).check(rows, 100)
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3: teachers.prompt names \{answer\}; this row has `subject`, `prompt`"
    ):
        teachers({"model": "policy", "prompt": RICHER}).check(rows, 100)
    with pytest.raises(DataError, match=r"has \d+ tokens > sequence_len - max_completion_length = 5"):
        teachers({"model": "policy", "prompt": "{prompt}"}).check(rows, 5)


# --- keys ------------------------------------------------------------------------------------------------------------


def written(folder, *lines):
    path = folder / "grpo.yaml"
    (folder / "p.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    path.write_text(
        "\n".join(["base_model: some/model", "datasets: [{path: p.jsonl}]", "reward_funcs: [exact]", *lines]) + "\n"
    )
    return path


def test_a_teacher_is_found_beside_the_yaml(tmp_path):
    (tmp_path / "big").mkdir()
    keys = load_stage(
        "grpo", written(tmp_path, "teachers: [{model: ./big}, {model: policy}, {model: some/teacher}]")
    ).keys
    assert isinstance(keys, GRPOKeys)
    assert [teacher.model for teacher in keys.teachers] == [str(tmp_path / "big"), "policy", "some/teacher"]


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["teachers: [{model: ./absent}]"], "absent does not exist"),
        (["teachers: [{model: policy, revision: main}]"], "remove revision"),
        (["teachers: [{model: policy}]", "teacher_advantage: rlsd", "teacher_coef: 2"], "whose λ is a share"),
        (["teachers: [{prompt: x}]"], "model"),
    ],
)
def test_teachers_that_cannot_be_are_refused(lines, why, tmp_path):
    with pytest.raises(ConfigError, match=why):
        load_stage("grpo", written(tmp_path, *lines))


def test_a_teacher_is_pinned_by_what_it_holds(other_weights, runner, model_dir, data_dir):
    from posttrain.pipeline.pins import data_pins

    keys = runner.keys_of(
        "grpo", model_dir("qwen3"), data_dir, teachers=[{"model": "policy"}, {"model": str(other_weights)}]
    )
    before = data_pins(keys)
    assert "teachers.0" not in before and before["teachers.1"].startswith("sha256:")
    save_file({"x": torch.zeros(1)}, other_weights / "model.safetensors")
    assert data_pins(keys)["teachers.1"] != before["teachers.1"]


def test_a_plan_knows_the_teachers_that_are_loaded(other_weights, runner, model_dir, data_dir):
    given = [{"model": "policy"}, {"model": str(other_weights)}, {"model": "big", "url": "http://127.0.0.1:8000"}]
    (shape,) = shapes_beside(runner.keys_of("grpo", model_dir("qwen3"), data_dir, teachers=given))["teachers"]
    assert (shape.hidden, shape.num_layers) == (64, 2)
    assert shapes_beside(runner.keys_of("sft", model_dir("qwen3"), data_dir)) == {
        "teachers": [],
        "judges": [],
        "critics": [],
    }
