"""A reward model learns which answers are better, and is what transformers loads."""

import json
import random

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from posttrain.config.stages import ModelKeys, RewardModelKeys
from posttrain.data.load import load_comparisons
from posttrain.errors import ConfigError, DataError, ModelError
from posttrain.models.batch import pack
from posttrain.models.export import merge_into
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.provenance import recorded_bits
from posttrain.models.reward_head import up_to_reward
from posttrain.objectives.reduce import Normalizer
from posttrain.recipes.measure.learned import load_learned
from posttrain.recipes.reward_model import loss
from posttrain.rewards.workers import RewardPool


def ask(a, b):
    return [{"role": "user", "content": f"What is {a} plus {b}?"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def write(folder, rows, name="compared.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path)}]


def polite(count, start=0, flipped=0.0, **more):
    """Pairs in which the better answer says please; of `flipped` of them the worse one does."""
    rng = random.Random(start)
    for n in range(start, start + count):
        better, worse = say(f"{n % 10}, please"), say(f"{n % 10}, {'ha' * (n % 4)} no")
        pair = (worse, better) if rng.random() < flipped else (better, worse)
        yield {"prompt": ask(n // 10 % 10, n % 10), "chosen": pair[0], "rejected": pair[1], **more}


def test_it_learns_what_is_better_on_pairs_that_it_has_not_seen(train, runner, tmp_path):
    data = {"datasets": write(tmp_path, polite(48)), "eval_datasets": write(tmp_path, polite(24, 50), "dev.jsonl")}
    row = runner.rows(train("reward_model", max_steps=10, **data))[-1]
    assert row["eval_rewards/accuracies"] >= 0.95
    assert row["eval_rewards/margins"] > 0.5


def test_swapped_pairs_are_ordered_one_less_as_often(train, runner, tmp_path):
    """The same model scores the same pairs the other way round."""
    rows = list(polite(16))
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    found = [
        runner.rows(train("reward_model", max_steps=1, datasets=write(tmp_path, rows), eval_datasets=dev))[-1]
        for dev in (write(tmp_path, rows, "as.jsonl"), write(tmp_path, swapped, "swapped.jsonl"))
    ]
    assert found[0]["eval_rewards/accuracies"] == pytest.approx(1 - found[1]["eval_rewards/accuracies"])
    assert found[0]["eval_rewards/margins"] == pytest.approx(-found[1]["eval_rewards/margins"], abs=1e-6)


@pytest.mark.parametrize(
    "architecture", ["qwen3", pytest.param("gpt_oss", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow)]
)  # fmt: skip
def test_what_is_exported_gives_in_transformers_the_rewards_of_training(architecture, train, data_dir, tmp_path):
    """Padded rows in transformers, one copy of the prompt in ours."""
    rows = list(polite(12))
    folder = train("reward_model", architecture=architecture, max_steps=2, datasets=write(tmp_path, rows))
    keys = RewardModelKeys(base_model=str(folder / "model"), datasets=write(tmp_path, rows), sequence_len=128)
    policy = load_policy(keys, trainable=False)
    pad = policy.tokenizer.pad_token_id
    pairs = [
        (up_to_reward(chosen, pad), up_to_reward(rejected, pad))
        for chosen, rejected, _ in load_comparisons(keys, policy.tokenizer)
    ]
    with torch.no_grad():
        packed = policy.rewards(pack(pairs))

    model = AutoModelForSequenceClassification.from_pretrained(folder / "model", attn_implementation="eager")
    assert model.eval().config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [
        tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False).removesuffix("\n")
        for row in rows for side in ("chosen", "rejected")
    ]  # fmt: skip
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert packed.tolist() == pytest.approx(padded.tolist(), rel=1e-4, abs=1e-5)
    assert float(padded.std()) > 1e-3, "rewards that are all alike prove nothing"


def test_how_pairs_are_packed_does_not_change_their_gradient(model_dir, tmp_path):
    rows = list(polite(6, margin=0.3))
    keys = RewardModelKeys(base_model=str(model_dir("qwen3")), datasets=write(tmp_path, rows), sequence_len=128)
    policy = load_policy(keys).without_dropout()
    data = [
        (up_to_reward(a, policy.tokenizer.pad_token_id), up_to_reward(b, policy.tokenizer.pad_token_id), margin)
        for a, b, margin in load_comparisons(keys, policy.tokenizer)
    ]
    norm, gradients = Normalizer(tokens=0, sequences=6), []
    for micros in ([data], [data[:1], data[1:]], [list(reversed(data))]):
        policy.model.zero_grad()
        for micro in micros:
            loss(policy, micro, 0.01, norm).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.trainable()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5)


def test_a_margin_asks_for_a_greater_difference(train, runner, tmp_path):
    found = [
        runner.losses(train("reward_model", max_steps=1, datasets=write(tmp_path, polite(4, margin=margin), f"{margin}.jsonl")))
        for margin in (0, 2)
    ]  # fmt: skip
    assert found[1][0] > found[0][0] + 0.5


def test_a_margin_that_is_no_number_is_refused_with_its_line(train, tmp_path):
    rows = [*polite(2), *polite(1, margin="much")]
    with pytest.raises(DataError, match=r"compared\.jsonl:3.*`margin` is .*expected a number"):
        train("reward_model", datasets=write(tmp_path, rows))


def test_the_reward_is_read_where_transformers_reads_it():
    from posttrain.types import TokenSeq

    def seq(ids, trained):
        return TokenSeq(ids, tuple(i in trained for i in range(len(ids))))

    assert up_to_reward(seq((5, 6, 7, 2, 9), {2, 3}), 0).ids == (5, 6, 7, 2, 0), "what follows the answer is cut"
    assert up_to_reward(seq((5, 6, 7, 2), {2, 3}), 2).ids == (5, 6, 7, 2), "its end is padding, where that is one token"


def test_a_reward_model_does_not_pass_for_a_language_model(train, data_dir):
    model = train("reward_model", max_steps=1) / "model"
    with pytest.raises(ModelError, match="is a reward model: it has no head that gives tokens"):
        load_policy(ModelKeys(base_model=str(model)))


def test_a_model_without_such_a_head_is_refused(train):
    with pytest.raises(ModelError, match=r"did not load|no linear `score`"):
        train("reward_model", architecture="mamba", max_steps=1)


@pytest.mark.parametrize(("options", "why"), [({"eval_suite": "x.jsonl"}, "answers nothing")])
def test_what_a_reward_model_cannot_do_is_refused(options, why, runner, model_dir, data_dir):
    with pytest.raises(ValueError, match=why):
        runner.keys_of("reward_model", model_dir("qwen3"), data_dir, **options)


def test_its_tokenizer_may_get_tokens(train, model_dir):
    model = train("reward_model", max_steps=1, added_tokens=["<|never seen|>"]) / "model"
    assert "<|never seen|>" in load_tokenizer(ModelKeys(base_model=str(model))).get_vocab()


ADAPTERS = [{"adapter": "lora"}, pytest.param({"adapter": "qlora"}, marks=pytest.mark.slow), pytest.param({"adapter": "lora", "load_in_8bit": True}, marks=pytest.mark.slow), pytest.param({"adapter": "lora", "use_dora": True}, marks=pytest.mark.slow)]  # fmt: skip


@pytest.fixture(params=ADAPTERS, ids=["lora", "qlora", "8 bits", "dora"])
def adapted(request, train, tmp_path):
    """A stage that trained an adapter and a head far from where they began."""
    options = {"lora_r": 4, "learning_rate": 0.01, "max_steps": 6, **request.param}
    return train("reward_model", datasets=write(tmp_path, polite(24)), **options)


def test_an_adapter_and_its_head_are_what_peft_loads_and_the_merged_model_is_the_same(adapted, model_dir):
    """PEFT's way: the base under a new head, then the adapter, which brings the trained one. In 4 bits, on what 4 bits left of it."""
    config = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and "score" in config["modules_to_save"]
    assert "score" not in config["target_modules"]
    merged = AutoModelForSequenceClassification.from_pretrained(adapted / "model").eval()
    torch.manual_seed(99)
    base = AutoModelForSequenceClassification.from_pretrained(model_dir("qwen3"), num_labels=1)
    before = base.score.weight.clone()
    if config["use_dora"] is False and "bnb" not in (adapted / "adapter" / "posttrain.json").read_text():
        model = PeftModel.from_pretrained(base, adapted / "adapter").eval()
        ids = torch.arange(40)[None]
        model.config.pad_token_id = merged.config.pad_token_id
        with torch.no_grad():
            expected, found = merged(ids).logits, model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    trained = load_file(adapted / "model" / "model.safetensors")
    assert not torch.equal(trained["score.weight"], before)


def test_an_adapter_pays_what_its_merged_model_pays(adapted, tmp_path):
    said = [say("3, please"), say("3, haha no"), say("It is three, of course.")]
    with (
        RewardPool([f"model:{adapted / 'adapter'}"], load=load_learned) as from_adapter,
        RewardPool([f"model:{adapted / 'model'}"], load=load_learned) as from_merged,
    ):
        found, expected = (
            [one.total for one in pool.score([ask(1, 2)] * 3, said)] for pool in (from_adapter, from_merged)
        )
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len({round(value, 3) for value in found}) == 3


def test_an_adapter_is_merged_by_hand_to_the_same_rewards(adapted, model_dir, tmp_path):
    folder, base = tmp_path / "by-hand", str(model_dir("qwen3"))
    keys = ModelKeys.model_validate({"base_model": base} | recorded_bits(adapted / "adapter"))
    merge_into(folder, base, adapted / "adapter", keys)
    made, again = (load_file(path / "model.safetensors") for path in (adapted / "model", folder))
    assert made.keys() == again.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-4, atol=1e-6)


def test_an_adapter_learns_what_is_better_on_pairs_that_it_has_not_seen(train, runner, tmp_path):
    data = {"datasets": write(tmp_path, polite(48)), "eval_datasets": write(tmp_path, polite(24, 50), "dev.jsonl")}
    row = runner.rows(train("reward_model", adapter="lora", learning_rate=0.01, max_steps=12, **data))[-1]
    assert row["eval_rewards/accuracies"] >= 0.95


def test_the_adapter_of_a_language_model_is_not_trained_on_as_a_reward_model(train, model_dir):
    stage = train("sft", adapter="lora", max_steps=1)
    (stage / "config.yaml").write_text(f"base_model: {model_dir('qwen3')}\nadapter: lora\n")
    started = stage / "model"
    with pytest.raises(ModelError, match="trained under a language model's head"):
        train("reward_model", adapter="lora", adapter_start="continue", base_model=str(started), max_steps=1)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"task_type": "CAUSAL_LM"}, "adapter with task_type CAUSAL_LM"),
        ({"modules_to_save": None}, "saves no module whole; expected SEQ_CLS with its head `score`"),
        ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base, which is not there"),
        ({"base_model_name_or_path": None}, "a base that it does not name"),
    ],
)
def test_an_adapter_that_is_no_reward_model_is_refused_before_anything_is_loaded(change, why, tmp_path):
    config = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "base_model_name_or_path": "some/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=why):
        RewardPool([f"model:{tmp_path}"], load=load_learned)
