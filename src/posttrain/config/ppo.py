"""The keys of PPO with a critic. No torch here."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import model_validator

from posttrain.config.knob import knob
from posttrain.config.rl import PolicyGradientKeys
from posttrain.names import STAGE

# fmt: off
# One key a line: the tables below are read down, not across.


class PPOKeys(PolicyGradientKeys):
    """PPO: RL in which a critic, trained beside the policy, says how much of the reward was to be expected at each token."""

    num_generations: int = knob(1, "Completions per prompt; one is enough, for the baseline is the critic's.", ge=1, also="group_size, n_samples_per_prompt (OpenRLHF)")
    num_prompts_per_step: int = knob(64, "Prompts per generation batch, over all processes.", ge=1)
    kl_in_reward: bool = knob(True, "Put the KL that beta weighs into the reward of each token (k1), as in arXiv 2203.02155; false puts it into the loss.", also="use_kl_in_reward (verl)")
    epsilon: float = knob(0.2, "Clip range below 1: the importance ratio is clipped at 1 - epsilon.", gt=0, also="cliprange (TRL), eps_clip (OpenRLHF)")
    epsilon_high: float | None = knob(None, "Clip range above 1; null means epsilon.", gt=0, example=0.28)
    gamma: float = knob(1.0, "Discount of a reward per token that it comes later.", gt=0, le=1)
    gae_lambda: float = knob(0.95, "λ of generalised advantage estimation: 1 trusts the rewards alone (Monte-Carlo), 0 the critic's next value.", ge=0, le=1, also="lam (TRL, verl), lambd (OpenRLHF)")
    value_model: str | None = knob(None, "The critic to begin with: a reward model's folder, or the `critic/` that a stage of ppo left; `stage:reward_model` or `stage:2` is that of an earlier stage of the pipeline; null is base_model under a value head that begins at 0. It has the policy's tokenizer, and is trained whole.", also="value_model_path (TRL), critic_pretrain (OpenRLHF)", example="runs/rm/model")
    critic_learning_rate: float = knob(1e-5, "Peak learning rate of the critic; its schedule has the shape of the policy's.", gt=0)
    critic_warmup_steps: int = knob(0, "First steps, in which the critic is trained and the policy is not.", ge=0, also="critic_warmup (verl), freezing_actor_steps (OpenRLHF)")
    vf_coef: float = knob(0.5, "Weight of the value loss. The critic has its own optimizer, so with AdamW it matters where max_grad_norm clips.", gt=0)
    cliprange_value: float | None = knob(0.2, "How far a value may move from what it was when its batch was sampled before its loss is clipped; null does not clip.", gt=0, also="value_clip (OpenRLHF)")

    @property
    def critic(self) -> CriticKeys:
        """How the critic is loaded and trained: as the policy, but whole, and at its own rate."""
        own = self.value_model is None or self.value_model.startswith(STAGE)  # that of a stage is made of the base, and as large
        start = {"base_model": self.base_model, "revision": self.revision} if own else {"base_model": self.value_model, "revision": None, "tokenizer_name_or_path": None, "init_seed": None}
        return CriticKeys.model_construct(**{**dict(self), **_TRAINED_WHOLE, **start, "learning_rate": self.critic_learning_rate})

    @model_validator(mode="after")
    def _has_what_a_critic_can_judge(self) -> PPOKeys:
        refused = {
            "teachers": ("a critic's advantages are not shared out by teachers: use grpo or distill", bool(self.teachers)),
            "dynamic_sampling with num_generations: 1": ("there is no group whose rewards could differ: set num_generations to 2 or more", self.dynamic_sampling and self.num_generations == 1),
        }
        for got, (why, found) in refused.items():
            if found:
                raise ValueError(f"{got} in ppo: {why}")
        return self


_TRAINED_WHOLE: dict[str, Any] = {
    "adapter": "none", "adapter_start": "fresh", "adapter_name_or_path": None, "load_in_4bit": False, "load_in_8bit": False, "layer_offloading": False, "unfrozen_parameters": [], "unfrozen_layers": 0, "unfrozen_layers_spread": False,
}


class CriticKeys(PPOKeys):
    """Those of the critic as a model in training; see `PPOKeys.critic`."""

    is_reward_model: ClassVar[bool] = True
