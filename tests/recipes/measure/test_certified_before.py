"""A resumed RL stage starts on the certificate of its earlier start, if that still says something of its rewards."""

from dataclasses import replace

import pytest

from posttrain.config.rl import GRPOKeys
from posttrain.recipes.measure.certify import certified_before
from posttrain.rewards.certificate import Certificate
from posttrain.rewards.resolve import reward_digest
from posttrain.rewards.written import write

REWARD = "def paid(prompts, completions, **columns):\n    return [1.0] * len(completions)\n"


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "mine.py").write_text(REWARD)
    return GRPOKeys(
        base_model="unused", datasets=[{"path": "unused.jsonl"}], reward_funcs=[f"{tmp_path / 'mine.py'}:paid"]
    )


@pytest.fixture
def certificate(keys):
    digest = reward_digest(keys.reward_funcs, keys.reward_kwargs, keys.reward_weights)
    return Certificate("pass", digest, "cases", {"rewards": ["paid"]}, (), {"seconds_s": 1.0})


def test_one_that_passed_for_these_rewards_is_taken_over(keys, certificate, tmp_path):
    path = tmp_path / "certificate.json"
    assert certified_before(keys, path) is None
    write(certificate, path)
    assert certified_before(keys, path) == certificate
    write(replace(certificate, verdict="partial"), path)
    assert certified_before(keys, path).verdict == "partial"


def test_one_that_failed_or_is_for_other_rewards_is_not(keys, certificate, tmp_path):
    path = tmp_path / "certificate.json"
    write(replace(certificate, verdict="fail"), path)
    assert certified_before(keys, path) is None
    write(certificate, path)
    (tmp_path / "mine.py").write_text(REWARD.replace("1.0", "0.5"))
    assert certified_before(keys, path) is None
    assert certified_before(keys.model_copy(update={"reward_weights": [2.0]}), path) is None
