import re

import pytest
import torch

from posttrain.distributed.ranks import join_ranks
from posttrain.errors import OutOfMemoryError
from posttrain.recipes.kinds import LOOPS
from posttrain.recipes.memory import is_out_of_memory
from posttrain.recipes.stage import Stage, run_recipe


class AsksForTooMuch:
    """A sink that asks for more memory than any machine has, at the second step."""

    def log(self, step, metrics):
        if step == 2:
            torch.empty(1 << 50, dtype=torch.uint8)

    def event(self, kind, step, details):
        pass

    def close(self):
        pass


def test_out_of_memory_names_the_term_that_was_wrong_and_the_smallest_change(runner, model_dir, data_dir, tmp_path):
    """A pebibyte is beyond what was counted for activations, and beyond any change."""
    keys = runner.keys_of("sft", model_dir("qwen3"), data_dir)
    with (
        join_ranks() as ranks,
        pytest.raises(OutOfMemoryError) as caught,
    ):
        run_recipe(
            LOOPS["sft"], keys, lambda: Stage("sft", tmp_path, keys, ranks, watchers=lambda *_: [AsksForTooMuch()])
        )
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
