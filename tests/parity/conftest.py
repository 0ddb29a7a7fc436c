"""Tiny models of real architectures, text data, and one way to run a stage with us and with TRL on the same rows.

Rows are trained in file order on both sides. TRL's losses are taken from `training_step`, unrounded and per step.
"""

import json
import os
import random
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

LANGUAGE = "the of and to in is that for it as was with be by on not he his but at are this have from or had an they"
WORDS = LANGUAGE.split()
END = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": None,
}
WINDOWED = {"sliding_window": 8}
FAMILIES = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "mistral": WINDOWED,
    "gemma2": WINDOWED | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0},
    "gemma3_text": WINDOWED | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
}


@dataclass
class Run:
    """What a training run did: the loss of every optimizer step, how the weights changed, and TRL's prepared rows."""

    losses: list[float]
    change: dict[str, torch.Tensor]
    rows: Any = None


def text(rng, low, high):
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


def _tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    rng = random.Random(0)
    core.train_from_iterator([text(rng, 20, 40) for _ in range(50)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token="<|endoftext|>", chat_template=CHATML, model_max_length=256
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """`family` → a folder with a randomly initialised float32 model and its tokenizer."""
    made = {}
    tokenizer = _tokenizer()

    def make(family="qwen3"):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
            config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SMALL, **ids, **FAMILIES[family])
            torch.manual_seed(1)
            AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def rows():
    """Prompt-completion, preference and labelled rows of ragged lengths; a prompt ends before a space."""
    rng = random.Random(1)
    prompts = [text(rng, 2, 20) + ":" for _ in range(64)]
    answers = [[" " + text(rng, 1, 24) for _ in range(2)] for _ in prompts]
    return {
        "sft": [{"prompt": p, "completion": a} for p, (a, _) in zip(prompts, answers, strict=True)],
        "dpo": [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, answers, strict=True)],
        "kto": [
            {"prompt": p, "completion": a, "label": i % 3 != 1}
            for i, (p, (a, _)) in enumerate(zip(prompts, answers, strict=True))
        ],
        "grpo": [{"prompt": p} for p in prompts],
    }


@pytest.fixture
def in_file_order(monkeypatch):
    """Our side trains rows in file order, or in the order given."""
    from posttrain.data.dataset import Dataset

    def use(order=None):
        monkeypatch.setattr(
            Dataset, "order", lambda self, seed, epoch, sequential=False: order or list(range(len(self)))
        )

    use()
    return use


@pytest.fixture
def ours(model_dir, tmp_path, in_file_order, monkeypatch):
    """Run one of our stages: (kind, keys type, rows, keys) → Run."""
    from posttrain.distributed.ranks import SingleProcess
    from posttrain.recipes.kinds import LOOPS
    from posttrain.recipes.run.stage import Stage

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def train(kind, keys_type, data, **keys):
        folder = tmp_path / f"ours-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        source = folder / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in data))
        base = model_dir()
        options = {"base_model": str(base), "datasets": [{"path": str(source)}], "device": "cpu", "bf16": False}
        made = keys_type(**options | {"lr_scheduler_type": "linear", "sequence_len": 256} | keys)
        result = LOOPS[kind](made, Stage(kind, folder / "run", made, SingleProcess()))
        records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        change = {name: end - start for name, (start, end) in _weights(result, base, made).items()}
        return Run([record["loss"] for record in records], change)

    return train


def _weights(result, base, keys):
    if keys.adapter == "none":
        start, end = load_file(base / "model.safetensors"), load_file(result.model_dir / "model.safetensors")
    else:
        end = load_file(result.folder / "adapter" / "adapter_model.safetensors")
        start = _adapter(lora_model(base, keys.lora_r, keys.seed, rewards=keys.is_reward_model))
    return {name: (start[name], end[name]) for name in end}


def lora_model(base, rank, seed, *, rewards=False):
    """The model with a fresh adapter on all linear layers, as PEFT makes it from `seed`; of a reward model the head too."""
    from peft import LoraConfig, get_peft_model

    family = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
    model = family.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    config = LoraConfig(
        task_type="SEQ_CLS" if rewards else "CAUSAL_LM",
        r=rank,
        lora_alpha=32,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    return get_peft_model(model, config)


def _adapter(model):
    from peft import get_peft_model_state_dict

    return {name: weight.detach().clone() for name, weight in get_peft_model_state_dict(model).items()}


def _state(model):
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return _adapter(model)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


TRL_OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "logging_strategy": "no",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "num_train_epochs": 1,
}


@pytest.fixture
def theirs(model_dir, tmp_path):
    """Run a TRL trainer: (trainer type, config type, rows, config) → Run."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers import AutoTokenizer
    from trl import RewardTrainer

    disable_progress_bar()

    def train(trainer_type, config_type, data, *, lora_r=0, extra=None, **config):
        class Recorded(trainer_type):
            micro_losses: list[float] = []  # noqa: RUF012 - one trainer per class

            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs)
                self.micro_losses.append(float(loss))
                return loss

        base = model_dir()
        rewards = trainer_type is RewardTrainer
        family = AutoModelForSequenceClassification if rewards else AutoModelForCausalLM
        model = family.from_pretrained(base, dtype=torch.float32)
        if lora_r:
            model = lora_model(base, lora_r, seed=42, rewards=rewards)
        order = {} if "shuffle_dataset" in config else {"train_sampling_strategy": "sequential"}
        args = config_type(output_dir=str(tmp_path / "trl"), **TRL_OPTIONS | order | config)
        tokenizer = AutoTokenizer.from_pretrained(base)
        trainer = Recorded(
            model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer, **(extra or {})
        )
        trainer.micro_losses = []
        start = _state(model)
        trainer.train()
        each = args.gradient_accumulation_steps
        losses = [sum(trainer.micro_losses[i : i + each]) for i in range(0, len(trainer.micro_losses), each)]
        end = _state(model)
        return Run(losses, {name: end[name] - start[name] for name in end}, trainer.train_dataset)

    return train


@pytest.fixture
def assert_parity():
    """Losses of every step within 1e-4 relative; the weights moved the same way, within 1e-2 of the change."""

    def check(ours, theirs, *, steps=10, moved=0.01):
        assert len(ours.losses) == len(theirs.losses) >= steps
        assert ours.losses == pytest.approx(theirs.losses, rel=1e-4, abs=1e-6)
        spread = max(theirs.losses) - min(theirs.losses)
        assert spread > moved, "the learning rate must move the loss, or the comparison proves nothing"
        names = ours.change.keys() & theirs.change.keys()
        assert len(names) == len(ours.change)
        error = sum(float((ours.change[n] - theirs.change[n]).square().sum()) for n in names) ** 0.5
        size = sum(float(theirs.change[n].square().sum()) for n in names) ** 0.5
        assert error / size <= 1e-2, f"weight changes differ by {error / size:.1e}"

    return check
