import copy
from dataclasses import replace

import pytest

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import SFTKeys
from posttrain.models.load import load_policy
from posttrain.recipes.experience.engines import EngineSource, make_engine, sync_engine
from posttrain.rollout.embedded import EmbeddedEngine


@pytest.fixture(scope="session")
def shared_policy(model_dir):
    """A frozen policy per architecture, made once; tests must not change it."""
    made = {}

    def make(architecture):
        if architecture not in made:
            keys = SFTKeys(base_model=str(model_dir(architecture)), datasets=[{"path": "unused.jsonl"}])
            made[architecture] = load_policy(keys, trainable=False)
        return made[architecture]

    return make


def embedded(policy, **options):
    return EmbeddedEngine(policy, **{"stop_token_ids": (2,), "batch_size": 4, **options})


@pytest.fixture(scope="session")
def vllm_engine(shared_policy, model_dir):
    """vLLM in this process on the tiny Qwen3, in float32; made once."""
    import vllm.model_executor.models.registry as registry

    # It looks at a model's class in a process of its own, which imports everything once more.
    registry._run_in_subprocess = lambda look: look()
    policy = shared_policy("qwen3")
    keys = SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}])
    engine = make_engine(EngineSource(keys, policy), keys=RolloutKeys(engine="vllm", memory_gib=0.1))
    yield engine
    engine.close()


@pytest.fixture
def make_vllm(vllm_engine, shared_policy):
    """`make_vllm(stops)`: that engine with these stop tokens, and with the weights that it was started with."""

    def make(stops):
        engine = copy.copy(vllm_engine)
        engine._options = replace(engine._options, stop_token_ids=tuple(stops))
        return engine

    return make


@pytest.fixture(scope="session")
def vllm_server_engine(shared_policy, model_dir, tmp_path_factory):
    """A server of vLLM on the tiny Qwen3, in float32; started once, with places for adapters."""
    policy = shared_policy("qwen3")
    keys = SFTKeys(base_model=str(model_dir("qwen3")), datasets=[{"path": "unused.jsonl"}], adapter="lora", lora_r=8)
    # Some tests kill it; it comes back.
    rollout = RolloutKeys(engine="vllm_server", memory_gib=0.1, max_restarts=6)
    engine = make_engine(EngineSource(keys, policy), keys=rollout, folder=tmp_path_factory.mktemp("server"))
    sync_engine(engine, policy, version=0)
    yield engine
    engine.close()


@pytest.fixture
def make_vllm_server(vllm_server_engine, shared_policy):
    """`make_vllm_server(stops)`: that engine with these stop tokens, and with the weights that it was started with."""

    def make(stops):
        engine = copy.copy(vllm_server_engine._replicas[0].engine)
        engine._served = replace(engine._served, stop_token_ids=tuple(stops))
        return engine

    return make
