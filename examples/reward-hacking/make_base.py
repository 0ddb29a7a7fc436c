"""Make the example's base: a Qwen3 of 0.06 M parameters that adds, with the habits of `make_data.base_answer`.

`python make_base.py` (torch, transformers) rewrites `base/` with fixed seeds, the weights to numerical noise. Like any
base it has seen the held-out sums; the RL prompts hold none of them.
"""

import random
from pathlib import Path

import torch
from make_data import SEED, base_answer, question, sums
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
NUM_STEPS, ROWS, PEAK_LR, WARMUP_STEPS = 1600, 64, 3e-3, 30
PAD, END = "<|endoftext|>", "<|im_end|>"
PIECES = ("\\boxed{", " or maybe ")
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for each of the two phrases."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([PAD, END])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in PIECES])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE, model_max_length=128
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def draw_batch(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[int, int]], rng: random.Random
) -> dict[str, torch.Tensor]:
    """Rows padded on the right; only answers are learnt."""
    rows = []
    for a, b in rng.sample(pairs, ROWS):
        head = tokenizer.encode(question(a, b) + END)
        rows.append((head, tokenizer.encode(base_answer(a, b, rng) + END)))
    width = max(len(head) + len(tail) for head, tail in rows)
    ids = [head + tail + [tokenizer.pad_token_id] * (width - len(head) - len(tail)) for head, tail in rows]
    labels = [[-100] * len(head) + tail + [-100] * (width - len(head) - len(tail)) for head, tail in rows]
    mask = [[token != tokenizer.pad_token_id for token in row] for row in ids]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "attention_mask": torch.tensor(mask).long()}


def main() -> None:
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    pairs = [pair for split in sums().values() for pair in split]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP_STEPS, 1 - step / NUM_STEPS)
        loss = model(**draw_batch(tokenizer, pairs, rng), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == NUM_STEPS - 1:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    model.save_pretrained(HERE / "base")
    tokenizer.save_pretrained(HERE / "base")


if __name__ == "__main__":
    main()
