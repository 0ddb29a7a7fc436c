"""A process reward model learns which steps are right, is what transformers loads, and learns as TRL's PRMTrainer does."""

import json
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.config.stages import ModelKeys
from posttrain.data.load import load_steps
from posttrain.errors import ModelError
from posttrain.models.batch import pack
from posttrain.models.load import load_policy, load_tokenizer
from posttrain.models.provenance import recorded_separator
from posttrain.models.reward_head import at_steps
from posttrain.types import TokenSeq

KIND = "process_reward_model"


def write(folder, rows, name="steps.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [{"path": str(path)}]


def solved(count, seed=0, chat=True):
    """Sums in one to three steps; a wrong one says no."""
    rng = random.Random(seed)
    for _ in range(count):
        a, b = rng.randrange(10), rng.randrange(10)
        labels = [rng.random() < 0.5 for _ in range(rng.randint(1, 3))]
        steps = [f"{a} plus {b} is {a + b}." if right else f"{a}, no {b}." for right in labels]
        asked = f"What is {a} plus {b}?"
        yield {
            "prompt": [{"role": "user", "content": asked}] if chat else asked,
            "completions": steps,
            "labels": labels,
        }


def test_it_learns_which_steps_are_right_of_answers_that_it_has_not_seen(train, runner, tmp_path):
    data = {"datasets": write(tmp_path, solved(48)), "eval_datasets": write(tmp_path, solved(24, 1), "dev.jsonl")}
    row = runner.rows(train(KIND, max_steps=30, **data))[-1]
    assert row["eval_accuracy"] >= 0.95 and row["eval_loss"] < 0.3


def test_labels_turned_round_are_met_one_less_as_often(train, runner, tmp_path):
    rows = list(solved(16))
    turned = [{**row, "labels": [not label for label in row["labels"]]} for row in rows]
    found = [
        runner.rows(train(KIND, max_steps=1, datasets=write(tmp_path, rows), eval_datasets=write(tmp_path, dev, name)))[
            -1
        ]
        for dev, name in ((rows, "as.jsonl"), (turned, "turned.jsonl"))
    ]
    assert found[0]["eval_accuracy"] == pytest.approx(1 - found[1]["eval_accuracy"])


def as_trl(tokenizer, row, separator="\n"):
    """PRMTrainer.tokenize_row, as TRL 0.x had it: steps and separators by themselves, −100 but at each separator's last token."""
    ids, labels = list(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]), []
    labels = [-100] * len(ids)
    behind = tokenizer.encode(separator, add_special_tokens=False)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        more = tokenizer(step, add_special_tokens=False)["input_ids"] + behind
        ids, labels = ids + more, labels + [-100] * (len(more) - 1) + [int(label)]
    return ids, labels


def test_losses_and_weights_are_those_of_trls_rows_in_transformers_own_model(runner, model_dir, tmp_path, monkeypatch):
    """The same head, rows in file order, padded there and packed here, plain SGD."""
    from posttrain.data.dataset import Dataset

    monkeypatch.setattr(Dataset, "order", lambda self, seed, epoch, sequential=False: list(range(len(self))))
    base, rows = tmp_path / "headed", list(solved(16, chat=False))
    torch.manual_seed(3)
    model = AutoModelForTokenClassification.from_pretrained(model_dir("qwen3"), num_labels=2, dtype=torch.float32)
    model.dropout.p = 0.0  # which transformers has before the head, and TRL leaves in
    model.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(model_dir("qwen3"))
    tokenizer.save_pretrained(base)
    keys = ProcessRewardModelKeys(
        base_model=str(base), datasets=write(tmp_path, rows), sequence_len=256, optim="sgd", learning_rate=0.05,
        lr_scheduler_type="constant", warmup_ratio=0, max_grad_norm=1e9, per_device_train_batch_size=4, max_steps=4,
    )  # fmt: skip
    runner.run_stage(KIND, tmp_path / "ours", keys)

    losses, optimizer = [], torch.optim.SGD(model.train().parameters(), lr=0.05)
    for at in range(0, 16, 4):
        made = [as_trl(tokenizer, row) for row in rows[at : at + 4]]
        most = max(len(ids) for ids, _ in made)
        batch = {
            "input_ids": torch.tensor([ids + [0] * (most - len(ids)) for ids, _ in made]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (most - len(ids)) for ids, _ in made]),
            "labels": torch.tensor([labels + [-100] * (most - len(ids)) for ids, labels in made]),
        }
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert runner.losses(tmp_path / "ours") == pytest.approx(losses, rel=1e-4)
    assert abs(losses[0] - losses[-1]) > 0.01
    trained, start = runner.weights(tmp_path / "ours"), AutoModelForTokenClassification.from_pretrained(base)
    for name, tensor in start.state_dict().items():
        moved = model.state_dict()[name] - tensor
        assert float((trained[name] - model.state_dict()[name]).norm()) <= 1e-2 * float(moved.norm()) + 1e-6, name


