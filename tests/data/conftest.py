"""Tiny tokenizers with the templates of real model families, and files to read."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "You are a helpful assistant. Hello there, how are you today? I am fine, thank you.",
    "system user assistant tool model human Question: Answer: 12 + 34 = 46, 7 * 8 = 56",
    "Thinking about it step by step, the answer is 42. Good bye and see you tomorrow.\n\nYes\nNo\n",
] * 8

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED_WITHOUT_END = CHATML_MARKED.replace(
    "<|im_end|>\n{% endgeneration %}", "{% endgeneration %}<|im_end|>{{ '\\n' }}"
)
QWEN3 = r"""
{%- if tools %}{{- '<|im_start|>system\n# Tools' }}{%- for tool in tools %}{{- '\n' + (tool | tojson) }}{%- endfor %}
{{- '<|im_end|>\n' }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set content = m.content %}{%- set thinking = '' %}
{%- if '</think>' in content %}
{%- set thinking = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thinking) %}
{{- '<think>\n' + thinking.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
{%- else %}{{- content }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ 'Question: ' if m['role'] == 'user' else 'Answer: ' }}{{ m['content'] }}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Answer: {% endif %}"
)

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>",
]  # fmt: skip
DIGITS_AND_WORDS = r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(eos, template=None, pad="<|endoftext|>", bos=None, adds_bos=False):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS_AND_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens(SPECIAL)
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    level = processors.ByteLevel(trim_offsets=True)
    if adds_bos:
        level = processors.Sequence(
            [level, processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])]
        )
    core.post_processor = level
    kinds = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        pad_token=pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **kinds,
    )


def sentencepiece_like(template=None):
    """Spaces become ▁ and one is put before the text, as in Llama 2 and Gemma."""
    core = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>"], show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens(SPECIAL)
    core.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        unk_token="<unk>",
        chat_template=template,
    )


FAMILIES = {
    "chatml": lambda: byte_level("<|im_end|>", CHATML),
    "marked": lambda: byte_level("<|im_end|>", CHATML_MARKED),
    "marked_without_end": lambda: byte_level("<|im_end|>", CHATML_MARKED_WITHOUT_END),
    "qwen3": lambda: byte_level("<|im_end|>", QWEN3),
    "llama3": lambda: byte_level("<|eot_id|>", LLAMA3, pad="<|eot_id|>", bos="<|begin_of_text|>", adds_bos=True),
    "gemma": lambda: sentencepiece_like(GEMMA),
    "plain": lambda: byte_level("<|endoftext|>", PLAIN),
    "raw": lambda: byte_level("<|endoftext|>"),
}
_made = {}


def make_tokenizer(name):
    """A fresh copy, so that a test may change it."""
    if name not in _made:
        _made[name] = FAMILIES[name]()
    source = _made[name]
    copy = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(source.backend_tokenizer.to_str()),
        chat_template=source.chat_template,
        clean_up_tokenization_spaces=False,
        **source.special_tokens_map,
    )
    return copy


@pytest.fixture
def tokenizer_of():
    return make_tokenizer


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("POSTTRAIN_CACHE", str(folder))
    return folder


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
