"""What a foreign engine adds to a stage's memory."""

from dataclasses import replace

import pytest

from posttrain.config.kinds import STAGE_KINDS
from posttrain.planner import Workload, estimate_memory
from posttrain.planner.engine import SamplingEngine, engine_parts
from posttrain.planner.fit import shortfall
from posttrain.planner.shape import ModelShape

TIED = ModelShape(2, 64, 128, 1000, 4, 2, 16, tied=True)
GIB = 1 << 30


def plan(on_cpu=True, options=None, **rollout):
    keys = STAGE_KINDS["grpo"].keys(
        base_model="m", datasets=[{"path": "d.jsonl"}], reward_funcs=["exact_match"], rollout=rollout, **options or {}
    )
    demands = STAGE_KINDS["grpo"].demands(keys)
    workload = Workload.from_keys(keys.model_dump(), **demands, device_has_bf16=False, on_cpu=on_cpu)
    return estimate_memory(TIED, workload)


def test_weights_laid_out_for_sampling_are_counted_on_a_cpu_where_the_step_is_written_out(monkeypatch):
    assert "decode_weights" not in plan(prepack=True).parts
    monkeypatch.setitem(globals(), "TIED", replace(TIED, decodes_by_weights=True))
    assert "decode_weights" not in plan().parts
    assert plan(prepack=True).parts["decode_weights"] == 4 * (TIED.linear_params + 1000 * 64)
    assert "decode_weights" not in plan(on_cpu=False, prepack=True).parts


@pytest.mark.parametrize("engine", ["vllm", "vllm_server"])
def test_vllm_holds_weights_and_cache_of_its_own_all_the_while(engine):
    ours, theirs = plan(), plan(engine=engine, memory_gib=2.0)
    parts = theirs.parts
    # In float32, and the head that is tied to the embedding once more: kernels of a CPU pack it.
    assert parts["vllm_weights"] == 4 * (TIED.num_params + 1000 * 64)
    assert parts["vllm_kv_cache"] == 2 * GIB
    assert parts["vllm_runtime"] == {"vllm": 0.5, "vllm_server": 2.0}[engine] * GIB
    assert not {"kv_cache", "prefill", "decode_weights"} & parts.keys()
    held = sum(size for name, size in parts.items() if name.startswith("vllm_"))
    assert theirs.floor_bytes >= ours.floor_bytes - max(ours.parts.values()) + held


def test_its_dtype_is_the_trainers_unless_another_is_chosen():
    for bf16, dtype, size in ((True, "auto", 2), (False, "auto", 4), (False, "bfloat16", 2), (True, "float32", 4)):
        parts = engine_parts(TIED, SamplingEngine("vllm", dtype), bf16=bf16, on_cpu=False)
        assert parts["vllm_weights"] == size * TIED.num_params
        assert parts["vllm_kv_cache"] == 8 * GIB


def test_what_a_server_that_runs_already_holds_is_not_counted():
    assert not any(name.startswith("vllm") for name in plan(engine="vllm_server", url="http://127.0.0.1:1").parts)


def test_a_replica_over_several_cards_holds_a_part_on_each_and_the_head_on_its_way():
    whole, half = (
        engine_parts(TIED, SamplingEngine("vllm", tensor_parallel_size=n), bf16=True, on_cpu=False) for n in (1, 2)
    )
    assert half["vllm_weights"] == whole["vllm_weights"] // 2
    assert whole["sync_buffers"] == 2 * 1000 * 64 * 2


@pytest.mark.parametrize("on_cpu", [True, False])
def test_replicas_hold_each_their_own(on_cpu):
    one, three = (plan(on_cpu, engine="vllm_server", replicas=n).parts for n in (1, 3))
    for name in ("vllm_weights", "vllm_kv_cache", "vllm_runtime"):
        assert three[name] == 3 * one[name], name
    assert three["sync_buffers"] == 2 * one["sync_buffers"]


def test_only_servers_on_the_cards_that_train_take_memory_of_them():
    def parts(trainers, **options):
        return engine_parts(TIED, SamplingEngine("vllm_server", **options), bf16=True, on_cpu=False, trainers=trainers)

    one = parts(1)
    assert parts(4, replicas=4) == one, "one on each card"
    assert parts(2, replicas=3)["vllm_kv_cache"] == 2 * one["vllm_kv_cache"]
    apart = parts(4, replicas=4, placement="split")
    assert {name for name, size in apart.items() if size} == {"sync_buffers"}
    assert apart["sync_buffers"] == one["sync_buffers"] // 2


@pytest.mark.parametrize(("asks", "copied"), [({}, 4), ({"adapter": "lora"}, 2)])
def test_what_is_made_ahead_by_our_engine_needs_a_copy_of_what_is_trained(asks, copied):
    """Loaded as the policy is: float32 where it is trained whole, the file's bfloat16 below an adapter, which it has too."""
    shape = replace(TIED, stored_bytes=2)
    made = [
        estimate_memory(shape, Workload(samples=True, rollout=SamplingEngine(max_staleness=stale), **asks)).parts
        for stale in (0, 1)
    ]
    assert "replica" not in made[0]
    assert made[1]["replica"] == copied * shape.num_params + made[1].get("adapter", 0)
    assert made[1]["replica"] == made[1]["weights"] + made[1].get("adapter", 0)


def test_what_samples_while_it_trains_holds_both_at_once():
    smallest = {"per_device_train_batch_size": 1, "gradient_checkpointing": True, "rollout_batch_size": 8}
    in_turn, ahead = (plan(options=smallest, max_staleness=stale) for stale in (0, 1))
    parts = ahead.parts
    training = sum(parts.get(name, 0) for name in ("autocast", "gradients", "activations", "logits"))
    rollout = sum(parts.get(name, 0) for name in ("kv_cache", "prefill", "decode_weights"))
    export = parts["export"]
    held = sum(parts.values()) - training - rollout - export
    assert ahead.total_bytes == int(1.05 * (held + max(training + rollout, export)))
    assert "rollout.max_staleness: 0" in shortfall(ahead, in_turn.total_bytes, "m")


def test_several_processes_hold_a_copy_to_sample_with_unless_they_decode_with_their_shares():
    def plan(shards, **rollout):
        return estimate_memory(TIED, Workload(samples=True, rollout=SamplingEngine(**rollout)), shards)

    assert "replica" not in plan(1).parts and "replica" not in plan(1, transfer="shared").parts
    whole = plan(1).parts["weights"]
    assert plan(1, transfer="copy").parts["replica"] == plan(4).parts["replica"] == whole
    assert "replica" not in plan(4, transfer="shared").parts
    assert plan(4).total_bytes - plan(4, transfer="shared").total_bytes > 0.9 * whole


def test_a_copy_that_does_not_fit_is_proposed_to_be_left_out():
    smallest = {
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
        "rollout_batch_size": 8,
        "adapter": "lora",
    }
    large = replace(TIED, num_layers=40, hidden=640, intermediate=1280)
    copied = estimate_memory(large, Workload(samples=True, on_cpu=True, **smallest), 4)
    shared = replace(copied.workload, rollout=SamplingEngine(transfer="shared"))
    room = estimate_memory(large, shared, 4).total_bytes
    assert copied.total_bytes > room
    assert "it would fit with rollout.transfer: shared (" in shortfall(copied, room, "m")