def test_a_chats_steps_go_on_where_the_template_lets_the_model_speak(model_dir, tmp_path):
    rows = write(tmp_path, [{**next(solved(1)), "completions": ["One.", "Two. "], "labels": [True, 0.25]}])
    keys = ProcessRewardModelKeys(base_model=str(model_dir("qwen3")), datasets=rows, step_separator="\n\n")
    tokenizer = load_tokenizer(keys)
    (row,) = load_steps(keys, tokenizer)
    text = tokenizer.decode(row.seq.ids)
    assert text.startswith("<|im_start|>user\nWhat is ") and text.endswith("<|im_start|>assistant\nOne.\n\nTwo. \n\n")
    assert row.labels == (1.0, 0.25)
    marked = [place for place, trained in enumerate(row.seq.loss_mask) if trained]
    ends = [tokenizer.decode(row.seq.ids[: place + 1]) for place in marked]
    assert [end.rpartition("assistant\n")[2] for end in ends] == ["One.\n\n", "One.\n\nTwo. \n\n"]


def test_what_a_later_step_says_changes_nothing_of_an_earlier_one(model_dir, tmp_path):
    one = {"prompt": "1 plus 2", "completions": ["is 3.", "So"], "labels": [1, 1]}
    keys = ProcessRewardModelKeys(base_model=str(model_dir("qwen3")), datasets=write(tmp_path, [one, {**one, "completions": ["is 3.", " then, no."]}]))  # fmt: skip
    first, second = load_steps(keys, load_tokenizer(keys))
    upto = first.seq.loss_mask.index(True) + 1
    assert first.seq.ids[:upto] == second.seq.ids[:upto]


def test_steps_behind_the_limit_are_cut_off_and_counted(model_dir, tmp_path):
    row = {"prompt": "What is 1 plus 2?", "completions": ["The answer is 3.", "Yes\nYes."], "labels": [True, False]}
    keys = ProcessRewardModelKeys(base_model=str(model_dir("qwen3")), datasets=write(tmp_path, [row]))
    tokenizer = load_tokenizer(keys)
    whole = load_steps(keys, tokenizer)
    first = whole.rows[0].seq.loss_mask.index(True) + 1 - len(tokenizer("What is 1 plus 2?")["input_ids"])
    cut = load_steps(keys.model_copy(update={"max_completion_length": first + 1}), tokenizer)
    assert cut.rows[0].labels == (1.0,) and len(cut.rows[0].seq.ids) < len(whole.rows[0].seq.ids)
    assert cut.summary.sources[0].notes["steps cut off by max_completion_length"] == 1
    assert list(whole.summary.sources[0].notes) == [
        "steps with the step_separator inside, which are several where answers are scored"
    ]


