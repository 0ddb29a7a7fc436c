import json
import re

import pytest
import torch

from posttrain.distributed.ranks import join_ranks
from posttrain.errors import OutOfMemoryError
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.memory import is_out_of_memory, why_not_loaded
from posttrain.recipes.run.stage import Stage, run_recipe


class AsksForTooMuch:
    """A sink that asks for more memory than any machine has, at the second step."""

    def log(self, step, metrics):
        if step == 2:
            self.ask()

    def ask(self):
        torch.empty(1 << 50, dtype=torch.uint8)

    def event(self, kind, step, details):
        pass

    def close(self):
        pass


class AsksACard(AsksForTooMuch):
    """The same, in the type and the words of a GPU's allocator."""

    def ask(self):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 1048576.00 GiB. GPU 0 has a total capacity of 22.00 GiB of which 1.50 GiB is "
            "free. Including non-PyTorch memory, this process has 20.49 GiB memory in use."
        )


@pytest.mark.parametrize("sink", [AsksForTooMuch, AsksACard])
def test_out_of_memory_names_the_term_that_was_wrong_and_the_smallest_change(
    sink, runner, model_dir, data_dir, tmp_path
):
    """A pebibyte is beyond what was counted for activations, and beyond any change."""
    keys = runner.keys_of("sft", model_dir("qwen3"), data_dir)
    with (
        join_ranks() as ranks,
        pytest.raises(OutOfMemoryError) as caught,
    ):
        run_recipe(LOOPS["sft"], keys, lambda: Stage("sft", tmp_path, keys, ranks, watchers=lambda *_: [sink()]))
    text = str(caught.value)
    assert text.startswith("sft: out of memory: this machine has ")
    assert re.search(r"the plan counted [\d.]+ [GM]iB for activations, logits and caches, and 104857\d\.\d GiB", text)
    assert "no setting makes it fit" in text and "use a smaller base_model or a larger machine" in text
    assert is_out_of_memory(caught.value.__cause__)


def test_another_error_stays_what_it_is(runner, model_dir, data_dir, tmp_path):
    class Fails(AsksForTooMuch):
        def log(self, step, metrics):
            raise RuntimeError("of another kind")

    keys = runner.keys_of("sft", model_dir("qwen3"), data_dir)
    with join_ranks() as ranks, pytest.raises(RuntimeError, match="of another kind"):
        run_recipe(LOOPS["sft"], keys, lambda: Stage("sft", tmp_path, keys, ranks, watchers=lambda *_: [Fails()]))


def test_out_of_memory_with_a_model_that_cannot_be_counted_is_said_all_the_same(runner, make_local_model, data_dir):
    model = make_local_model("qwen3")
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config.replace('"model_type": "qwen3"', '"model_type": "rwkv"'))
    keys = runner.keys_of("sft", model, data_dir)
    assert re.match(r"sft: out of memory before the first step: .*model_type rwkv", why_not_loaded("sft", keys, 1))


def test_one_of_several_processes_is_told_what_it_holds_itself(make_local_model, runner, data_dir):
    folder = make_local_model("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 200_000, "layer_types": None}))
    keys = runner.keys_of("sft", folder, data_dir, adapter="lora", lora_r=1)
    alone, one_of_two = (
        float(re.search(r"LoRA needs ([\d.]+) GiB", why_not_loaded("sft", keys, processes))[1]) for processes in (1, 2)
    )
    assert 0.45 * alone < one_of_two < 0.75 * alone


@pytest.mark.parametrize(
    ("layers", "says"), [(2, "other programs hold the rest"), (200_000, "does not fit: LoRA needs")]
)
def test_a_model_that_was_never_loaded_is_named_with_what_would_fit(
    layers, says, make_local_model, runner, data_dir, tmp_path
):
    folder = make_local_model("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers, "layer_types": None}))
    keys = runner.keys_of("sft", folder, data_dir, adapter="lora", lora_r=1)

    def load(keys, stage):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with join_ranks() as ranks, pytest.raises(OutOfMemoryError, match=says) as caught:
        run_recipe(load, keys, lambda: Stage("sft", tmp_path, keys, ranks))
    assert str(caught.value).startswith("sft: out of memory before the first step: ")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
