"""Tiny models of real architectures, a tokenizer trained on the spot, and small data files; made once per session."""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from posttrain.c_compiler import find_compiler

torch.set_num_threads(1)
settings.register_profile("clockless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("clockless")  # what holds of a property does not depend on how busy the machine is

VOCAB = 288
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [f"What is {a} plus {b}? The answer is {a + b}." for a in range(10) for b in range(10)]
# 4-bit layers want inputs divisible by 64 and outputs by 32.
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    # Larger than usual, so that what a token attends to moves its logits far beyond rounding.
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.01}
ARCHITECTURES = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 6},
    "qwen2": {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {
        "sliding_window": 6,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 8.0,
    },
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 32},
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 128, "attention_chunk_size": 512},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "mamba": {"state_size": 8, "use_mambapy": False},
    "gpt_oss": {
        "sliding_window": 128,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["full_attention"] * 2,
    },
}
RAGGED = ("qwen3", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe")
"""Architectures that the packed forward is exact for; the others run their sequences one by one."""


def make_tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def make_model(folder: Path, architecture: str, **changes) -> Path:
    """A randomly initialised model with its tokenizer, as `save_pretrained` writes them."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(architecture, **{**SHAPE, **ARCHITECTURES.get(architecture, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["POSTTRAIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def compiler():
    if find_compiler() is None:
        pytest.skip("there is no C compiler: the kernels of rollout.native_kernels are not built")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """`model_dir("qwen3")` is the folder of that tiny model; made once, with these changes to its config."""
    made: dict[str, Path] = {}

    def make(architecture: str, **changes) -> Path:
        name = json.dumps([architecture, changes], sort_keys=True)
        if name not in made:
            made[name] = make_model(tmp_path_factory.mktemp("models") / architecture, architecture, **changes)
        return made[name]

    return make


@pytest.fixture(scope="session")
def make_model_in():
    return make_model


@pytest.fixture
def make_local_model(tmp_path_factory):
    """`make_local_model("llama", hidden_size=256)`: the folder of a model of that architecture with these changes."""
    return lambda architecture, **changes: make_model(tmp_path_factory.mktemp("own"), architecture, **changes)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def _chat(a: int, b: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {a} plus {b}?"}]


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _conversation(about: int) -> list[dict[str, str]]:
    """The first turns of one of two conversations, which begin alike: each segment is longer than what is worth sharing."""
    system = {"role": "system", "content": "You add numbers. " * 5}
    return [system, {"role": "user", "content": f"{about} apples, please. " * 5}, _answer("Of course.")]


ROWS = {
    "sft": lambda a, b: {"messages": [*_chat(a, b), _answer(f"The answer is {a + b}." + " Yes." * (a % 3))]},
    "pairs": lambda a, b: {
        "prompt": _chat(a, b),
        "chosen": [_answer(f"The answer is {a + b}.")],
        "rejected": [_answer(f"It is {a}" + "!" * (1 + b % 3))],
    },
    "turns": lambda a, b: {
        "prompt": [*_conversation(b % 2), *_chat(a, b)],
        "chosen": [_answer(f"The answer is {a + b}.")],
        "rejected": [_answer(f"It is {a}" + "!" * (1 + b % 3))],
    },
    "kto": lambda a, b: {
        "prompt": _chat(a, b),
        "completion": [_answer(f"The answer is {a + b}.")],
        "label": b % 2 == 0,
    },
    "steps": lambda a, b: {
        "prompt": _chat(a, b),
        "completions": [f"{a} plus {b} is {a + b + b % 3 // 2}.", "So that is it.", "Yes!" * (1 + b % 2)],
        "labels": [b % 3 < 2, b % 3 == 0, b % 2 == 0],
    },
    "prompts": lambda a, b: {"prompt": _chat(a, b), "answer": str(a + b)},
}
_CALLING: list[Path] = []
"""The model that calls a tool, once it was made."""
REWARDS = '''
def spread(prompts, completions, answer, **columns):
    """A number that differs between almost any two completions."""
    return [sum(map(ord, c[0]["content"])) % 17 / 17.0 for c in completions]


def constant(prompts, completions, **columns):
    return [1.0 for _ in completions]


def last_digit(prompts, completions, answer, **columns):
    """1 where length and answer agree modulo 2; some groups have no spread."""
    return [float(len(c[0]["content"]) % 2 == int(a) % 2) for c, a in zip(completions, answer)]
'''


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """`sft.jsonl`, `pairs.jsonl`, `turns.jsonl` (pairs), `kto.jsonl`, `steps.jsonl`, `prompts.jsonl` of 12 rows each, `dev-*.jsonl` of 4, and `rewards.py`."""
    folder = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        for prefix, numbers in (("", range(12)), ("dev-", range(12, 16))):
            lines = [json.dumps(row(n % 5, n)) + "\n" for n in numbers]
            (folder / f"{prefix}{name}.jsonl").write_text("".join(lines))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def _module(file):
    path = Path(__file__).parent / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def runner():
    """The module `stage_runner`."""
    return _module("stage_runner.py")


@pytest.fixture(scope="session")
def judging():
    """`with judging(rule) as (url, requests)`: a server that judges by a rule."""
    return _module("judge_server.py").judging


@pytest.fixture
def playing(runner, model_dir, tmp_path, tmp_path_factory):
    """`playing("openenv")`: a short grpo stage with that kind of environment (`played_stages.PlayedStage`), until the test ends."""
    module = _module("environments/played_stages.py")
    with contextlib.ExitStack() as stack:

        def play(kind, architecture="qwen3"):
            if kind == "mcp" and not _CALLING:
                _CALLING.append(module.make_calling_model(runner, tmp_path_factory.mktemp("calling")))
            model = model_dir(architecture)
            return stack.enter_context(module.played(kind, tmp_path / "played", model, *_CALLING))

        yield play


@pytest.fixture
def train(runner, model_dir, data_dir, tmp_path):
    """`train("dpo", beta=0.2)` runs that stage on the tiny Qwen3 and returns its folder."""

    def run(kind, *, architecture="qwen3", name="", stop_after=None, **options):
        folder = tmp_path / (name or f"{kind}-{len(list(tmp_path.iterdir()))}")
        keys = runner.keys_of(kind, model_dir(architecture), data_dir, **options)
        runner.run_stage(kind, folder, keys, stop_after)
        return folder

    return run
