"""Make the quickstart's base model: a 0.8 M parameter Qwen3, trained on plain text only, saved to `base/`.

The text is sums (`34+17=51`, always right) and worded sums (`... How many? Answer: 51`, with the same slips as the
demonstrations, see `make_data.SLIP_RATE`). It holds no chat turn, no `<think>` and no box, and no triple of dev or gate.
TIMING
"""

import random
from pathlib import Path

import torch
from make_data import Problem, ask, claim, split_problems
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SEED = 7
HERE = Path(__file__).resolve().parent
NUM_STEPS = 1000
ROWS_PER_STEP = 64
ROW_TOKENS = 96
PEAK_LR = 3e-3
WARMUP_STEPS = 30
WORDED_SHARE = 0.3

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


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
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


def sum_text(problem: Problem) -> str:
    return f"{problem.a}{problem.op}{problem.b}={problem.answer}"


def worded_text(problem: Problem, rng: random.Random) -> str:
    question, _ = ask(problem, rng)
    value = claim(problem, rng)
    work = f"{problem.a}{problem.op}{problem.b}=" if rng.random() < 0.5 else ""
    return f"{question} Answer: {work}{value}"


def token_stream(problems: list[Problem], num_tokens: int, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """`num_tokens` ids of texts, each followed by <|endoftext|>."""
    rng = random.Random(SEED)
    by_op = {op: [p for p in problems if p.op == op] for op in "+-"}
    ids: list[int] = []
    while len(ids) < num_tokens:
        problem = rng.choice(by_op[rng.choice("+-")])
        text = worded_text(problem, rng) if rng.random() < WORDED_SHARE else sum_text(problem)
        ids += [*tokenizer.encode(text), tokenizer.pad_token_id]
    return torch.tensor(ids[:num_tokens])


def learning_rate(step: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    return PEAK_LR * min((step + 1) / WARMUP_STEPS, 1 - step / NUM_STEPS)


def pretrain(model: Qwen3ForCausalLM, rows: torch.Tensor) -> None:
    """Next-token prediction on rows (S steps, B rows, T tokens), one pass."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step, batch_BT in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        loss = model(input_ids=batch_BT, labels=batch_BT, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == NUM_STEPS - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)


def main() -> None:
    torch.manual_seed(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    stream = token_stream(split_problems()["train"], NUM_STEPS * ROWS_PER_STEP * ROW_TOKENS, tokenizer)
    pretrain(model.train(), stream.view(NUM_STEPS, ROWS_PER_STEP, ROW_TOKENS))
    model.save_pretrained(HERE / "base")
    tokenizer.save_pretrained(HERE / "base")


if __name__ == "__main__":
    main()
