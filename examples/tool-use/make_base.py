"""Make the example's base: a Qwen3 of 0.3 M parameters, trained on plain text only, saved to `base/`.

The text is lines of a notebook: a question, the numbers it is about with a sign between them, a number (a random one), and that
number again. It holds no chat turn, no call of a tool, no box, and no right product.
`python make_base.py` (torch, transformers) rewrites `base/` with fixed seeds, the weights to numerical noise.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from make_data import NAMES, OBJECTS, SEED, TOOLS, WORDINGS, Problem, ask
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
NUM_STEPS, ROWS, PEAK_LR, WARMUP_STEPS = 600, 64, 3e-3, 50
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (HERE / "chat.jinja").read_text(encoding="utf-8")
# In many layouts, or copying stays tied to one separator and does not survive the chat format.
LAYOUTS = (
    ("\n{a}{sign}{b}", " is {value}", ", so {value}"),
    ('\n"{a}{sign}{b}"', "\n{value}", "\n[{value}]"),
    (" ({a}{sign}{b})", "\nI get {value}", "\n{{{value}}}"),
    (": {a}{sign}{b}", " = {value}", "\nAnswer: {value}"),
    ('\n{{"{a}{sign}{b}"}}', "\n\n{value}\n", "\n- {value}"),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Phrases of the task are tokens, as is every number below a hundred; any other text is bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[PAD, START, END],
        show_progress=False,
    )
    (tool,) = TOOLS
    texts = [f"{n:02d}" for n in range(100)] * 50
    texts += [
        wording.format(n=name, a=11, b=11, o=thing)
        for group in WORDINGS.values() for wording in group for name in NAMES for thing in OBJECTS
    ]  # fmt: skip
    texts += [
        f"system\nTools: calc(expression) {tool['function']['description']}",
        "user\n",
        "assistant\n",
        "tool\n",
    ] * 20
    texts += ['\n{"name": "calc", "arguments": {"expression": "', '"}}\n', "\\boxed{"] * 20
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, chat_template=CHAT_TEMPLATE, model_max_length=256
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def notebook_line(rng: random.Random) -> list[tuple[str, bool]]:
    """Pieces of a line, and whether a piece can be told from what stands before it: only those are learnt."""
    problem = Problem(rng.randrange(10, 100), rng.randrange(10, 100))
    values = {**problem._asdict(), "sign": rng.choice("*+"), "value": rng.randrange(10, 10000)}
    worked, given, again = (text.format(**values) for text in rng.choice(LAYOUTS))
    return [(ask(problem, rng)[0], False), (worked, True), (given, False), (again, True)]


def draw_batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    rows = []
    for _ in range(ROWS):
        pieces = [(tokenizer.encode(text), learnt) for text, learnt in notebook_line(rng)]
        ids = [token for piece, _ in pieces for token in piece] + [tokenizer.pad_token_id]
        labels = [token if learnt else -100 for piece, learnt in pieces for token in piece] + [tokenizer.pad_token_id]
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


def main() -> None:
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).train()
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min((step + 1) / WARMUP_STEPS, 1 - step / NUM_STEPS)
        loss = model(**draw_batch(tokenizer, rng), use_cache=False).loss
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
