import json
import shutil

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from posttrain.errors import MissingExtraError
from posttrain.forms.export.fitted import export_python

WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def sentencepiece_tokenizer():
    """As Gemma's: BPE over characters with bytes to fall back on, and BOS before every text."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    pieces = [
        *special,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"aehilotwW7s",
        "he",
        "ll",
        "hell",
        "hello",
        "▁w",
        "▁wo",
        "el",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    core = Tokenizer(BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "w"), ("▁w", "o"), ("e", "l")],
                         unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # fmt: skip
    core.normalizer = normalizers.Replace(" ", "▁")
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=WITH_BOS,
    )


@pytest.fixture(scope="session")
def bos_model(model_dir, tmp_path_factory):
    """A tiny Llama with a SentencePiece vocabulary, BOS before texts and in its template."""
    folder = tmp_path_factory.mktemp("bos") / "llama"
    shutil.copytree(model_dir("llama"), folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    sentencepiece_tokenizer().save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((folder / name).read_text()) | {"bos_token_id": 2, "eos_token_id": 1}
        (folder / name).write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="session")
def byte_level(tokenizer):
    """`byte_level(pattern, **model)`: the session's tokenizer with text cut by another pattern, and keys of its BPE changed."""

    def make(pattern, **model):
        said = json.loads(tokenizer.backend_tokenizer.to_str())
        core = Tokenizer.from_str(json.dumps({**said, "model": {**said["model"], **model}}))
        own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), own])
        core.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")

    return make


def _rows(count):
    for n in range(count):
        a, b = n % 10, (7 * n) % 10
        yield [
            {"role": "user", "content": f"What is {a} plus {b}?"},
            {"role": "assistant", "content": f"The answer is {a + b}."},
        ]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A data file that weights are fitted to."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in _rows(24)))
    return path


@pytest.fixture(scope="session")
def quantiser():
    """Where the environment is not there, tests of what it writes are skipped."""
    try:
        return export_python()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def learned(make_model_in, tmp_path_factory):
    """A tiny Llama that has learned its answers, so that its best tokens are far from the next ones."""
    folder = make_model_in(tmp_path_factory.mktemp("learned") / "llama", "llama", initializer_range=0.05)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(
        [tokenizer.apply_chat_template(row, tokenize=False) for row in _rows(40)], padding=True, return_tensors="pt"
    )
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    model.save_pretrained(folder)
    return folder
