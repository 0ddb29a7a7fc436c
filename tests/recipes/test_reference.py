import json
import math
import shutil

import numpy as np
import pytest
import torch

from posttrain.config.preference import DPOKeys
from posttrain.config.stages import ModelKeys
from posttrain.models.load import freeze_reference, load_policy
from posttrain.recipes import reference
from posttrain.recipes.reference import KEPT, _found, _packed
from posttrain.recipes.run.stop import StopFlag


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("precompute", ["auto", True])
def test_the_first_dpo_loss_is_ln_2_whatever_the_init_moved_out_of_the_base(init, precompute, train):
    options = {"adapter": "lora", "lora_r": 4, "init_lora_weights": init, "precompute_ref_log_probs": precompute}
    folder = train("dpo", max_steps=2, **options)
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    [export] = [event for event in events if event["kind"] == "export"]
    assert export["max_logit_difference"] < 1e-4 * export["max_logit"]


def _losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_reference_that_becomes_the_policy_after_every_step_leaves_each_loss_at_ln_2(train):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "learning_rate": 1e-3, "max_steps": 3}
    assert _losses(train("dpo", name="all", ref_model_mixup_alpha=1.0, **options)) == pytest.approx(
        [math.log(2)] * 3, abs=1e-6
    )
    half = _losses(train("dpo", name="half", ref_model_mixup_alpha=0.5, **options))
    assert half[0] == pytest.approx(math.log(2), abs=1e-6) and abs(half[2] - math.log(2)) > 1e-5


def test_a_resumed_run_has_the_reference_that_it_had_moved(train, runner):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2, "learning_rate": 1e-3, "save_steps": 3}
    whole = train("dpo", name="whole", max_steps=5, **options)
    (whole / "result.json").unlink()
    losses, weights = _losses(whole), runner.weights(whole)
    for late in (whole / "checkpoints").glob("*00005"):
        shutil.rmtree(late)
    again = train("dpo", name="whole", max_steps=5, **options)
    assert _losses(again) == losses
    assert all(torch.equal(weights[name], tensor) for name, tensor in runner.weights(again).items())


def test_following_mixes_weight_by_weight(make_local_model):
    policy = load_policy(ModelKeys(base_model=str(make_local_model("qwen3"))))
    freeze_reference(policy)
    before = [p.detach().clone() for p in policy.model.parameters()]
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(1.0)
    policy.follow(0.25)
    for kept, start in zip(policy.frozen.model.parameters(), before, strict=True):
        torch.testing.assert_close(kept, start + 0.25)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ({"adapter": "lora"}, "set adapter: none"),
        ({"precompute_ref_log_probs": True}, "set it to auto"),
        ({"loss_type": "simpo"}, "take sync_ref_model out"),
    ],
)
def test_what_no_reference_can_follow_beside_is_refused(beside, message):
    with pytest.raises(ValueError, match=f"sync_ref_model: true with .*{message}"):
        DPOKeys(base_model="x", datasets=[{"path": "x"}], sync_ref_model=True, **beside)


def _kept(folder):
    with np.load(folder / KEPT) as kept:
        return kept["logp"]


@pytest.mark.parametrize("options", [{"max_steps": 1}, {"max_steps": -1, "num_train_epochs": 0.25}])
def test_only_rows_that_are_trained_are_scored_before_the_first_step(options, train):
    folder = train("dpo", per_device_train_batch_size=2, **options)
    steps = json.loads((folder / "result.json").read_text())["steps"]
    assert len(_kept(folder)) == 2 * steps


def test_a_resumed_run_scores_no_row_again_and_one_that_was_cut_only_the_rest(train, runner, caplog):
    whole = train("dpo", name="whole", max_steps=4, save_steps=2)
    losses, first = _losses(whole), _kept(whole)
    (whole / "result.json").unlink()
    shutil.rmtree(next((whole / "checkpoints").glob("*00004")))
    with caplog.at_level("INFO"):
        assert _losses(train("dpo", name="whole", max_steps=4, save_steps=2)) == losses
    assert f"log-probs of {len(first)} rows computed once, {len(first)} of them before" in caplog.text

    with np.load(whole / KEPT) as kept:
        cut = {"of": kept["of"], "logp": np.where(np.arange(len(first))[:, None] < 1, kept["logp"], np.nan)}
    np.savez(whole / KEPT, **cut)
    (whole / "result.json").unlink()
    shutil.rmtree(whole / "checkpoints")
    assert _losses(train("dpo", name="whole", max_steps=4, save_steps=2)) == losses
    assert np.array_equal(_kept(whole), first)


def test_a_wish_to_stop_while_the_reference_scores_is_heard_and_the_next_start_goes_on(
    runner, model_dir, data_dir, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(reference, "_ROWS_PER_PASS", 2)
    monkeypatch.setattr(reference, "_PASSES_AT_ONCE", 2)
    flag, scored, score = StopFlag(), [], reference._pass

    def scores_until_a_stop(policy, rows, ld_alpha):
        scored.extend(rows)
        if len(scored) == 4:
            flag._event.set()
        return score(policy, rows, ld_alpha)

    monkeypatch.setattr(runner, "StopFlag", lambda: flag)
    monkeypatch.setattr(reference, "_pass", scores_until_a_stop)
    keys = runner.keys_of("dpo", model_dir("qwen3"), data_dir, max_steps=3)
    assert runner.run_stage("dpo", tmp_path, keys) is None
    assert np.isfinite(_kept(tmp_path)).all(1).sum() == len(scored) == 4
    flag._event.clear()
    with caplog.at_level("INFO"):
        assert runner.run_stage("dpo", tmp_path, keys).steps == 3
    assert "of 12 rows computed once, 4 of them before" in caplog.text


def test_log_probs_of_another_model_or_other_rows_are_not_taken(train, other_weights, caplog):
    folder = train("dpo", name="one", max_steps=1)
    for change in ({"base_model": str(other_weights)}, {"ld_alpha": 0.5}, {"seed": 7}):
        caplog.clear()
        (folder / "result.json").unlink()
        shutil.rmtree(folder / "checkpoints")
        with caplog.at_level("INFO"):
            losses = _losses(train("dpo", name="one", max_steps=1, **change))
        assert "of them before" not in caplog.text
        assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    (folder / KEPT).write_bytes(b"torn")
    (folder / "result.json").unlink()
    with caplog.at_level("WARNING"):
        train("dpo", name="one", max_steps=1, **change)
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw.replace(b"PK\x01\x02", b"PK\x01\x02\xff\xff\xff\xff"),
    ],
)
def test_a_file_of_log_probs_that_is_damaged_is_not_taken(damage, tmp_path, caplog):
    raw = _packed(np.zeros((4, 2), np.float32), "sha256:of")
    (tmp_path / KEPT).write_bytes(raw)
    assert np.isfinite(_found(tmp_path / KEPT, "sha256:of", 4)).all()
    (tmp_path / KEPT).write_bytes(damage(raw))
    assert np.isnan(_found(tmp_path / KEPT, "sha256:of", 4)).all() and "cannot be read" in caplog.text
