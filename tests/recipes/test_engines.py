"""From the keys of a stage to the engine that it samples with."""

import pytest

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import GRPOKeys
from posttrain.distributed.topology import SingleProcess
from posttrain.errors import ConfigError
from posttrain.models.load import load_tokenizer
from posttrain.recipes.engines import EngineSource, _Ask, _vllm_options, make_engine


@pytest.fixture
def keys(model_dir):
    def make(**options):
        values = {"base_model": str(model_dir("qwen3")), "datasets": [{"path": "x.jsonl"}], "reward_funcs": ["r.py:f"]}
        return GRPOKeys.model_validate(values | options)

    return make


def options_of(keys, rows=5):
    return _vllm_options(_Ask(EngineSource(keys), keys.rollout, rows, SingleProcess()), load_tokenizer(keys))


@pytest.mark.parametrize(
    ("key", "value", "argument", "expected"),
    [
        ("dtype", "bfloat16", "dtype", "bfloat16"),
        ("max_model_len", 64, "max_model_len", 64),
        ("memory_gib", 0.5, "kv_cache_memory_bytes", 1 << 29),
        ("tensor_parallel_size", 2, "tensor_parallel_size", 2),
    ],
)
def test_each_key_reaches_vllm(key, value, argument, expected, keys):
    before = options_of(keys()).engine_args()
    after = options_of(keys(rollout={"engine": "vllm", key: value})).engine_args()
    assert before[argument] != after[argument] == expected
    assert {name for name in before if before[name] != after[name]} == {argument}


def test_eager_is_what_a_cpu_always_is(keys):
    assert options_of(keys()).engine_args()["enforce_eager"]
    assert options_of(keys(rollout={"enforce_eager": True})).enforce_eager


def test_it_starts_as_the_trainer_computes_and_stops_where_we_do(keys):
    made = options_of(keys())
    assert (made.dtype, made.max_num_seqs) == ("float32", 5)
    assert made.engine_args()["max_model_len"] == -1
    assert made.stop_token_ids == (2,)


def test_tokens_that_the_given_model_lacks_are_refused(keys):
    with pytest.raises(ConfigError, match=r"no rows for added_tokens; train them in an SFT stage first"):
        make_engine(EngineSource(keys(added_tokens=["<tool>"])), keys=RolloutKeys(engine="vllm"))


def test_several_processes_do_not_each_hold_a_vllm(keys):
    class Two(SingleProcess):
        world_size = 2

    with pytest.raises(ConfigError, match="samples in the training process, and there are 2 of them"):
        make_engine(EngineSource(keys()), Two(), keys=RolloutKeys(engine="vllm"))
