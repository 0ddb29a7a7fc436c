"""The keys of preference optimisation. Names are TRL's where it has them. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from posttrain.config.datasets import RowKind
from posttrain.config.knob import Keys, knob
from posttrain.config.stages import TrainKeys

# fmt: off
# One key a line: the tables below are read down, not across.


WITHOUT_REFERENCE = frozenset({"simpo", "cpo", "orpo", "sft"})
"""Preference losses whose beta pulls to no reference."""


PreferenceLoss = Literal[
    "sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sigmoid_norm", "dpop", "sft", "simpo", "cpo", "orpo", "kto",
]  # fmt: skip


class PreferenceKeys(Keys):
    """What stages have whose loss compares two answers to a prompt."""

    loss_type: PreferenceLoss | list[PreferenceLoss] = knob("sigmoid", "Preference loss, by its row in the table, or several that are added up (MPO).", also="pref_loss (LLaMA-Factory)")
    loss_weights: list[float] | None = knob(None, "Weight of each loss in loss_type; null means 1 each.", example=[0.8, 0.2, 1.0])
    beta: float = knob(0.1, "Strength of the pull to the reference.", ge=0, also="pref_beta (LLaMA-Factory), rl_beta (Axolotl)")
    label_smoothing: float = knob(0.0, "Assumed share of flipped pairs (sigmoid: cDPO; robust; exo_pair; aot; simpo; cpo).", ge=0, lt=0.5, also="dpo_label_smoothing (Axolotl, LLaMA-Factory)")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = knob("reverse_kl", "What beta holds the policy to its reference by (f-DPO, arXiv 2309.16240), for losses on differences of rewards.")
    f_alpha_divergence_coef: float = knob(0.5, "α of alpha_divergence, as in TRL: 0 is the forward KL, 1 the reverse KL.", ge=0, le=1)
    ld_alpha: float | None = knob(None, "How much the tokens of an answer count that are beyond the length of the other one (LD-DPO, arXiv 2409.06411); null is 1.", ge=0, le=1, example=0.5)
    dpop_lambda: float = knob(50.0, "DPOP's λ: weight of what a chosen answer lost in log-prob (arXiv 2402.13228).", ge=0)
    discopop_tau: float = knob(0.05, "Temperature of DiscoPOP's mixture.", gt=0)
    simpo_gamma: float = knob(0.5, "Target margin of SimPO (its γ; beta is not applied to it).", ge=0)
    cpo_alpha: float = knob(1.0, "Weight of CPO's likelihood term; CPO-SimPO is simpo with rpo_alpha.", ge=0)
    rpo_alpha: float = knob(0.0, "Weight of a token-mean SFT term on the chosen answers, added to any loss on pairs (RPO).", ge=0, also="pref_ftx (LLaMA-Factory)")

    @field_validator("loss_type")
    @classmethod
    def _names_losses(cls, loss_type: str | list[str]) -> str | list[str]:
        if not loss_type or (isinstance(loss_type, list) and len(set(loss_type)) < len(loss_type)):
            raise ValueError(f"{loss_type} does not name each loss once; expected one or more, weighed by loss_weights")
        return loss_type

    @property
    def losses(self) -> tuple[str, ...]:
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    @property
    def pull(self) -> float:
        return 0.0 if WITHOUT_REFERENCE.issuperset(self.losses) else self.beta


class DPOKeys(PreferenceKeys, TrainKeys):
    """Preference optimisation: DPO and its family."""

    allow_raw_base: bool = knob(False, "Start on a base that was never tuned to answer.")
    learning_rate: float = knob(1e-6, "Peak learning rate.", gt=0, also="lr", example=1e-6)
    use_weighting: bool = knob(False, "Weigh each pair by how likely the policy itself is to sample it (WPO, arXiv 2406.11827).", also="dpo_use_weighting (Axolotl)")
    row_weights: bool = knob(False, "Multiply a pair's losses by its column `weight` (1 where a row has none).")
    margin_coef: float = knob(0.0, "How much of a pair's column `margin` its reward margin has to exceed (ODPO's α, arXiv 2402.10571); 0 reads none.", ge=0, example=1.0)
    desirable_weight: float = knob(1.0, "KTO: weight of desirable rows.", ge=0, also="kto_desirable_weight (Axolotl), kto_chosen_weight (LLaMA-Factory)")
    undesirable_weight: float = knob(1.0, "KTO: weight of undesirable rows.", ge=0, also="kto_undesirable_weight (Axolotl), kto_rejected_weight (LLaMA-Factory)")
    precompute_ref_log_probs: bool | Literal["auto"] = knob("auto", "Score all rows under the reference once, before training, and keep the log-probs. `auto`: for full fine-tuning, where a frozen copy is the alternative; an adapter is simply switched off.")

    sync_ref_model: bool = knob(False, "Let the reference follow the policy (TR-DPO, arXiv 2404.09656); for full fine-tuning, which then keeps a copy as reference.")
    ref_model_mixup_alpha: float = knob(0.6, "Share of the policy in the reference each time it follows; 1 replaces it.", gt=0, le=1)
    ref_model_sync_steps: int = knob(512, "Optimizer steps between two times.", ge=1)

    @model_validator(mode="after")
    def _whole_rows_are_weighed(self) -> DPOKeys:
        if self.use_weighting and self.sharding.group_size > 1:
            raise ValueError(f"use_weighting: true with {self.sharding.group_text}, where no process has whole distributions; set one of them back")
        return self

    @model_validator(mode="after")
    def _a_reference_can_follow(self) -> DPOKeys:
        refused = {
            f"adapter: {self.adapter}": (self.adapter != "none", "the reference is the model under the adapter; set adapter: none"),
            "precompute_ref_log_probs: true": (self.precompute_ref_log_probs is True, "kept log-probs would be an earlier reference's; set it to auto"),
            f"loss_type: {self.loss_type}": (WITHOUT_REFERENCE.issuperset(self.losses), "it has no reference; take sync_ref_model out"),
        }
        for beside, (found, why) in refused.items():
            if self.sync_ref_model and found:
                raise ValueError(f"sync_ref_model: true with {beside}: {why}")
        return self

    @property
    def row_kind(self) -> RowKind:
        return "labels" if "kto" in self.losses else "pairs"

    @property
    def may_start_raw(self) -> bool:
        return self.allow_raw_base

    @property
    def holds_reference(self) -> bool:
        """`auto` computes the log-probs of pairs once where the alternative is a copy; those of KTO cannot be known before."""
        kept = self.row_kind == "pairs" and bool(self.precompute_ref_log_probs) and not self.sync_ref_model
        return not WITHOUT_REFERENCE.issuperset(self.losses) and not kept
