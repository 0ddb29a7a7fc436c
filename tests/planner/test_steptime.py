"""The step-time model: its laws, the worked numbers it must give, and published measurements."""

from dataclasses import replace

import pytest

from posttrain.errors import ConfigError
from posttrain.planner import DEVICES, Cluster, Loop, ModelShape, Traffic, Work, best_split, parse_cluster, step_time
from posttrain.planner.machine import probe_cpu
from posttrain.planner.parts import Device, Rates
from posttrain.planner.sharding import ShardingPlan
from posttrain.planner.steptime import (
    decode_step_s,
    max_batch,
    rollout_s,
    steady_rollout_s,
    train_flops_per_token,
    train_s,
    weight_bound_tokens,
    weight_bytes,
)

IDEAL = Rates(decode_bandwidth=1.0, decode_flops=1.0, decode_step_s=0.0, spread=0.0)


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
    times = step_time(B8, Cluster(CARD), EIGHT_BY_2048)
    assert times.logp_s == 0
    assert times.colocated_s == times.rollout_s + times.train_s


def test_eight_answers_of_2048_tokens_are_dominated_by_rollout():
    """Decode is one token at a time; training sees all tokens at once."""
    for shape in (B06, B4, B8):
        times = step_time(shape, Cluster(CARD), EIGHT_BY_2048)
        assert times.rollout_s > 3 * times.train_s
        assert times.rollout_share > 0.5


def test_a_slower_rollout_idles_the_trainer():
    fast, slow = (
        step_time(B8, Cluster(Device("d", 141e9, bandwidth, 989e12, 8e9, rates=IDEAL)), EIGHT_BY_2048)
        for bandwidth in (4.8e12, 1.2e12)
    )
    assert slow.rollout_s == pytest.approx(4 * fast.rollout_s) and slow.train_s > fast.train_s
    assert slow.trainer_idle > fast.trainer_idle > 0


def test_the_longest_answer_is_a_floor_that_no_number_of_devices_lowers():
    traffic = Traffic(1024, 16, 200, 1000, 2000)
    alone = 2000 * decode_step_s(B8, CARD, 1, 200 + 1000)
    assert rollout_s(B8, CARD, traffic, num_devices=100_000) == pytest.approx(alone)
    one, four, many = (rollout_s(B8, CARD, traffic, num_devices=n) for n in (1, 4, 1000))
    assert one > four > many >= alone


def test_answers_of_one_length_take_a_full_batch_to_the_end():
    card = replace(CARD, rates=replace(CARD.rates, spread=0.0))
    traffic = Traffic(4, 8, 200, 1000, 1000)
    assert rollout_s(B8, card, traffic) == pytest.approx(1000 * decode_step_s(B8, card, 32, 700), rel=1e-3)


def test_a_tail_costs_more_than_the_mean_and_less_than_if_all_were_longest():
    traffic = Traffic(64, 8, 200, 1000, 8000)
    tail = rollout_s(B8, CARD, traffic, 8)
    even, longest = (rollout_s(B8, CARD, replace(traffic, answer_tokens=n, longest_answer=n), 8) for n in (1000, 8000))
    assert even < tail < longest
    assert steady_rollout_s(B8, CARD, traffic, 8, batch=64) < tail


def test_a_replica_over_more_devices_holds_more_and_agrees_more_slowly():
    assert max_batch(B8, CARD, 4000, 2) > 2 * max_batch(B8, CARD, 4000)
    one, two, sixteen = (decode_step_s(B8, CARD, 64, 4000, n) for n in (1, 2, 16))
    assert two < one and decode_step_s(B06, CARD, 1, 10, 16) > decode_step_s(B06, CARD, 1, 10)
    assert sixteen > 2 * B8.num_layers * CARD.rates.far_allreduce_s


def test_decode_is_bound_by_weights_below_this_context():
    """W/κ: 10k tokens for 0.6B, 55k for 4B, 111k for 8B."""
    assert weight_bound_tokens(B06, CARD) == pytest.approx(10.4e3, rel=0.03)
    assert weight_bound_tokens(B4, CARD) == pytest.approx(55e3, rel=0.03)
    assert weight_bound_tokens(B8, CARD) == pytest.approx(111e3, rel=0.01)


def test_the_worked_example_of_8b_on_one_card():
    """141 GB, 4.8 TB/s: about 370 sequences and at most 14.2k tokens/s at 2k context, 46 and 1.8k at 16k."""
    ideal = Device("card", 141e9, 4.8e12, 989e12, 8e9, rates=IDEAL)
    for context, sequences, rate in ((2000, 374, 14_200), (16_000, 46, 1_800)):
        batch = max_batch(B8, ideal, context)
        assert batch == pytest.approx(sequences, rel=0.03)
        assert batch / decode_step_s(B8, ideal, batch, context) == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(("tokens_s", "sequence", "mfu"), [(26.0e3, 16_384, 0.139), (29.0e3, 65_536, 0.354)])
