"""Make the quickstart's base model: a 0.8 M parameter Qwen3, trained on plain text only, saved to `base/`.

The text is sums (`34+17=51`, always right) and worded sums (`... How many? Answer: 51`, with the same slips as the
demonstrations, see `make_data.SLIP_RATE`). It holds no chat turn, no `<think>` and no box, and no triple of dev or gate.

It takes 10 to 15 minutes on one busy core. Reached on dev: 85 % of plain sums (80 % of those with a carry or a borrow).
On gate questions the base scores 0 % boxed, and 27 % by the last number when asked in plain text (`... Answer: `).

`--size large --to DIR` makes one of 4.8 M parameters from the same text, for a teacher that is larger than its student.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from make_data import Problem, ask, claim, split_problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
INIT_SEED = 7
ROWS_PER_STEP = 16
ROW_TOKENS = 96
WARMUP_STEPS = 30
FACT_SHARE = 0.1
SEEDS_PER_ROUND = 100


@dataclass(frozen=True)
class Size:
    """What `--size` sets: width and heads, how long and how fast it is trained against the small one's phases, and how often through them."""

    hidden: int
    num_heads: int
    num_kv_heads: int
    steps_share: float = 1.0
    lr_share: float = 1.0
    rounds: int = 1


SIZES = {
    "small": Size(128, 4, 2),
    # It knows 8 % of the sums on dev after one round, 97 % in the middle of the second, and 79 % after its worded half.
    "large": Size(320, 8, 4, steps_share=0.375, lr_share=0.5, rounds=2),
}


@dataclass(frozen=True)
class Phase:
    """One pass over fresh text, with its own optimizer; `styles` are the ways to put an answer behind a question."""

    seed: int
    num_steps: int
    peak_lr: float
    worded_share: float
    styles: tuple[str, ...]


# Sums before stories: copying the operands out of a question is learnt late, and faster once the sums are known.
# The second phase answers in many ways, or the copying stays tied to one separator and does not survive the chat format.
PHASES = (
    Phase(7, 1600, 2e-3, 0.2, (" Answer: {work}{value}", " Answer: {value}")),
    Phase(
        11,
        1200,
        2e-3,
        0.6,
        (
            " Answer: {work}{value}",
            " Answer: {value}",
            "\nA: {work}{value}. So {value}.",
            "\n{work}{value}, that is {value}",
            " ({work}{value}) {value}",
            " Well, {work}{value}! {value}",
            "\n- {work}{value}\n- {value}",
            "\nI say: {work}{value} [{value}]",
            " >> {work}{value} >> {value}",
        ),
    ),
)

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, so any text round-trips and every digit is one token; plus the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, START, END])
    # Not special, as in Qwen3: decoding with skip_special_tokens must keep the think block.
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, size: Size = SIZES["small"]) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=4,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    # The base ends a text with <|endoftext|>, the tuned model ends a turn with <|im_end|>: stop at either.
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def sum_text(problem: Problem) -> tuple[str, str]:
    return f"{problem.a}{problem.op}{problem.b}=", str(problem.answer)


def fact_text(rng: random.Random) -> tuple[str, str]:
    """A line of a school table: a one-digit sum, or the same read backwards."""
    a, b = rng.randrange(10), rng.randrange(10)
    return (f"{a}+{b}=", str(a + b)) if rng.random() < 0.5 else (f"{a + b}-{b}=", str(a))


def worded_text(problem: Problem, styles: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    question, _ = ask(problem, rng)
    value = claim(problem, rng)
    style = styles[int(rng.random() * len(styles))]
    return question, style.format(work=f"{problem.a}{problem.op}{problem.b}=", value=value)


def draw_text(by_op: dict[str, list[Problem]], phase: Phase, rng: random.Random) -> tuple[str, str]:
    """A text, cut where it becomes predictable: nothing before the cut says which operands come."""
    problem = rng.choice(by_op[rng.choice("+-")])
    kind = rng.random()
    if kind < phase.worded_share:
        return worded_text(problem, phase.styles, rng)
    return fact_text(rng) if kind < phase.worded_share + FACT_SHARE else sum_text(problem)


def make_batches(phase: Phase, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Texts back to back, each closed by <|endoftext|>: (steps, 2, rows, tokens), the 2 being ids and labels."""
    rng = random.Random(phase.seed)
    problems = split_problems()["train"]
    by_op = {op: [p for p in problems if p.op == op] for op in "+-"}
    num_tokens = phase.num_steps * ROWS_PER_STEP * ROW_TOKENS
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < num_tokens:
        head, tail = (tokenizer.encode(text) for text in draw_text(by_op, phase, rng))
        tail.append(tokenizer.pad_token_id)
        ids += head + tail
        # Random operands are noise to predict: scoring only what follows them learns the sums in far fewer steps.
        labels += [-100] * len(head) + tail
    stream = torch.tensor([ids[:num_tokens], labels[:num_tokens]])
    return stream.view(2, phase.num_steps, ROWS_PER_STEP, ROW_TOKENS).transpose(0, 1)


def learning_rate(step: int, phase: Phase) -> float:
    """Linear warm-up, then linear decay to zero."""
    return phase.peak_lr * min((step + 1) / WARMUP_STEPS, 1 - step / phase.num_steps)


def pretrain(model: Qwen3ForCausalLM, phase: Phase, tokenizer: PreTrainedTokenizerFast) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step, (ids_BT, labels_BT) in enumerate(make_batches(phase, tokenizer)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, phase)
        loss = model(input_ids=ids_BT, labels=labels_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == phase.num_steps - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)


def phases_of(size: Size) -> tuple[Phase, ...]:
    """Each round reads other text."""
    return tuple(
        replace(
            phase,
            seed=phase.seed + SEEDS_PER_ROUND * number,
            num_steps=round(phase.num_steps * size.steps_share),
            peak_lr=phase.peak_lr * size.lr_share,
        )
        for number in range(size.rounds)
        for phase in PHASES
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--to", type=Path, default=HERE / "base")
    parser.add_argument("--steps-share", type=float, default=1.0, help="of the steps that the size is trained for")
    asked = parser.parse_args()
    torch.manual_seed(INIT_SEED)
    tokenizer, size = build_tokenizer(), SIZES[asked.size]
    size = replace(size, steps_share=size.steps_share * asked.steps_share)
    model = build_model(tokenizer, size).train()
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    for phase in phases_of(size):
        pretrain(model, phase, tokenizer)
    model.save_pretrained(asked.to)
    tokenizer.save_pretrained(asked.to)


if __name__ == "__main__":
    main()
