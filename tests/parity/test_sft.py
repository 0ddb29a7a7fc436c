"""SFT through TRL's SFTTrainer and through our recipe: full and LoRA, padded and packed, accumulated, decayed."""

import json

import pytest
from trl import SFTConfig, SFTTrainer

from posttrain.config.stages import SFTKeys
from posttrain.data.load import load_sft
from posttrain.models.load import load_tokenizer
from posttrain.recipes.batches import Schedule, best_fit

SHARED = {"per_device_train_batch_size": 4, "learning_rate": 2e-3}


def trl_sft(theirs, data, **config):
    return theirs(SFTTrainer, SFTConfig, data, **{"max_length": 256, "lr_scheduler_type": "linear"} | SHARED | config)


@pytest.mark.parametrize("loss_type", ["nll", pytest.param("dft", marks=pytest.mark.slow)])
def test_full(ours, theirs, rows, assert_parity, loss_type):
    data = rows["sft"][:48]
    mine = ours("sft", SFTKeys, data, loss_type=loss_type, **SHARED)
    assert_parity(mine, trl_sft(theirs, data, loss_type=loss_type))


def test_label_smoothing(ours, theirs, rows, assert_parity):
    """transformers divides by each micro-batch's own tokens, so one micro-batch is one step here."""
    data = rows["sft"][:48]
    mine = ours("sft", SFTKeys, data, label_smoothing_factor=0.2, **SHARED)
    assert_parity(mine, trl_sft(theirs, data, label_smoothing_factor=0.2))


def test_lora(ours, theirs, rows, assert_parity):
    data = rows["sft"][:48]
    mine = ours("sft", SFTKeys, data, adapter="lora", lora_r=8, **SHARED)
    assert_parity(mine, trl_sft(theirs, data, lora_r=8))


def test_accumulation_schedule_and_decay(ours, theirs, rows, assert_parity):
    """Warmup, cosine, weight decay, clipping; micro-batches of unequal token counts; a short last window."""
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "adam_beta2": 0.98,
    }
    data = rows["sft"][:62]
    assert_parity(ours("sft", SFTKeys, data, **options), trl_sft(theirs, data, **options))


@pytest.mark.parametrize("lora_r", [0, pytest.param(8, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_packed(ours, theirs, rows, monkeypatch, assert_parity, lora_r):
    """Both pack best-fit decreasing; ties and the order of the packs differ, so ours takes theirs."""
    data = rows["sft"]
    options = {"per_device_train_batch_size": 1, "learning_rate": 2e-3, "packing": True}
    their_run = trl_sft(theirs, data, lora_r=lora_r, max_length=160, **options)
    packs = [[tuple(ids) for ids in _split(row["input_ids"], row["seq_lengths"])] for row in their_run.rows]
    place = {tuple(ids): index for index, ids in enumerate(_tokenized(theirs, data))}
    theirs_by_place = [[place[document] for document in pack] for pack in packs]
    lengths = {index: len(ids) for ids, index in place.items()}
    assert len(best_fit(range(len(data)), lambda index: lengths[index], 160)) == len(packs)
    monkeypatch.setattr(Schedule, "_plan", lambda self, epoch: theirs_by_place)
    adapter = {"adapter": "lora", "lora_r": lora_r} if lora_r else {}
    assert_parity(ours("sft", SFTKeys, data, sequence_len=160, **adapter, **options), their_run)


def _split(ids, lengths):
    for length in lengths:
        yield ids[:length]
        ids = ids[length:]


def _tokenized(theirs, data):
    return trl_sft(theirs, data, max_steps=1).rows["input_ids"]


def test_the_template_newline_is_not_trained(theirs, model_dir, tmp_path, monkeypatch):
    """On purpose: after the end-of-turn token nothing is generated, so the newline the template adds is no target.

    TRL trains it in conversations given as prompt and completion. Everything else is the same.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    question, answer = {"role": "user", "content": "is that on?"}, {"role": "assistant", "content": "it was"}
    trained = trl_sft(theirs, [{"prompt": [question], "completion": [answer]}], max_steps=1).rows[0]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [question, answer]}))
    keys = SFTKeys(base_model=str(model_dir()), datasets=[{"path": str(path)}])
    [mine] = load_sft(keys, load_tokenizer(keys)).rows
    newline = trained["input_ids"][-1]
    labels = [token if masked else -100 for token, masked in zip(mine.ids, mine.loss_mask, strict=True)]
    assert [*mine.ids] == trained["input_ids"]
    assert trained["labels"] == [*labels[:-1], newline] and labels[-1] == -100
