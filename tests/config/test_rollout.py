"""How the engine that samples and the correction for its log-probs go together."""

import pytest

from posttrain.config.pipeline import PipelineKeys
from posttrain.config.rl import GRPOKeys
from posttrain.config.rollout import RolloutKeys

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
        ({"rollout": {"max_staleness": 1}}, "token_truncate"),
        ({"rollout": {"max_staleness": 1}, "importance_sampling_correction": "off", "allow_uncorrected": True}, "off"),
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


@pytest.mark.parametrize(("engine", "way"), [("embedded", "shared"), ("vllm", "copy"), ("vllm_server", "file")])
def test_weights_take_the_best_way_that_the_engine_has(engine, way):
    assert RolloutKeys(engine=engine).way == RolloutKeys(engine=engine, transfer=way).way == way


def test_our_engine_takes_a_copy_where_the_weights_are_dealt_or_move_unless_it_is_told():
    auto, shared, copy = RolloutKeys(), RolloutKeys(transfer="shared"), RolloutKeys(transfer="copy")
    assert [keys.takes_copy(sharded=False) for keys in (auto, shared, copy)] == [False, False, True]
    assert [keys.takes_copy(sharded=True) for keys in (auto, shared, copy)] == [True, False, True]
    assert RolloutKeys(max_staleness=1).takes_copy(sharded=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": {"transfer": "shared", "max_staleness": 1}}, r"shared with rollout.max_staleness: 1; .* set transfer: copy"),
        ({"rollout": {"transfer": "copy", "exact": True}}, r"exact: true with rollout.transfer: copy; .* set transfer: shared"),
        (
            {"rollout": {"transfer": "shared"}, "sharding": {"tensor_parallel_size": 2}},
            r"sharding.tensor_parallel_size: 2 with rollout.transfer: shared, .* set rollout.transfer: copy",
        ),
    ],
)  # fmt: skip
def test_shares_are_not_decoded_with_where_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOKeys.model_validate(BASE | options)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"engine": "sglang", "url": "http://127.0.0.1:1"}, "compare with rollout.engine: sglang, .* set routed_experts: off, or engine:"),
        ({"exact": True}, "compare with rollout.exact: true, .* remove one of them"),
    ],
)  # fmt: skip
def test_experts_are_asked_of_who_can_say_them(beside, message):
    with pytest.raises(ValueError, match=f"rollout.routed_experts: {message}"):
        RolloutKeys(routed_experts="compare", **beside)


def test_a_way_that_the_engine_does_not_have_is_refused():
    with pytest.raises(
        ValueError, match=r"transfer: file with rollout.engine: embedded, which takes its weights by shared"
    ):
        RolloutKeys(transfer="file")
    with pytest.raises(ValueError, match=r"transfer: shared with rollout.engine: vllm, .* by copy or file or delta"):
        RolloutKeys(engine="vllm", transfer="shared")


def test_only_a_server_that_the_run_starts_gets_its_weights_by_broadcast():
    assert RolloutKeys(engine="vllm_server", transfer="broadcast").way == "broadcast"
    with pytest.raises(ValueError, match=r"broadcast with rollout.url: .* set transfer: file, or remove url"):
        RolloutKeys(engine="vllm_server", transfer="broadcast", url="http://127.0.0.1:8000")
    for engine in ("vllm", "embedded"):
        with pytest.raises(ValueError, match=rf"broadcast with rollout.engine: {engine}, which takes its weights by"):
            RolloutKeys(engine=engine, transfer="broadcast")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"memory_gib": 2.0}, "rollout.memory_gib does nothing with rollout.engine: embedded"),
        ({"engine": "vllm", "url": "http://127.0.0.1:1"}, "rollout.url does nothing with rollout.engine: vllm"),
        ({"engine": "vllm", "max_restarts": 1}, "rollout.max_restarts does nothing with rollout.engine: vllm"),
        (
            {"engine": "vllm_server", "url": "http://[::1]:1", "dtype": "bfloat16"},
            "rollout.dtype does nothing with rollout.url",
        ),
        (
            {"engine": "vllm_server", "url": "http://[::1]:1", "enforce_eager": True},
            "rollout.enforce_eager does nothing with rollout.url",
        ),
        ({"engine": "vllm_server", "token_file": "key"}, "rollout.token_file does nothing with no rollout.url"),
    ],
)
def test_a_key_that_the_chosen_engine_does_not_read_is_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        RolloutKeys(**options)


