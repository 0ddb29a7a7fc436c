"""Ranks write, together, the folders that one process writes, and none of them holds the model whole."""

from pathlib import Path

import pytest

from posttrain.files import file_digests

SCRIPT = """
import json, os, sys, zlib
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
import torch
from posttrain.config.stages import SFTKeys
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.sharding import sharding_over
from posttrain.models.export import save_policy
from posttrain.models.load import load_policy
from posttrain.models.proof import probe_logits
from posttrain.models.total import write_total

def resident():
    # Without pages of files, which the system takes back as it likes.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

@contextmanager
def watched():
    seen, done = [resident()], Event()
    def watch():
        while not done.wait(0.002):
            seen.append(resident())
    thread = Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()

torch.set_num_threads(1)
found = {}
with join_ranks() as ranks:
    sharding = sharding_over(ranks)
    for name, (base, folder, options) in json.loads(sys.argv[1]).items():
        keys = SFTKeys(base_model=base, datasets=[{"path": "x"}], device="cpu", **options)
        policy = load_policy(keys, sharding=sharding)
        for key, parameter in policy.trainable():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
            sharding.fill(parameter, sharding.whole(parameter) + 0.02 * noise)
        trained = probe_logits(policy.model)
        stage = Path(folder) / str(ranks.world_size)
        with watched() as memory:
            save_policy(policy, stage / "model", keys, ranks=ranks, trained=trained)
        peak = max(memory) - memory[0]
        total = write_total(policy, stage, keys, trained, None, ranks) if policy.has_adapter else None
        held = sum(sharding.local(p).nbytes for p in policy.model.parameters())
        found[name] = {"peak": ranks.gather(peak), "held": held, "refused": total.refused if total else ""}
    if ranks.is_main:
        Path(os.environ["FOUND"]).write_text(json.dumps(found))
"""


@pytest.fixture
def exported(found_by):
    """By so many ranks; what is let go goes back at once."""
    return lambda models, ranks: found_by(ranks, SCRIPT, models, MALLOC_MMAP_THRESHOLD_="65536")


def _digests(folder, ranks):
    return {str(path.relative_to(folder / str(ranks))): file_digests(path) for path in (folder / str(ranks)).iterdir()}


def _same_folders(models, ranks, exported):
    """The peaks of the ranks, of each model, after its folders were compared."""
    one, several = exported(models, 1), exported(models, ranks)
    for name, (_, folder, _) in models.items():
        expected = _digests(Path(folder), 1)
        assert "model.safetensors" in expected["model"] or "model.safetensors.index.json" in expected["model"]
        assert _digests(Path(folder), ranks) == expected, name
        assert several[name]["refused"] == one[name]["refused"], name
    return several


LORA = {"adapter": "lora", "lora_r": 4}


def test_two_ranks_write_the_bytes_of_one_process(model_dir, exported, tmp_path):
    """A head that is tied to the embedding is written once, as there."""
    tied, untied = str(model_dir("qwen3", tie_word_embeddings=True)), str(model_dir("llama"))
    models = {
        "tied": (tied, str(tmp_path / "tied"), {}),
        "cast": (untied, str(tmp_path / "cast"), {"save_dtype": "bfloat16"}),
        "adapter": (tied, str(tmp_path / "adapter"), LORA),
    }
    _same_folders(models, 2, exported)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_write_the_bytes_of_one_process_for_every_kind_of_model_and_adapter(ranks, model_dir, exported, tmp_path):
    names = ("gemma3_text", "qwen3_moe", "mixtral", "gpt2", "mamba", "gpt_oss", "llama4_text")
    qwen, experts = str(model_dir("qwen3")), str(model_dir("qwen3_moe"))
    models = {name: (str(model_dir(name)), str(tmp_path / name), {}) for name in names}
    own = {
        "adapter in bf16": (qwen, {**LORA, "save_dtype": "bfloat16"}),
        "adapter of experts": (experts, {**LORA, "lora_target": ["q_proj", "gate_up_proj", "down_proj"]}),
        "adapter of gpt2": (str(model_dir("gpt2")), {**LORA, "lora_target": "all-linear"}),
        "dora": (qwen, {**LORA, "use_dora": True}),
        "added tokens": (qwen, {"added_tokens": ["<a>", "<b>"]}),
        "whole modules": (qwen, {**LORA, "lora_modules_to_save": ["embed_tokens"]}),
        "4 bits": (qwen, {"adapter": "qlora", "lora_r": 4}),
        "4 bits onto the original": (qwen, {"adapter": "qlora", "lora_r": 4, "merge_onto": "original"}),
    }
    models |= {name: (base, str(tmp_path / name), options) for name, (base, options) in own.items()}
    _same_folders(models, ranks, exported)


@pytest.mark.slow
def test_no_rank_holds_the_model_whole_while_it_is_exported(make_local_model, exported, tmp_path):
    """Beside the policy: of a merge, and of what is read back, each rank's share; and some tensors at a time."""
    deep = str(make_local_model("llama", num_hidden_layers=10, hidden_size=512, intermediate_size=1536))
    models = {
        "full": (deep, str(tmp_path / "full"), {}),
        "adapter": (deep, str(tmp_path / "adapter"), LORA),
    }
    found = exported(models, 4)
    whole = 4 * found["full"]["held"]
    assert whole > 100e6
    for name, shares in (("full", 1), ("adapter", 2)):
        assert max(found[name]["peak"]) < (shares / 4 + 0.3) * whole, (name, found[name], whole)
