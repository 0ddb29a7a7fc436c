"""What a foreign engine adds to a stage's memory."""

import pytest

from posttrain.config.kinds import STAGE_KINDS
from posttrain.planner import Workload, estimate_memory
from posttrain.planner.engine import SamplingEngine, engine_parts
from posttrain.planner.shape import ModelShape

TIED = ModelShape(2, 64, 128, 1000, 4, 2, 16, tied=True)
GIB = 1 << 30


def plan(on_cpu=True, **rollout):
    keys = STAGE_KINDS["grpo"].keys(
        base_model="m", datasets=[{"path": "d.jsonl"}], reward_funcs=["exact_match"], rollout=rollout
    )
    demands = STAGE_KINDS["grpo"].demands(keys)
    workload = Workload.from_keys(keys.model_dump(), **demands, device_has_bf16=False, on_cpu=on_cpu)
    return estimate_memory(TIED, workload)


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
