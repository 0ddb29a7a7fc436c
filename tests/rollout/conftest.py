import pytest

from posttrain.config.stages import SFTKeys
from posttrain.models.load import load_policy
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
