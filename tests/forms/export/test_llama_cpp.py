"""GGUFs run by llama.cpp: it cuts text as the source does, and says the source's greedy answers.

llama-cpp-python has no wheels in every registry, and is built by pip then: the tests are skipped where it is not.
"""
# pyright: reportMissingImports=false

import shutil
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.forms.export.export import GGUF_FILE, export_model, original
from posttrain.forms.export.gguf_vocabulary import SPLITS
from posttrain.forms.found import FoundModel

if find_spec("llama_cpp") is None:
    pytest.skip("needs llama-cpp-python: pip install 'posttrain[llama-cpp]'", allow_module_level=True)

TEXTS = ["What is 1 plus 2?", "hello  world\n\n x=1; 12345", "naïve größer 東京", "a"]
STEPS = 12
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def exported(source, folder, type_="f16"):
    from llama_cpp import Llama

    report = export_model(FoundModel(source), folder, "gguf", type_, None)
    assert report.exit_code == 0
    return Llama(str(folder / GGUF_FILE), n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)


def ids_of(llama, text):
    return llama.tokenize(text.encode(), add_bos=True, special=False)


@torch.no_grad()
def agreed(llama, source, prompts):
    """Along the source's greedy answers: the share of tokens that llama.cpp finds likeliest, and the largest gap of log-probs."""
    # Other implementations leave Gemma 2's soft cap of scores out.
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    same, gaps = [], []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(STEPS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        theirs = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        llama.reset()
        llama.eval(ids)
        ours = torch.from_numpy(llama.scores[: len(ids) - 1].copy()).log_softmax(-1)
        same += (ours.argmax(-1) == theirs.argmax(-1)).tolist()
        gaps.append(float((ours - theirs).abs().max()))
    return sum(same) / len(same), max(gaps)


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("qwen3", {}),
        ("llama", {}),
        pytest.param("llama", {"rope_parameters": LLAMA3}, id="llama3-scaling"),
        pytest.param(
            "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}, id="linear-scaling"
        ),
        pytest.param("mistral", {"sliding_window": None}, marks=pytest.mark.slow),
        pytest.param("gemma2", {}, marks=pytest.mark.slow),
        pytest.param("gemma3_text", {"num_hidden_layers": 6}, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_llama_cpp_says_the_sources_greedy_answers(family, changed, model_dir, tmp_path):
    source = model_dir(family, **changed)
    llama, tokenizer = exported(source, tmp_path / "out"), AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [ids_of(llama, text) for text in TEXTS] == prompts
    # Of 200 tokens, so that scaled rotary frequencies are far from those of short texts.
    prompts.append([3 + (7 * n) % 250 for n in range(200)])
    share, gap = agreed(llama, source, prompts)
    assert share >= 0.99 and gap < 0.1


def test_llama_cpp_says_most_greedy_answers_of_8_bits(model_dir, tmp_path):
    source = model_dir("qwen3")
    share, _ = agreed(exported(source, tmp_path / "out", "q8_0"), source, [[3 + (7 * n) % 250 for n in range(200)]])
    assert share >= 0.9


def test_llama_cpp_cuts_sentencepiece_as_the_source_does(bos_model, tmp_path):
    llama, made = exported(bos_model, tmp_path / "out"), original(bos_model)
    for text in ("hello world", "hell how  s", "é 7"):
        assert ids_of(llama, text) == made.text.text_ids(text)
    share, gap = agreed(llama, bos_model, [made.text.text_ids("hello w")])
    assert share >= 0.99 and gap < 0.1


@pytest.mark.parametrize(("pre", "model"), [("qwen2", {}), ("llama-bpe", {"ignore_merges": True})])
def test_llama_cpp_cuts_text_by_the_names_that_are_written(pre, model, byte_level, model_dir, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model_dir("llama"), source)
    (source / "chat_template.jinja").unlink()
    made = byte_level(SPLITS[pre], **model)
    made.save_pretrained(source)
    llama = exported(source, tmp_path / "out")
    for text in (*TEXTS, "I'LL don't  12345 größer\n\n x=1;  naïve 東京", "  a\t\tb\r\n", "A1b2…🙂"):
        assert ids_of(llama, text) == made(text)["input_ids"]
