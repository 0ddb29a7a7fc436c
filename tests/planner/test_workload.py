"""A stage's tokens at once, and what of its keys the device decides."""

from dataclasses import replace

from posttrain.planner import ModelShape, Workload

TINY = ModelShape(num_layers=2, hidden=8, intermediate=16, vocab=10, num_heads=2, num_kv_heads=1, head_dim=4)


def test_a_micro_batch_of_rl_holds_its_completions_and_their_prompts_once():
    """128 tokens, 32 of them the completion: of a group of 8, four completions are 4·32 + 96, sixteen are 16·32 + 2·96."""
    rl = Workload(samples=True, sequence_len=128, max_completion_length=32, num_generations=8)
    tokens = [replace(rl, per_device_train_batch_size=size).tokens(TINY) for size in (1, 4, 16)]
    assert tokens == [128, 224, 704]


def test_bf16_auto_is_the_devices_choice():
    assert Workload.from_keys({"bf16": "auto"}, device_has_bf16=False, on_cpu=False).bf16 is False
    assert Workload.from_keys({"bf16": "auto"}, device_has_bf16=True, on_cpu=False).bf16 is True


def test_no_limit_on_completions_counts_none_where_nothing_is_sampled():
    shape = ModelShape(num_layers=2, hidden=8, intermediate=16, vocab=32, num_heads=2, num_kv_heads=2, head_dim=4)
    assert Workload(sequence_len=64, max_completion_length=None).completion(shape) == 0
    assert Workload(sequence_len=64, max_completion_length=16).completion(shape) == 16
