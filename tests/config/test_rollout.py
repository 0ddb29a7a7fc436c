"""How the engine that samples and the correction for its log-probs go together."""

import pytest

from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import GRPOKeys

BASE = {"base_model": "m", "datasets": [{"path": "x.jsonl"}], "reward_funcs": ["r.py:f"]}


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "off"),
        ({"rollout": {"engine": "embedded"}}, "off"),
        ({"rollout": {"engine": "vllm"}}, "token_truncate"),
        ({"rollout": {"engine": "vllm"}, "importance_sampling_correction": "auto"}, "token_truncate"),
        ({"rollout": {"engine": "vllm"}, "importance_sampling_correction": "token_mask"}, "token_mask"),
        ({"importance_sampling_correction": "token_mask"}, "token_mask"),
        ({"rollout": {"engine": "vllm"}, "importance_sampling_correction": "off", "allow_uncorrected": True}, "off"),
    ],
)
def test_the_correction_follows_the_engine(options, chosen):
    keys = GRPOKeys.model_validate(BASE | options)
    assert keys.importance_sampling_correction == chosen
    assert GRPOKeys.model_validate(keys.model_dump()) == keys


def test_another_engine_is_not_left_uncorrected_unasked():
    with pytest.raises(ValueError, match=r"off with rollout.engine: vllm, .* set allow_uncorrected: true beside it"):
        GRPOKeys.model_validate(BASE | {"rollout": {"engine": "vllm"}, "importance_sampling_correction": "off"})


def test_exact_log_probs_are_the_embedded_engines_alone():
    with pytest.raises(ValueError, match=r"rollout.exact: true with rollout.engine: vllm; .* set exact: false"):
        GRPOKeys.model_validate(BASE | {"rollout": {"engine": "vllm", "exact": True}})


@pytest.mark.parametrize(("engine", "way"), [("embedded", "shared"), ("vllm", "copy")])
def test_weights_take_the_best_way_that_the_engine_has(engine, way):
    assert RolloutKeys(engine=engine).way == RolloutKeys(engine=engine, transfer=way).way == way


def test_a_way_that_the_engine_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"transfer: file with rollout.engine: embedded, which takes its weights by shared"
    ):
        RolloutKeys(transfer="file")
    with pytest.raises(ValueError, match=r"transfer: shared with rollout.engine: vllm, .* by copy or file"):
        RolloutKeys(engine="vllm", transfer="shared")
