"""The step-time model: its laws, the worked numbers it must give, and published measurements."""

import pytest

from posttrain.planner import DEVICES, ModelShape, Traffic, best_split, step_time
from posttrain.planner.machine import probe_cpu
from posttrain.planner.steptime import (
    Device,
    decode_step_s,
    max_batch,
    rollout_s,
    train_flops_per_token,
    train_s,
    weight_bound_tokens,
    weight_bytes,
)


def _qwen3(hidden, layers, intermediate, heads, kv_heads, tied=False):
    return ModelShape.from_config({
        "hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": 151936, "intermediate_size": intermediate,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 128, "tie_word_embeddings": tied,
    })  # fmt: skip


B06, B4, B8 = (
    _qwen3(1024, 28, 3072, 16, 8, tied=True),
    _qwen3(2560, 36, 9728, 32, 8, tied=True),
    _qwen3(4096, 36, 12288, 32, 8),
)
CARD = DEVICES["h200"]
EIGHT_BY_2048 = Traffic(num_prompts=1, num_generations=8, prompt_tokens=256, answer_tokens=2048, longest_answer=2048)


def test_a_step_is_rollout_plus_train():
    times = step_time(B8, CARD, EIGHT_BY_2048)
    assert times.logp_s == 0
    assert times.colocated_s == times.rollout_s + times.train_s


def test_eight_answers_of_2048_tokens_are_dominated_by_rollout():
    """Decode is one token at a time; training sees all tokens at once."""
    for shape in (B06, B4, B8):
        times = step_time(shape, CARD, EIGHT_BY_2048)
        assert times.rollout_s > 3 * times.train_s
        assert times.rollout_share > 0.5


def test_a_slower_rollout_idles_the_trainer():
    fast, slow = (
        step_time(B8, Device("d", 141e9, bandwidth, 989e12, 8e9, overhead_s=0.0), EIGHT_BY_2048)
        for bandwidth in (4.8e12, 1.2e12)
    )
    assert slow.rollout_s == pytest.approx(4 * fast.rollout_s) and slow.train_s == fast.train_s
    assert slow.trainer_idle > fast.trainer_idle > 0


def test_the_longest_answer_is_a_floor_that_no_number_of_devices_lowers():
    traffic = Traffic(1024, 16, 200, 1000, 2000)
    alone = 2000 * decode_step_s(B8, CARD, 1, 200 + 1000)
    assert rollout_s(B8, CARD, traffic, num_devices=1000) == pytest.approx(alone)
    assert rollout_s(B8, CARD, traffic, num_devices=1) > rollout_s(B8, CARD, traffic, num_devices=4) >= alone


def test_decode_is_bound_by_weights_below_this_context():
    """W/κ: 10k tokens for 0.6B, 55k for 4B, 111k for 8B."""
    assert weight_bound_tokens(B06, CARD) == pytest.approx(10.4e3, rel=0.03)
    assert weight_bound_tokens(B4, CARD) == pytest.approx(55e3, rel=0.03)
    assert weight_bound_tokens(B8, CARD) == pytest.approx(111e3, rel=0.01)


def test_the_worked_example_of_8b_on_one_card():
    """141 GB, 4.8 TB/s: about 370 sequences and at most 14.2k tokens/s at 2k context, 46 and 1.8k at 16k."""
    ideal = Device("card", 141e9, 4.8e12, 989e12, 8e9, overhead_s=0.0)
    for context, sequences, rate in ((2000, 374, 14_200), (16_000, 46, 1_800)):
        batch = max_batch(B8, ideal, context)
        assert batch == pytest.approx(sequences, rel=0.03)
        assert batch / decode_step_s(B8, ideal, batch, context) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(("tokens_s", "sequence", "mfu"), [(26.0e3, 16_384, 0.139), (29.0e3, 65_536, 0.354)])
def test_training_flops_agree_with_published_utilisation(tokens_s, sequence, mfu):
    """prime-rl's trainer, 4B, all parameters, eight H100: tokens/s and the MFU it reports."""
    assert tokens_s * train_flops_per_token(B4, sequence) / (8 * 989e12) == pytest.approx(mfu, rel=0.02)


def test_training_time_is_inverse_to_devices_and_recompute_costs_a_third():
    one = train_s(B8, CARD, 1e6, 0)
    assert train_s(B8, CARD, 1e6, 0, num_devices=4) == pytest.approx(one / 4)
    assert train_s(B8, CARD, 1e6, 0, recompute=True) == pytest.approx(one * 8 / 6)


def test_a_model_that_does_not_fit_cannot_roll_out():
    assert weight_bytes(B8, DEVICES["rtx4090"]) < 24e9
    small = Device("small", 12e9, 1e12, 1e14, 1e9)
    assert rollout_s(B8, small, EIGHT_BY_2048) == float("inf")


def test_the_best_split_moves_to_rollout_as_answers_grow():
    short, long = Traffic(64, 8, 200, 500, 1000), Traffic(64, 8, 200, 12_000, 16_000)
    assert best_split(B8, CARD, short, 8)[0] < best_split(B8, CARD, long, 8)[0]


def test_the_best_split_is_no_worse_than_any_other():
    traffic = Traffic(32, 8, 300, 2000, 4000)
    rollout, train, times = best_split(B8, CARD, traffic, 8)
    assert rollout + train == 8
    for n in range(1, 8):
        assert times.overlapped_s <= step_time(B8, CARD, traffic, rollout_devices=n, train_devices=8 - n).overlapped_s


def test_this_processor_is_measured():
    device = probe_cpu(0.1)
    assert 1e8 < device.flops < 1e14 and 1e8 < device.bandwidth < 1e13 and device.memory_bytes > 1e8
