"""The keys of energy-based fine-tuning: completions that are to match the answers of the rows in a frozen model's features. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from posttrain.config.datasets import RowKind
from posttrain.config.knob import knob
from posttrain.config.rl import SamplingKeys
from posttrain.config.rollout import OF_TRAINING

# fmt: off
# One key a line: the tables below are read down, not across.


class EBFTKeys(SamplingKeys):
    """Energy-based fine-tuning: rows are those of SFT, and what a completion earns is told by the features of the given model (arXiv 2603.12248)."""

    learning_rate: float = knob(1e-6, "Peak learning rate.", gt=0, also="lr", example=1e-6)
    num_generations: int = knob(4, "Completions per prompt (G).", ge=2, also="group_size")
    num_prompts_per_step: int = knob(8, "Rows per step, over all processes; each gives a prompt for every answer in it, or with mode: strided for every anchor.", ge=1)
    mode: Literal["structured", "strided"] = knob("structured", "What a row asks for: `structured` its answers, each whole; `strided` a few tokens from many anchors on, so that running text can be learned from.")
    stride: int = knob(8, "With mode: strided, tokens from one anchor to the next.", ge=1)
    context_length: int = knob(8, "With mode: strided, tokens before the first anchor, at least; a completion goes on from all that stands before its anchor.", ge=1)
    min_completion_prefix: int = knob(0, "With mode: strided, tokens of an answer before its first anchor.", ge=0)
    feature_layers: list[float] = knob([0.25, 0.5, 0.75], "Layers whose states are the features, as shares of the model's depth.", min_length=1)
    embed_method: Literal["last_token", "mean_pooling"] = knob("last_token", "How tokens become the features of a completion: those of its last token, or the mean over its tokens.")
    normalize_layers: bool = knob(False, "Bring each layer's states to one length before they stand behind each other; all of them together always have length 1.")
    use_whitening: bool = knob(True, "Whiten the features within each group of completions. Completions whose features are independent then have a diversity of 0, so that only repeated ones are held against each other.")
    alignment_coef: float = knob(1.0, "Weight of the cosine with the answer's features.", ge=0)
    diversity_coef: float = knob(1.0, "Weight of the likeness to the group's other completions, which is taken off.", ge=0)
    unbiased_baseline: bool = knob(True, "Leave a completion's own likeness to the others out of its baseline, as the paper's code does; false takes 1/(G - 1) of the diversity's gradient away, as Axolotl does. Needs 3 completions.")
    advantage_estimator: Literal["rloo", "group"] = knob("rloo", "Baseline of a completion: the mean of the others' rewards, or of all of the group.")
    scale_rewards: Literal["group", "batch", "none"] = knob("group", "With advantage_estimator: group, what the centred rewards are divided by: the group's std, the step's, nothing.")
    advantage_eps: float = knob(1e-4, "Added to that std; ddof is 1, as in TRL.", ge=0)
    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo"] = knob("dapo", "How tokens add up to a loss; in all else these do not differ here, where every step trains on samples of its own weights.")
    ce_coef: float = knob(0.0, "Weight of the token-mean cross-entropy on the rows of the step (0.03 in the paper's mixture).", ge=0)

    @property
    def row_kind(self) -> RowKind:
        return "examples"

    @property
    def holds_reference(self) -> bool:
        """The features are those of the model that the stage was given."""
        return True

    @field_validator("feature_layers")
    @classmethod
    def _are_shares_of_the_depth(cls, depths: list[float]) -> list[float]:
        for depth in depths:
            if not 0 < depth <= 1:
                raise ValueError(f"{depth:g} is no share of the model's depth; expected numbers above 0, up to 1 (its last layer)")
        return depths

    @model_validator(mode="after")
    def _baseline_has_others(self) -> EBFTKeys:
        if self.unbiased_baseline and self.diversity_coef and self.num_generations < 3:
            raise ValueError(
                f"unbiased_baseline: true with num_generations: {self.num_generations}: a baseline without the completion itself needs two others "
                "that are compared with each other; raise num_generations to 3, or set unbiased_baseline: false or diversity_coef: 0"
            )
        return self

    @model_validator(mode="after")
    def _rows_have_room(self) -> EBFTKeys:
        needed = self.context_length + self.max_completion_length
        if self.mode == "strided" and needed > self.sequence_len:
            raise ValueError(
                f"mode: strided with max_completion_length: {self.max_completion_length} and context_length: {self.context_length} needs rows of "
                f"{needed} tokens, and sequence_len is {self.sequence_len}; lower max_completion_length (8 in the paper), or raise sequence_len"
            )
        return self

    @model_validator(mode="after")
    def _learns_from_features_alone(self) -> EBFTKeys:
        if self.teachers:
            raise ValueError("teachers in ebft, where the given model's features say what a completion is worth: use grpo or distill")
        for name, value in self.rollout.given(*OF_TRAINING):
            raise ValueError(
                f"rollout.{name}: {value} in ebft, which samples from the weights that it trains and has no ratio to correct; remove {name}"
            )
        if self.sharding.group_size > 1:
            raise ValueError(f"{self.sharding.group_text} in ebft, whose features are those of whole sequences; set it to 1")
        return self
