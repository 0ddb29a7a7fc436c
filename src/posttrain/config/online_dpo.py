"""The keys of online DPO: preferences among the policy's own completions, by their rewards. No torch here."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.knob import knob
from posttrain.config.preference import PreferenceKeys
from posttrain.config.rl import RewardedKeys

# fmt: off
# One key a line: the tables below are read down, not across.


class OnlineDPOKeys(PreferenceKeys, RewardedKeys):
    """Online DPO: of each prompt's completions the best and the worst are a pair, and the policy learns to prefer the one to the other."""

    beta: float = knob(0.1, "Strength of the pull to the reference.", gt=0)
    num_generations: int = knob(2, "Completions per prompt (G), of which the best and the worst are a pair.", ge=2, also="group_size")
    temperature: float = knob(1.0, "Sampling temperature; the loss is that of `dpo`, which knows none.", gt=0)

    @model_validator(mode="after")
    def _has_pairs_to_prefer_by(self) -> OnlineDPOKeys:
        refused = {
            "loss_type: kto": ("it reads labels of single answers, and what is sampled here is paired: take sigmoid, or train a dpo stage on labelled rows", "kto" in self.losses),
            "loss_type: sft": ("it imitates the chosen answer and compares it with nothing: name it beside a loss on pairs, or make rows by `posttrain data synth` for sft", self.losses == ("sft",)),
            "teachers": ("a preference is not shared out by teachers: use grpo or distill", bool(self.teachers)),
        }
        for got, (why, found) in refused.items():
            if found:
                raise ValueError(f"{got} in online_dpo: {why}")
        return self

    @model_validator(mode="after")
    def _compares_nothing_with_its_sampler(self) -> OnlineDPOKeys:
        for name, value in self.rollout.given("exact", "routed_experts"):
            raise ValueError(f"rollout.{name}: {value} in online_dpo, whose loss compares nothing with the sampler's log-probs; remove it")
        return self
