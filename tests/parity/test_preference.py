"""DPO's family and KTO through TRL's trainers and through our recipe."""

import pytest
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from posttrain.config.preference import DPOKeys

SHARED = {"per_device_train_batch_size": 4, "learning_rate": 1e-3}
LOSSES = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {},
    "aot_unpaired": {},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {"beta": 2.0},
}
"""Every loss that TRL and we have, with the options it needs."""
QUICK = ("sigmoid", "ipo", "aot")


def trl_dpo(theirs, data, **config):
    return theirs(DPOTrainer, DPOConfig, data, **{"max_length": 256, "lr_scheduler_type": "linear"} | SHARED | config)


@pytest.mark.parametrize("loss_type", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in LOSSES])
def test_every_shared_loss(ours, theirs, rows, assert_parity, loss_type):
    data, options = rows["dpo"][:40], LOSSES[loss_type]
    mine = ours("dpo", DPOKeys, data, loss_type=loss_type, **SHARED, **options)
    assert_parity(mine, trl_dpo(theirs, data, loss_type=loss_type, **options))


VARIANTS = {
    "MPO": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "f-DPO": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "LD-DPO": {"ld_alpha": 0.3},
    "WPO": {"use_weighting": True},
    "TR-DPO": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 2},
}


@pytest.mark.parametrize(
    "variant", [pytest.param(n, marks=() if n == "LD-DPO" else pytest.mark.slow) for n in VARIANTS]
)
def test_what_is_done_to_all_losses(ours, theirs, rows, assert_parity, variant):
    data = rows["dpo"][:40]
    mine = ours("dpo", DPOKeys, data, **SHARED, **VARIANTS[variant])
    assert_parity(mine, trl_dpo(theirs, data, **VARIANTS[variant]))


@pytest.mark.parametrize("precompute", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["live", "precomputed"])
@pytest.mark.parametrize("lora_r", [0, 8], ids=["full", "lora"])
def test_both_references(ours, theirs, rows, assert_parity, precompute, lora_r):
    data = rows["dpo"][:40]
    adapter = {"adapter": "lora", "lora_r": lora_r} if lora_r else {}
    mine = ours("dpo", DPOKeys, data, precompute_ref_log_probs=precompute, **SHARED, **adapter)
    assert_parity(mine, trl_dpo(theirs, data, lora_r=lora_r, precompute_ref_log_probs=precompute))


@pytest.mark.slow
def test_accumulated(ours, theirs, rows, assert_parity):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    data = rows["dpo"][:40]
    assert_parity(ours("dpo", DPOKeys, data, **SHARED | options), trl_dpo(theirs, data, **options))


@pytest.mark.slow
def test_sft_term_does_not_depend_on_accumulation(ours, theirs, rows):
    """On purpose: the token mean is over the whole step. TRL takes it per micro-batch, so 2 × 2 is not 4 × 1 there."""
    data = rows["dpo"][:8]
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = ours("dpo", DPOKeys, data, loss_type="sft", **SHARED).losses
    assert ours("dpo", DPOKeys, data, loss_type="sft", **SHARED | split).losses == pytest.approx(whole, rel=1e-5)
    assert trl_dpo(theirs, data, loss_type="sft").losses == pytest.approx(whole, rel=1e-4)
    assert trl_dpo(theirs, data, loss_type="sft", **split).losses != pytest.approx(whole, rel=1e-3)


def trl_kto(theirs, data, **config):
    return theirs(KTOTrainer, KTOConfig, data, **{"max_length": 256, "lr_scheduler_type": "linear"} | SHARED | config)


@pytest.mark.parametrize("lora_r", [0, pytest.param(8, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_kto(ours, theirs, rows, assert_parity, lora_r):
    data, options = rows["kto"][:48], {"desirable_weight": 1.2, "undesirable_weight": 0.9}
    adapter = {"adapter": "lora", "lora_r": lora_r} if lora_r else {}
    mine = ours("dpo", DPOKeys, data, loss_type="kto", **SHARED, **options, **adapter)
    assert_parity(mine, trl_kto(theirs, data, lora_r=lora_r, **options))


@pytest.mark.slow
def test_kto_reference_point_is_of_the_step(ours, theirs, rows):
    """On purpose: z is the mean over the whole step, before it is clamped at 0. TRL clamps each micro-batch's own mean.

    The first step starts at the reference, where z is 0 on both sides.
    """
    data, split = rows["kto"][:48], {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    mine = ours("dpo", DPOKeys, data, loss_type="kto", **SHARED | split).losses
    trl = trl_kto(theirs, data, **split).losses
    assert mine[0] == pytest.approx(trl[0], rel=1e-5)
    assert mine != pytest.approx(trl, rel=1e-4)
    assert mine == pytest.approx(trl, rel=0.1)