@pytest.mark.parametrize("beside", [{"exact": True}, {"engine": "vllm"}])
def test_filled_up_prompts_are_refused_where_another_way_attends_to_them(beside):
    with pytest.raises(ValueError, match=r"pad_prompts: true with rollout.(exact: true|engine: vllm), which attends"):
        RolloutKeys(pad_prompts=True, **beside)
    with pytest.raises(
        ValueError, match=r"prefix_cache_gib: 0.5 with rollout.(exact: true|engine: vllm), which encodes"
    ):
        RolloutKeys(prefix_cache_gib=0.5, **beside)
    with pytest.raises(ValueError, match=r"prepack: true with rollout.(exact: true|engine: vllm), which multiplies"):
        RolloutKeys(prepack=True, **beside)
    with pytest.raises(ValueError, match=r"native_kernels: true with rollout.(exact: true|engine: vllm), which comp"):
        RolloutKeys(native_kernels=True, **beside)


@pytest.mark.parametrize(
    ("beside", "reason"),
    [({"engine": "vllm"}, "only the embedded engine drafts"), ({"max_staleness": 1}, "which thread samples first")],
)
def test_speculation_is_refused_where_it_could_not_be_or_would_change_bits_from_run_to_run(beside, reason):
    with pytest.raises(ValueError, match=reason):
        RolloutKeys(speculation="suffix", **beside)
    assert RolloutKeys(speculation="suffix", exact=True).speculation == "suffix"


def test_keys_written_out_with_their_defaults_are_read_back():
    for engine in ("embedded", "vllm", "vllm_server"):
        assert RolloutKeys(**RolloutKeys(engine=engine).model_dump()) == RolloutKeys(engine=engine)


def test_a_server_on_another_host_is_refused_with_the_reason_and_the_way_round():
    with pytest.raises(
        ValueError, match=r"server on gpu7, .* pause it, change its weights .* ssh -L 8000:127.0.0.1:8000 gpu7"
    ):
        RolloutKeys(engine="vllm_server", url="http://gpu7:8000")


def test_samples_of_older_weights_are_not_left_uncorrected_unasked():
    with pytest.raises(
        ValueError, match=r"off with rollout.max_staleness: 2, .* set allow_uncorrected: true beside it"
    ):
        GRPOKeys.model_validate(BASE | {"rollout": {"max_staleness": 2}, "importance_sampling_correction": "off"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exact": True}, r"exact: true with rollout.max_staleness: 1; .* set exact: false, or max_staleness: 0"),
        (
            {"engine": "sglang", "url": "http://127.0.0.1:1"},
            r"engine: sglang with rollout.max_staleness: 1; .* vllm_server",
        ),
        (
            {"engine": "vllm_server", "pause": "abort"},
            r"pause: abort with rollout.max_staleness: 1; .* set pause: keep",
        ),
    ],
)
def test_what_cannot_be_made_ahead_is_refused_with_the_way_out(options, message):
    with pytest.raises(ValueError, match=message):
        RolloutKeys(max_staleness=1, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"engine": "vllm"},
        {"engine": "vllm_server", "url": "http://127.0.0.1:1"},
        {"engine": "sglang", "url": "http://127.0.0.1:1"},
    ],
)
def test_several_replicas_are_servers_that_the_run_starts(options):
    assert RolloutKeys(engine="vllm_server", replicas=2, placement="split").cards(2).taken == 2
    with pytest.raises(ValueError, match=r"rollout.placement does nothing with"):
        RolloutKeys(placement="split", **options)
    with pytest.raises(ValueError, match=r"rollout.replicas does nothing with"):
        RolloutKeys(replicas=2, **options)


@pytest.mark.parametrize(("name", "value"), [("max_staleness", 1), ("exact", True)])
def test_evals_have_no_trainer(name, value):
    """To be ahead of, or to agree with to the last bit."""
    with pytest.raises(
        ValueError, match=rf"eval_rollout.{name}: {str(value).lower()} does nothing, for evals train nothing; remove it"
    ):
        PipelineKeys.model_validate({"name": "n", "base_model": "m", "stages": [], "eval_rollout": {name: value}})
