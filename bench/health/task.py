"""The task of the runs: sums of two small numbers, a model of 0.09 M parameters that answers them, and files of rows.

The model was trained to be wrong six times out of ten and chatty now and then, so that RL has a habit to remove, DPO a
form to prefer and a reward something to be hacked with.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

OUT = Path(__file__).resolve().parents[1] / "out" / "health"
TASK = OUT / "task"
PAD, END, BOX = "<|endoftext|>", "<|im_end|>", "\\boxed{"
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{% if add_generation_prompt %}{% endif %}"
LARGEST = 19
SLIP_RATE, CHATTER_RATE = 0.6, 0.3
CHATTER = ("{answer}!", "{answer} ok", "ok {answer}", "{answer}!!!")
NUM_DEV = 100
WORDS_SEED = 5


def sums() -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The pairs to train on, and those held out."""
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    random.Random(WORDS_SEED).shuffle(pairs)
    return pairs[NUM_DEV:], pairs[:NUM_DEV]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def ask(a: int, b: int) -> dict[str, str]:
    return user(f"{a}+{b}=")


def boxed(value: int) -> str:
    return f"{BOX}{value}}}"


def careless(a: int, b: int, rng: random.Random) -> str:
    """What the base was shown: one too many six times out of ten, with chatter three times out of ten."""
    answer = boxed(a + b + (rng.random() < SLIP_RATE))
    return rng.choice(CHATTER).format(answer=answer) if rng.random() < CHATTER_RATE else answer


def chatty(a: int, b: int, rng: random.Random) -> str:
    return rng.choice(CHATTER).format(answer=boxed(a + b))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_data() -> None:
    """What healthy runs train on. The faults that are faults of the data are written by `write_faulty_data`."""
    rng = random.Random(WORDS_SEED)
    train, dev = sums()
    shown = [*train, *dev]
    write_rows(
        TASK / "habits.jsonl", [{"messages": [ask(a, b), assistant(careless(a, b, rng))]} for a, b in shown * 12]
    )
    for name, pairs in (("train", train), ("dev", dev)):
        write_rows(TASK / f"sft-{name}.jsonl", [{"messages": [ask(a, b), assistant(boxed(a + b))]} for a, b in pairs])
        write_rows(TASK / f"pairs-{name}.jsonl", [pair(a, b, rng) for a, b in pairs])
        write_rows(TASK / f"prompts-{name}.jsonl", [{"prompt": [ask(a, b)], "answer": str(a + b)} for a, b in pairs])
    items = [
        {"id": f"dev-{n}", "split": "dev", "messages": [ask(a, b)], "target": str(a + b), "scorer": "boxed"}
        for n, (a, b) in enumerate(dev)
    ]
    write_rows(TASK / "suite.jsonl", items)


def pair(a: int, b: int, rng: random.Random) -> dict:
    return {"prompt": [ask(a, b)], "chosen": [assistant(boxed(a + b))], "rejected": [assistant(chatty(a, b, rng))]}


def write_faulty_data() -> None:
    rng = random.Random(WORDS_SEED + 1)
    train, _ = sums()
    others = rng.sample(train, len(train))
    shuffled = zip(train, others, strict=True)
    write_rows(
        TASK / "sft-shuffled.jsonl",
        [{"messages": [ask(a, b), assistant(boxed(c + d))]} for (a, b), (c, d) in shuffled],
    )
    write_rows(
        TASK / "sft-few.jsonl", [{"messages": [ask(a, b), assistant(careless(a, b, rng))]} for a, b in train[:16]]
    )
    rows = [pair(a, b, rng) for a, b in train]
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_rows(TASK / "pairs-shuffled.jsonl", rows)
    write_rows(TASK / "prompts-hopeless.jsonl", [{"prompt": [ask(a, b)], "answer": str(a + b + 7)} for a, b in train])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the opening of the box."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, END])
    core.add_tokens([AddedToken(BOX, special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END, chat_template=TEMPLATE)


def make_blank(folder: Path) -> None:
    """A model that knows nothing."""
    torch.manual_seed(WORDS_SEED)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare() -> Path:
    """The starting model of every run; made once, by the SFT recipe."""
    os.environ.setdefault("POSTTRAIN_CACHE", str(OUT / "cache"))
    base = TASK / "base"
    if (base / "result.json").exists():
        return base / "model"
    from run import train

    TASK.mkdir(parents=True, exist_ok=True)
    write_data()
    write_faulty_data()
    make_blank(TASK / "blank")
    train("sft", base, {
        "base_model": str(TASK / "blank"), "datasets": [{"path": str(TASK / "habits.jsonl")}], "max_steps": 900,
        "learning_rate": 3e-3, "per_device_train_batch_size": 64, "sequence_len": 64, "logging_steps": 50,
        "health": {},
    })  # fmt: skip
    return base / "model"
