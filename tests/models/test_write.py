"""A model's files, written a tensor at a time, are those that transformers writes."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.distributed.whole import Whole
from posttrain.models.write import write_weights


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith("model")}


@pytest.mark.parametrize(
    "architecture", ["qwen3", "gemma3_text", "gpt2", "mamba", "qwen3_moe", "mixtral", "gpt_oss", "llama4_text"]
)
def test_the_files_are_those_of_transformers_to_the_byte(architecture, model_dir, tmp_path):
    """Names, order, tied weights, experts one by one, and how a large model is cut."""
    model = AutoModelForCausalLM.from_pretrained(model_dir(architecture))
    sizes = ("50GB",) if hasattr(model.config, "num_local_experts") or "moe" in architecture else ("50GB", "100KB")
    for dtype in (torch.float32, torch.bfloat16):
        for size in sizes:
            theirs, ours = tmp_path / f"{dtype}{size}", tmp_path / f"ours{dtype}{size}"
            ours.mkdir()
            assert write_weights(model.float(), ours, dtype, Whole(), is_main=True, max_shard_size=size) is None
            model.to(dtype).save_pretrained(theirs, max_shard_size=size)
            assert files(ours) == files(theirs)
            assert len(files(ours)) > 1 or size == "50GB"


def test_other_dtypes_stand_where_safetensors_puts_them_and_what_is_not_saved_is_left_out(model_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_dir("llama"))
    for name, dtype in (
        ("a", torch.int64),
        ("b", torch.bool),
        ("c", torch.uint8),
        ("d", torch.float64),
        ("e", torch.int32),
    ):
        model.register_buffer(name, torch.ones(3, dtype=dtype))
    model.register_buffer("scalar", torch.tensor(2, dtype=torch.int16))
    model.register_buffer("mask", torch.ones(3))
    model._keys_to_ignore_on_save = {"mask"}
    (tmp_path / "ours").mkdir()
    assert write_weights(model, tmp_path / "ours", torch.bfloat16, Whole(), is_main=True) is None
    model.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


def test_what_cannot_be_written_is_returned_after_all_was_gathered(model_dir, tmp_path):
    """So that the other ranks wait for nobody."""

    class Counting(Whole):
        gathered = 0

        def whole(self, tensor):
            self.gathered += 1
            return super().whole(tensor)

    model, sharding = AutoModelForCausalLM.from_pretrained(model_dir("llama")), Counting()
    failed = write_weights(model, tmp_path / "missing", torch.float32, sharding, is_main=True)
    assert isinstance(failed, FileNotFoundError)
    assert sharding.gathered == len(model.state_dict())
