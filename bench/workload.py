"""Models and data of the comparisons, made from seeds and kept under `bench/out/`.

Lengths are log-normal (sigma 0.75, so the mean is 1.3 times the median); words follow Zipf's law. Completions of the
GRPO rows end with about 1 % probability per token, by the weights themselves: see `set_end_hazard`.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

OUT = Path(__file__).resolve().parent / "out"
VOCAB = 4096
END = "<|im_end|>"
"""What ends an answer."""
SIGMA = 0.75
LONGEST = 1024
HAZARD = 0.01
GROUP = 8
MAX_COMPLETION = 256
EPOCH_ROWS = 64
SHAPES = {
    "nano": ("qwen3", 256, 768, 6, 8, 4, 4096),
    "llama": ("llama", 256, 768, 6, 8, 4, 4096),
    "small": ("qwen3", 512, 1536, 8, 8, 4, 32000),
    "wide": ("qwen3", 640, 1920, 10, 10, 5, 151_936),
    "0.6b": ("qwen3", 1024, 3072, 28, 16, 8, 151_936),
}
"""Name → architecture, hidden, intermediate, layers, heads, key-value heads, vocabulary."""


def words() -> tuple[list[str], list[float]]:
    """A language of 3,000 words and their Zipf weights."""
    rng = random.Random(0)
    syllables = [c + v for c in "bcdfghklmnprstvz" for v in ("a", "e", "i", "o", "u", "ai", "an", "er", "or", "is")]
    found = dict.fromkeys("".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3)))) for _ in range(9000))
    chosen = list(found)[:3000]
    return chosen, [1 / (rank + 2) for rank in range(len(chosen))]


def draw_text(rng: random.Random, language: tuple[list[str], list[float]], num_words: int) -> str:
    return "".join(" " + word for word in rng.choices(*language, k=num_words))


def log_normal(rng: random.Random, median: float, longest: int) -> int:
    return max(2, min(longest, round(rng.lognormvariate(math.log(median), SIGMA))))


def tokenizer_dir() -> Path:
    """A byte-level BPE tokenizer trained on the language."""
    folder = OUT / "tokenizer"
    if folder.exists():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng, language = random.Random(1), words()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([draw_text(rng, language, 400) for _ in range(400)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token="<|endoftext|>")
    made.save_pretrained(folder)
    return folder


def model_dir(name: str) -> Path:
    """A randomly initialised model with its tokenizer and the end hazard."""
    folder = OUT / f"model-{name}"
    if folder.exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    family, hidden, intermediate, layers, heads, kv_heads, vocab = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir())
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads, max_position_embeddings=32_768 if name == "0.6b" else 2048,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if torch.cuda.is_available():
        model.cuda()
    set_end_hazard(model, tokenizer.eos_token_id)
    model.cpu().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def set_end_hazard(model: Any, eos: int) -> None:
    """Make the end token about as likely as HAZARD everywhere.

    Channel 0 of the residual stream is held constant (no layer writes to it) and read by the end token's row only.
    """
    import torch

    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[:, 0] = 0.2
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        ids = torch.randint(0, VOCAB, (4, 128), generator=torch.Generator().manual_seed(0)).to(embedding.device)
        low, high = 0.0, 20.0
        for _ in range(30):
            middle = (low + high) / 2
            embedding[eos, 0] = middle
            hazard = float(model(input_ids=ids, use_cache=False).logits.softmax(-1)[..., eos].mean())
            low, high = (middle, high) if hazard < HAZARD else (low, middle)


def data_file(task: str, num_rows: int, longest: int = LONGEST) -> Path:
    """Rows of a task as JSON lines; their lengths grow with the longest."""
    name = f"{task}-{num_rows}" + ("" if longest == LONGEST else f"-{longest}")
    path = OUT / f"{name}.jsonl"
    if not path.exists():
        rng, language = random.Random(name.replace("-", "/")), words()
        rows = [_ROW_OF[task](rng, language, longest) for _ in range(num_rows)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _sft_row(rng: random.Random, language: Any, longest: int) -> dict[str, str]:
    prompt = log_normal(rng, 48 * longest / LONGEST, longest // 2)
    answer = log_normal(rng, 110 * longest / LONGEST, longest - 24 - prompt)
    return {"prompt": draw_text(rng, language, prompt) + ":", "completion": draw_text(rng, language, answer)}


def _dpo_row(rng: random.Random, language: Any, longest: int) -> dict[str, str]:
    prompt = log_normal(rng, 140 * longest / LONGEST, longest // 2)
    chosen, rejected = (
        draw_text(rng, language, log_normal(rng, 80 * longest / LONGEST, longest // 2 - 24)) for _ in range(2)
    )
    return {"prompt": draw_text(rng, language, prompt) + ":", "chosen": chosen, "rejected": rejected}


def _grpo_row(rng: random.Random, language: Any, longest: int) -> dict[str, str]:
    return {"prompt": draw_text(rng, language, rng.randint(60, 130)) + ":"}


_ROW_OF = {"sft": _sft_row, "dpo": _dpo_row, "grpo": _grpo_row}


def recorded_completions(num_prompts: int, eos: int) -> list[list[tuple[int, ...]]]:
    """GROUP completions per prompt, ending with HAZARD per token, at most MAX_COMPLETION long."""
    rng = random.Random("completions")

    def completion() -> tuple[int, ...]:
        ids: list[int] = []
        while len(ids) < MAX_COMPLETION:
            if ids and rng.random() < HAZARD:
                return (*ids, eos)
            ids.append(rng.randrange(300, VOCAB))
        return tuple(ids)

    return [[completion() for _ in range(GROUP)] for _ in range(num_prompts)]


def training_order(num_rows: int, seed: int) -> list[int]:
    """The order in which our recipes take the rows of the first epoch, so that TRL can be handed the same one."""
    from posttrain.data.dataset import Dataset, DataSummary

    return Dataset(list(range(num_rows)), DataSummary((), ""), "", (num_rows,), (None,)).order(seed, 0)