def test_marks_move_to_where_what_is_read_stands():
    moved = at_steps(TokenSeq((5, 6, 7, 1, 9, 1, 4), (False, False, False, True, False, True, False)), 0)
    assert moved.ids == (5, 6, 7, 1, 9, 1, 0) and moved.loss_mask == (False, False, False, False, True, False, True)


def test_the_last_step_alone_is_trained_where_that_is_asked_for(train, runner, tmp_path):
    rows = list(solved(4, chat=False))
    last = [{"prompt": "\n".join([r["prompt"], *r["completions"][:-1]]), "completions": r["completions"][-1:], "labels": r["labels"][-1:]} for r in rows]  # fmt: skip
    first = [{**row, "labels": [*(not label for label in row["labels"][:-1]), row["labels"][-1]]} for row in rows]
    found = [
        runner.losses(
            train(KIND, max_steps=2, datasets=write(tmp_path, data, f"{n}.jsonl"), train_on_last_step_only=True)
        )
        for n, data in enumerate((rows, first))
    ]
    assert found[0] == found[1], "labels of other steps play no part"
    assert last and found[0] != runner.losses(train(KIND, max_steps=2, datasets=write(tmp_path, rows)))


@pytest.mark.parametrize("architecture", ["qwen3", pytest.param("gpt_oss", marks=pytest.mark.slow), pytest.param("gemma2", marks=pytest.mark.slow)])  # fmt: skip
def test_what_is_exported_gives_in_transformers_the_labels_of_training(architecture, train, tmp_path):
    data = write(tmp_path, solved(6))
    folder = train(KIND, architecture=architecture, max_steps=2, datasets=data, step_separator="\n\n")
    keys = ProcessRewardModelKeys(base_model=str(folder / "model"), datasets=data, step_separator="\n\n")
    policy = load_policy(keys, trainable=False)
    rows = load_steps(keys, policy.tokenizer)
    with torch.no_grad():
        packed = policy.label_logits(pack([[at_steps(row.seq, 0)] for row in rows]))
    model = AutoModelForTokenClassification.from_pretrained(folder / "model", attn_implementation="eager").eval()
    assert model.config.num_labels == 2 and "ForTokenClassification" in model.config.architectures[0]
    with torch.no_grad():
        alone = torch.cat(
            [model(torch.tensor([row.seq.ids])).logits[0][torch.tensor(row.seq.loss_mask)] for row in rows]
        )
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert float(alone.std()) > 1e-3 and recorded_separator(folder / "model") == "\n\n"


def test_an_adapter_and_its_head_are_what_peft_loads(train, model_dir, tmp_path):
    folder = train(KIND, adapter="lora", lora_r=4, learning_rate=0.01, datasets=write(tmp_path, solved(24)))
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "TOKEN_CLS" and "score" in config["modules_to_save"]
    assert recorded_separator(folder / "adapter") == "\n"
    merged = AutoModelForTokenClassification.from_pretrained(folder / "model").eval()
    base = AutoModelForTokenClassification.from_pretrained(model_dir("qwen3"), num_labels=2)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_it_does_not_pass_for_another_model(train, tmp_path):
    model = train(KIND, max_steps=1) / "model"
    with pytest.raises(ModelError, match="is a reward model: it has no head that gives tokens"):
        load_policy(ModelKeys(base_model=str(model)))
    with pytest.raises(ModelError, match="did not load"):
        train("reward_model", base_model=str(model), max_steps=1)
    assert not isinstance(AutoModelForTokenClassification.from_pretrained(model), AutoModelForSequenceClassification)


@pytest.mark.parametrize(
    ("options", "why"), [({"eval_suite": "x.jsonl"}, "answers nothing"), ({"step_separator": ""}, "at least 1")]
)
def test_what_it_cannot_do_is_refused(options, why, runner, model_dir, data_dir):
    with pytest.raises(ValueError, match=why):
        runner.keys_of(KIND, model_dir("qwen3"), data_dir, **options)
