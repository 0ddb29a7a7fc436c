"""One answer to how a stage samples: for training, for the certificate, for live checks and for validation."""

from dataclasses import replace

import pytest

from posttrain.recipes import rl
from posttrain.recipes.experience import source
from posttrain.recipes.experience.engines import greedy, sampling_params
from posttrain.recipes.measure.certify import certify
from posttrain.rollout.embedded import EmbeddedEngine

KEYS = {
    "temperature": 0.8, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "max_completion_length": 8, "stop": ["</answer>", "!"]
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """The parameters of every call of an engine, but for the canaries of its syncs."""
    seen, generate = [], EmbeddedEngine.generate

    def recording(engine, requests, params):
        seen.append(params)
        return generate(engine, requests, params)

    monkeypatch.setattr(EmbeddedEngine, "generate", recording)
    for module in (rl, source):
        monkeypatch.setattr(
            module,
            "sync_engine",
            lambda engine, policy, version: {"sync/moved_bytes": float(engine.update(policy, version).num_bytes)},
        )
    return seen


def test_collector_live_checks_and_validation_sample_as_the_keys_say(asked, train, runner, data_dir):
    folder = train(
        "grpo", max_steps=3, reward_funcs=["last_digit"], reward_check_steps=1, eval_steps=3,
        eval_datasets=[{"path": str(data_dir / "dev-prompts.jsonl")}], **KEYS,
    )  # fmt: skip
    wanted = sampling_params(runner.keys_of("grpo", folder, data_dir, **KEYS))
    assert wanted.stop == ("</answer>", "!")
    canaries, validations = 2, 1
    assert asked.count(wanted) == 3 + canaries
    assert [params for params in asked if params != wanted] == [greedy(wanted)] * validations


def test_the_certificate_samples_with_the_stop_strings_of_the_run(asked, runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, reward_funcs=["last_digit"], **KEYS)
    certify(keys, tmp_path / "certificate.json")
    assert asked == [sampling_params(keys)]


def test_greedy_keeps_what_ends_a_completion(runner, data_dir, tmp_path):
    params = replace(sampling_params(runner.keys_of("grpo", tmp_path, data_dir, **KEYS)), stop_token_ids=(5,))
    assert (greedy(params).temperature, greedy(params).top_p) == (0.0, 1.0)
    assert (greedy(params).stop, greedy(params).stop_token_ids, greedy(params).max_tokens) == (params.stop, (5,), 8)
