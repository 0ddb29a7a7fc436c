"""The keys of distillation: what a policy learns from teachers, on its own completions or on given answers. No torch here."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.datasets import RowKind
from posttrain.config.knob import knob
from posttrain.config.rl import SamplingKeys
from posttrain.config.rollout import OF_TRAINING
from posttrain.config.teachers import DistillLoss, TeacherKeys

# fmt: off
# One key a line: the tables below are read down, not across.


class DistillKeys(SamplingKeys):
    """Distillation from teachers: on-policy (OPD, GKD), off-policy, and of the policy itself under a richer prompt."""

    teachers: list[TeacherKeys] = knob(..., "Models to learn from.", min_length=1, example=[{"model": "runs/teacher/model"}])
    loss_type: DistillLoss = knob("opd", "What is made small at each token: `opd` is the reverse KL told from the sampled token alone, `forward_kl`, `reverse_kl` and `jsd` (GKD) sum over the vocabulary.")
    jsd_beta: float = knob(0.5, "GKD's β: jsd is β·KL(teacher‖mixture) + (1 - β)·KL(policy‖mixture).", gt=0, lt=1)
    teacher_top_k: int = knob(0, "Let opd sum over so many of the teacher's likeliest tokens, and sample the rest; 0 samples all.", ge=0)
    on_policy_share: float = knob(1.0, "Share of the rows whose answers the policy samples itself (GKD's λ); for the others the answers of the data are taken. Below 1 rows are those of SFT.", ge=0, le=1, also="lmbda (TRL)")
    num_generations: int = knob(4, "Completions per prompt (G).", ge=1, also="group_size")

    @property
    def row_kind(self) -> RowKind:
        return "prompts" if self.on_policy_share == 1 else "examples"

    @model_validator(mode="after")
    def _sampled_losses_need_samples(self) -> DistillKeys:
        if self.loss_type == "opd" and self.on_policy_share < 1:
            raise ValueError(
                f"on_policy_share: {self.on_policy_share:g} with loss_type: opd, which is told from the policy's own samples; set "
                "on_policy_share: 1, or loss_type: jsd, reverse_kl or forward_kl"
            )
        return self

    @model_validator(mode="after")
    def _given_answers_have_no_columns(self) -> DistillKeys:
        asked = [name for teacher in self.teachers for name in ("prompt", "when") if getattr(teacher, name)]
        if asked and self.on_policy_share < 1:
            raise ValueError(
                f"teachers.{asked[0]} with on_policy_share: {self.on_policy_share:g}: rows with answers have no other columns; set "
                f"on_policy_share: 1, or remove {asked[0]}"
            )
        return self

    @model_validator(mode="after")
    def _a_server_gives_no_distribution(self) -> DistillKeys:
        summed = f"teacher_top_k: {self.teacher_top_k}" if self.loss_type == "opd" else f"loss_type: {self.loss_type}"
        if any(teacher.url for teacher in self.teachers) and (self.loss_type != "opd" or self.teacher_top_k):
            raise ValueError(
                f"{summed} with teachers.url: it needs log-probs of tokens by id, and a server caps how many it gives (20 in `posttrain serve`) "
                "and names them by text; set loss_type: opd and teacher_top_k: 0, or give the teacher as a model folder"
            )
        return self

    @model_validator(mode="after")
    def _an_engine_has_something_to_do(self) -> DistillKeys:
        if not self.on_policy_share and self.rollout.engine != "embedded":
            raise ValueError(f"rollout.engine: {self.rollout.engine} does nothing with on_policy_share: 0; remove rollout")
        return self

    @model_validator(mode="after")
    def _samples_from_what_it_trains(self) -> DistillKeys:
        for name, value in self.rollout.given(*OF_TRAINING):
            raise ValueError(
                f"rollout.{name}: {value} in distill, which samples from the weights that it trains and has "
                f"no ratio to correct; remove {name}, or use grpo with teachers"
            )
        return self