def test_training_flops_agree_with_published_utilisation(tokens_s, sequence, mfu):
    """prime-rl's trainer, 4B, all parameters, eight H100: tokens/s and the MFU it reports."""
    assert tokens_s * train_flops_per_token(B4, sequence) / (8 * 989e12) == pytest.approx(mfu, rel=0.02)


def test_training_time_is_inverse_to_devices_and_recompute_costs_a_third():
    one = train_s(B8, CARD, Work(1e6, 2048))
    assert train_s(B8, CARD, Work(1e6, 2048), num_devices=4) == pytest.approx(one / 4)
    assert train_s(B8, CARD, Work(1e6, 2048, recompute=True)) == pytest.approx(one * 4 / 3, rel=0.02)
    assert train_s(B8, CARD, Work(1e6, 2048, adapter=True)) < one


def test_a_slow_link_between_machines_rules_a_step_of_few_tokens():
    near, far = parse_cluster("2x8xH100"), parse_cluster("2x8xH100@eth10")
    work = Work(16 * 2048, 2048)
    fast, slow = (train_s(B8, c.device, work, c.num_devices, c.device_link) for c in (near, far))
    assert slow > 50 * fast
    # Gathered twice and reduced once, in float32, over a sixteenth of the traffic each.
    assert slow == pytest.approx(3 * 4 * B8.num_params * 15 / 16 / (1.25e9 / 8))


@pytest.mark.parametrize(
    ("text", "num", "shown"),
    [("8xH100", 8, "8xh100"), ("2x8xH100", 16, "2x8xh100@ib400"), ("4x8xa100@eth100", 32, "4x8xa100@eth100")],
)
def test_clusters_are_read_and_written_alike(text, num, shown):
    cluster = parse_cluster(text)
    assert cluster.num_devices == num and str(cluster) == shown and parse_cluster(shown) == cluster


@pytest.mark.parametrize(
    ("text", "says"),
    [("H100", "expected COUNTxCARD"), ("0xH100", "expected COUNTxCARD"), ("8xh999", "no card h999"), ("2x8xh100@wifi", "no link wifi")],
)  # fmt: skip
def test_a_cluster_that_cannot_be_read_says_what_can(text, says):
    with pytest.raises(ConfigError, match=f"--gpus {text}: .*{says}"):
        parse_cluster(text)


def test_a_model_that_does_not_fit_cannot_roll_out():
    assert weight_bytes(B8, DEVICES["rtx4090"]) < 24e9
    small = Device("small", 12e9, 1e12, 1e14, 1e9)
    assert rollout_s(B8, small, EIGHT_BY_2048) == float("inf")


def test_the_best_split_moves_to_rollout_as_answers_grow():
    short, long = Traffic(64, 8, 200, 500, 1000), Traffic(64, 8, 200, 12_000, 16_000)
    assert best_split(B8, Cluster(CARD, 8), short)[0] < best_split(B8, Cluster(CARD, 8), long)[0]


def test_the_best_split_is_no_worse_than_any_other():
    traffic = Traffic(32, 8, 300, 2000, 4000)
    cluster = Cluster(CARD, 8)
    rollout, train, times = best_split(B8, cluster, traffic)
    assert rollout + train == 8
    for n in range(1, 8):
        other = step_time(B8, cluster, traffic, Loop(), rollout_devices=n, train_devices=8 - n)
        assert times.overlapped_s <= other.overlapped_s


def test_this_processor_is_measured():
    device = probe_cpu(0.1)
    assert 1e8 < device.flops < 1e14 and 1e8 < device.bandwidth < 1e13 and device.memory_bytes > 1e8


def test_keys_of_sharding_move_what_is_sent():
    def sent(micro=4, **keys):
        how = ShardingPlan(**keys).on(8)
        return how.sent_s(10**9, micro, 16, (100e9, 10e9), trained=True)

    # Two gathers and a reduction of float32, of which a device sends 15 of 16 parts, between machines.
    assert sent() == pytest.approx(4 * 3 * 4e9 * 15 / 16 / 10e9)
    assert sent(reshard_after_forward=False) == pytest.approx(sent() * 2 / 3)
    assert sent(sync_each_batch=False) == pytest.approx(sent() * 9 / 12)
    assert sent(param_dtype="bfloat16", reduce_dtype="bfloat16") == pytest.approx(sent() / 2)
    # Of a layer that four hold between them a quarter is gathered, over the four groups.
    assert sent(tensor_parallel_size=4) == pytest.approx(4 * 3 * 1e9 * 3 / 4 / 10e9)
    # In copies the gathers stay in a machine, and an eighth of the gradients goes between the two.
    inside = 4 * 3 * 4e9 * 7 / 8 / 100e9
    assert sent(dp_shard_size="node") == pytest.approx(inside + 4 * 4e9 / 8 * 2 / 2 / 10e9)
