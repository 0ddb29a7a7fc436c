import pytest
from pydantic import ValidationError

from posttrain.config.datasets import DatasetKeys
from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.places import looks_local, resolve_path
from posttrain.config.rl import GRPOKeys
from posttrain.config.stages import SFTKeys

REQUIRED = {"base_model": "x", "datasets": [{"path": "y"}]}


def test_keys_do_not_change_once_loaded():
    keys = SFTKeys(**REQUIRED)
    with pytest.raises(ValidationError):
        keys.seed = 1


def test_qlora_is_lora_on_4_bits():
    assert SFTKeys(**REQUIRED, adapter="qlora").load_in_4bit is True
    assert SFTKeys(**REQUIRED, adapter="lora").load_in_4bit is False


def test_defaults_are_not_shared_between_objects():
    first, second = SFTKeys(**REQUIRED), SFTKeys(**REQUIRED)
    first.rank_pattern["q_proj"] = 3
    assert second.rank_pattern == {}


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_required_keys_are_few(kind):
    required = {name for name, field in STAGE_KINDS[kind].keys.model_fields.items() if field.is_required()}
    assert required == {"base_model", "datasets"} | {
        "grpo": {"reward_funcs"},
        "ppo": {"reward_funcs"},
        "online_dpo": {"reward_funcs"},
        "distill": {"teachers"},
    }.get(kind, set())


@pytest.mark.parametrize(
    ("weights", "right"), [([1.0], True), ([1.0, 2.0], False), ([float("inf")], False), (None, True)]
)
def test_one_finite_weight_per_reward(weights, right):
    values = {**REQUIRED, "reward_funcs": ["a"], "reward_weights": weights}
    if right:
        assert GRPOKeys(**values).reward_weights == weights
    else:
        with pytest.raises(ValidationError):
            GRPOKeys(**values)


def test_a_hub_id_does_not_look_local():
    assert not looks_local("Qwen/Qwen2.5-0.5B")
    assert looks_local("data.parquet")


@pytest.mark.parametrize("path", ["", "Qwen/Qwen2.5-0.5B", "openai/gsm8k"])
def test_what_is_not_local_is_returned_as_it_is(tmp_path, path):
    assert resolve_path(path, tmp_path) == path


@pytest.mark.parametrize("path", ["./x", "../x", "a/b.jsonl", "DATA.JSONL", "x.jsonl.gz"])
def test_what_looks_local_is_made_absolute(tmp_path, path):
    assert resolve_path(path, tmp_path) == str((tmp_path / path).resolve())


RAISES = {"health": {"loss_divergence": {"action": "raise_beta"}}}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("sft", {}), ("dpo", {"beta": 0.0}), ("dpo", {"loss_type": "simpo"}), ("grpo", {"reward_funcs": ["a"]})],
)
def test_raise_beta_needs_a_pull_to_a_reference(kind, options):
    with pytest.raises(ValidationError, match=r"health.loss_divergence.action: raise_beta needs a pull to a reference"):
        STAGE_KINDS[kind].keys(**REQUIRED, **options, **RAISES)
    assert STAGE_KINDS["dpo"].keys(**REQUIRED, **RAISES).beta == 0.1
    assert STAGE_KINDS["grpo"].keys(**REQUIRED, reward_funcs=["a"], beta=0.01, **RAISES).health == RAISES["health"]


def test_a_kl_target_steers_a_beta_that_is_there():
    with pytest.raises(ValidationError, match="kl_target steers beta, which is 0"):
        GRPOKeys(**REQUIRED, reward_funcs=["a"], kl_target=0.1)
    assert GRPOKeys(**REQUIRED, reward_funcs=["a"], kl_target=0.1, beta=0.01).kl_target == 0.1


def test_gmpo_with_tokens_that_have_no_side_to_be_clipped_at_is_refused():
    with pytest.raises(ValidationError, match=r"top_entropy_quantile: 0.2 with loss_type: gmpo.* take gspo"):
        GRPOKeys(**REQUIRED, reward_funcs=["a"], loss_type="gmpo", top_entropy_quantile=0.2)
    with pytest.raises(ValidationError, match=r"top_entropy_quantile: 0.2 with loss_type: kl_cov.* take dapo"):
        GRPOKeys(**REQUIRED, reward_funcs=["a"], loss_type="kl_cov", top_entropy_quantile=0.2)
    assert GRPOKeys(**REQUIRED, reward_funcs=["a"], loss_type="gspo", top_entropy_quantile=0.2).loss_type == "gspo"


@pytest.mark.parametrize("change", [{"loss_type": "rloo"}, {"advantage_estimator": "reinforce_pp"}])
def test_gdpo_with_another_baseline_than_the_groups_is_refused(change):
    with pytest.raises(ValidationError, match="normalize_then_sum is defined on advantage_estimator: group"):
        GRPOKeys(
            base_model="m", datasets=[{"path": "d.jsonl"}], reward_funcs=["exact"],
            multi_objective_aggregation="normalize_then_sum", **change,
        )  # fmt: skip


def test_a_kl_that_would_be_normalised_away_is_refused():
    keys = REQUIRED | {
        "reward_funcs": ["a", "b"], "kl_in_reward": True, "multi_objective_aggregation": "normalize_then_sum"
    }  # fmt: skip
    with pytest.raises(ValidationError, match="beta would do nothing; set kl_in_reward: false"):
        GRPOKeys(**keys, beta=0.1)
    assert GRPOKeys(**keys).beta == 0


def test_an_adapter_to_start_from_is_not_left_aside():
    with pytest.raises(ValidationError, match=r"adapter_name_or_path: a with adapter: none.*merge it first"):
        SFTKeys(**REQUIRED, adapter_name_or_path="a")
    assert SFTKeys(**REQUIRED, adapter_name_or_path="a", adapter="lora").adapter_name_or_path == "a"


@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "v_proj"]])
def test_a_learning_rate_of_embeddings_that_no_adapter_trains_is_refused(target):
    keys = REQUIRED | {"adapter": "lora", "lora_target": target, "embedding_lr_scale": 0.5}
    with pytest.raises(
        ValidationError, match=r"embedding_lr_scale: 0.5 with adapter: lora.*neither embedding nor head"
    ):
        SFTKeys(**keys)
    for trained in ({"lora_modules_to_save": ["lm_head"]}, {"added_tokens": ["<a>"]}, {"adapter_name_or_path": "a"}):
        assert SFTKeys(**keys, **trained).embedding_lr_scale == 0.5


@pytest.mark.parametrize("path", ["/data/rows.jsonl", "./rows.csv", "s3://bucket/rows.jsonl"])
def test_a_file_has_no_splits(path):
    with pytest.raises(
        ValueError, match=r"split: train\[:5\] of a file, which has no splits; take it out, and set limit"
    ):
        DatasetKeys(path=path, split="train[:5]")
    assert DatasetKeys(path="org/name", split="train[:5]").split == "train[:5]"
