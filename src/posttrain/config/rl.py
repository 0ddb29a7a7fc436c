"""The keys of RL: what is sampled from the policy itself, rewarded, and trained on. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from posttrain.config.datasets import DatasetKeys, RowKind
from posttrain.config.episodes import EpisodeKeys
from posttrain.config.knob import knob
from posttrain.config.rollout import RolloutKeys
from posttrain.config.stages import LearningRateShape, TrainKeys
from posttrain.config.teachers import TeacherAdvantage, TeacherKeys
from posttrain.names import ENVIRONMENT, REWARD_MODEL, reward_name, reward_names

# fmt: off
# One key a line: the tables below are read down, not across.


LossReduction = Literal["token_mean", "sequence_mean_of_token_mean", "prompt_mean_of_token_mean", "sequence_sum_over_constant", "sequence_sum_mean"]


class SamplingKeys(TrainKeys):
    """What stages have that train on completions of the policy itself."""

    allow_raw_base: bool = knob(False, "Start on a base that was never tuned to answer.")
    num_generations: int = knob(8, "Completions per prompt (G).", ge=2, also="group_size")
    num_prompts_per_step: int = knob(8, "Prompts per generation batch, over all processes.", ge=1)
    max_completion_length: int = knob(256, "Longest completion in tokens.", ge=1)
    temperature: float = knob(1.0, "Sampling temperature; the loss uses it too.", gt=0)
    top_p: float = knob(1.0, "Nucleus sampling.", gt=0, le=1)
    top_k: int = knob(0, "Top-k sampling; 0 is off.", ge=0)
    min_p: float = knob(0.0, "Min-p sampling; 0 is off.", ge=0, le=1)
    stop: list[str] = knob([], "Strings that end a completion.", example=["</answer>"])
    rollout_batch_size: int = knob(64, "Completions decoded at once.", ge=1)
    teachers: list[TeacherKeys] = knob([], "Models that say how likely the completions are; `teacher_advantage` of grpo and `loss_type` of distill make use of it.", example=[{"model": "policy", "prompt": "{prompt}\n\nA correct solution: {answer}"}])
    rollout: RolloutKeys = knob(RolloutKeys(), "The engine that samples, and how it is started.", example={"engine": "vllm"})

    def rows_per_step(self, world_size: int) -> int:
        """Completions; how many processes make them does not matter."""
        return self.num_prompts_per_step * self.num_generations

    @property
    def row_kind(self) -> RowKind:
        return "prompts"

    @property
    def of_one_process(self) -> tuple[str, str] | None:
        return super().of_one_process or self.rollout.of_one_process

    @model_validator(mode="after")
    def _runs_its_steps(self) -> SamplingKeys:
        if self.early_stopping_patience:
            raise ValueError(f"early_stopping_patience: {self.early_stopping_patience} where the policy's own completions are trained on: set max_steps, with load_best_model_at_end")
        return self

    @model_validator(mode="after")
    def _a_server_knows_one_temperature(self) -> SamplingKeys:
        if self.temperature != 1 and any(teacher.url for teacher in self.teachers):
            raise ValueError(f"temperature: {self.temperature:g} with teachers.url: a server's log-probs are those of temperature 1; set temperature: 1, or give the teacher as a model folder")
        return self

    @model_validator(mode="after")
    def _teachers_see_whole_sequences(self) -> SamplingKeys:
        if self.sharding.group_size > 1 and self.teachers:
            raise ValueError(f"{self.sharding.group_text} with teachers, which score whole sequences; set it to 1")
        return self

    @model_validator(mode="after")
    def _decodes_whole_rows(self) -> SamplingKeys:
        if self.sharding.group_size > 1 and self.rollout.engine == "embedded" and self.rollout.transfer == "shared":
            raise ValueError(f"{self.sharding.group_text} with rollout.transfer: shared, which decodes whole rows on each process; set rollout.transfer: copy")
        return self

    @model_validator(mode="after")
    def _samples_from_4_bits_or_16(self) -> SamplingKeys:
        if self.load_in_8bit:
            raise ValueError("load_in_8bit: true where the policy samples, which engines here do from 4 bits or from 16; set adapter: qlora, or load_in_8bit: false")
        return self

    @model_validator(mode="after")
    def _exact_layers_are_as_they_are(self) -> SamplingKeys:
        if self.torch_compile is True and self.rollout.exact:
            raise ValueError("torch_compile: true with rollout.exact: true, which computes in tiles of its own; set one of them to false")
        if self.torch_compile is True and (how := self.rollout.routed_experts) != "off":
            raise ValueError(f"torch_compile: true with rollout.routed_experts: {how}, which looks into the layers; set torch_compile: false, or routed_experts: off")
        return self

    @property
    def holds_reference(self) -> bool:
        return any(teacher.model == "start" for teacher in self.teachers)

    @property
    def may_start_raw(self) -> bool:
        return self.allow_raw_base


class RLKeys(SamplingKeys):
    """What stages have whose completions are rewarded."""

    steps_per_generation: int = knob(1, "Optimizer steps that one generation batch is split into.", ge=1)
    num_iterations: int = knob(1, "Passes over each generation batch.", ge=1)
    reward_funcs: list[str] = knob(..., "Rewards: `file.py:function` relative to the YAML, a name of the library, `model:FOLDER` of a reward model (`model:stage:reward_model` of one that an earlier stage of the pipeline trains), `judge:FILE.yaml` of a judge.", min_length=1, example=["rewards.py:correct"])
    reward_weights: list[float] | None = knob(None, "Weight of each reward function; null means 1 each.", example=[1.0, 0.5])
    reward_kwargs: dict[str, dict[str, Any]] = knob({}, "Options of rewards: name in reward_funcs → its options. A process reward model (`model:FOLDER` by the folder's name, `model:stage:2` by the stage's kind or place as it is named there) has `aggregate`, what the scores of an answer's steps become (min, product, last or mean; min), and `step_separator`, what cuts it into steps (what it was trained with).")
    reward_timeout_s: float = knob(10.0, "Deadline of one completion's reward; later is unscored.", gt=0)
    reward_workers: int = knob(1, "Worker processes that score.", ge=1)
    keep_rollouts: bool = knob(False, "Keep prompts, completions and rewards in the stage's folder, for `posttrain rewards rescore`.")
    beta: float = knob(0.0, "Weight of the KL to the reference; 0 keeps no reference.", ge=0)
    kl_target: float | None = knob(None, "Steer beta, from its value on, so that the KL to the reference stays near so many nats per token.", gt=0, example=0.05)
    reward_check: Literal["require", "off"] = knob("require", "`off` trains without a reward certificate, and what it makes cannot be promoted.")
    reward_check_steps: int = knob(50, "Steps between checks of the rewards on live samples and canary prompts, and of judges at servers against their first verdicts; 0 is off.", ge=0)
    ptx_datasets: list[DatasetKeys] = knob([], "Supervised rows that are trained on beside the rollouts, so that what they teach is not unlearned (PPO-ptx, arXiv 2203.02155 eq. 2).", also="pretrain_data (OpenRLHF)", example=[{"path": "data/sft.jsonl"}])
    ptx_coef: float = knob(0.05, "Weight of the token-mean cross-entropy of ptx_datasets, divided by its own tokens.", ge=0)
    ptx_rows_per_step: int = knob(8, "Rows of ptx_datasets in an optimizer step, over all processes.", ge=1)

    def with_rewards(self, specs: Sequence[str | None]) -> Self:
        """The keys with these rewards in place of `reward_funcs`, None for none; weights and options go along."""
        kept = [place for place, spec in enumerate(specs) if spec is not None]
        named = [spec for spec in specs if spec is not None]
        before, weights = reward_names(self.reward_funcs), self.reward_weights
        now_called = dict(zip([before[place] for place in kept], reward_names(named), strict=True))
        options = {now_called[name]: given for key, given in self.reward_kwargs.items() if (name := reward_name(key)) in now_called}
        kept_weights = None if weights is None else [weights[place] for place in kept]
        return self.model_copy(update={"reward_funcs": named, "reward_weights": kept_weights, "reward_kwargs": options})

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps from one generation batch to the next."""
        return self.steps_per_generation * self.num_iterations

    def rows_per_step(self, world_size: int) -> int:
        return super().rows_per_step(world_size) // self.steps_per_generation

    @property
    def pull(self) -> float:
        return self.beta

    @property
    def holds_reference(self) -> bool:
        return self.pull > 0 or super().holds_reference

    @model_validator(mode="after")
    def _prompts_split_evenly(self) -> RLKeys:
        if self.num_prompts_per_step % self.steps_per_generation:
            raise ValueError(
                f"num_prompts_per_step={self.num_prompts_per_step} is not divisible by "
                f"steps_per_generation={self.steps_per_generation}; groups are not split over optimizer steps"
            )
        return self

    @model_validator(mode="after")
    def _one_weight_per_reward(self) -> RLKeys:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights has {len(self.reward_weights)} entries for {len(self.reward_funcs)} reward_funcs; give one each"
            )
        return self

    @model_validator(mode="after")
    def _kl_can_be_steered(self) -> RLKeys:
        if self.kl_target is not None and self.beta and not self.pull:
            raise ValueError(f"kl_target steers beta by the KL to the reference, and beside beta: {self.beta:g} the loss_type here keeps none; remove kl_target, or take a loss_type with a reference, e.g. sigmoid")
        if self.kl_target is not None and not self.pull:
            raise ValueError("kl_target steers beta, which is 0 (no reference is kept); set beta to its starting value, e.g. 0.01")
        return self


class RewardedKeys(RLKeys, EpisodeKeys):
    """What stages have that train on rewarded completions, whatever their loss makes of the rewards."""

    validated: ClassVar[tuple[str, ...]] = ("reward",)

    learning_rate: float = knob(1e-6, "Peak learning rate.", gt=0, also="lr", example=1e-6)
    lr_scheduler_type: LearningRateShape = knob("constant", "Shape of the schedule after the warmup; `wsd` holds, then decays over the last fifth.", also="lr_scheduler (Axolotl)")
    max_steps: int = knob(200, "Optimizer steps; -1 lets num_train_epochs decide.", ge=-1)
    mask_truncated_completions: bool = knob(False, "Leave truncated completions out of the loss.")
    dynamic_sampling: bool = knob(False, "Replace groups whose rewards are all equal by freshly sampled ones (DAPO).")
    dynamic_sampling_max_rounds: int = knob(4, "Refill rounds before the step goes on with fewer groups.", ge=1)
    thinking_budget: int | None = knob(None, "Tokens of a completion after which a thought that has not ended is interrupted: `interruption` is put in, without a gradient, and the answer is sampled behind it; null never.", ge=1, example=12288)
    thinking_budget_spread: int = knob(0, "Tokens by which a completion's thinking_budget may be smaller, at random (2000 of 12000 in ScaleRL).", ge=0)
    interruption: str = knob("Okay, time is up. Let me stop thinking and formulate a final answer now. </think>", "What interrupts a thought. One has ended where the completion holds the last word of it.", min_length=1)
    cast_lm_head_to_fp32: bool = knob(False, "Multiply the head's matrix in float32 where the model computes in bfloat16, in training and in the embedded engine; a server of vLLM has its own.")
    no_resampling_pass_rate: float | None = knob(None, "Ask a prompt no more in later epochs once the mean reward of its completions reached so much (no-positive-resampling of ScaleRL, 0.9 there, for rewards of 0 and 1); null asks all.", gt=0, example=0.9)
    soft_overlong_cache: int = knob(0, "Length in tokens of DAPO's soft overlong penalty before max_completion_length; 0 is off.", ge=0)
    missing_eos_penalty: float | None = knob(None, "Taken off the reward of a completion that was cut at max_completion_length; null is nothing.", gt=0, example=1.0)

    @property
    def asks_trainer(self) -> bool:
        """Whether the trainer says again how likely a new completion is, beside the sampler."""
        return False

    @property
    def asks_reference(self) -> bool:
        """Whether the reference says how likely a new completion is."""
        return False

    @property
    def pays_kl(self) -> bool:
        """Whether the KL to the reference is taken off the reward."""
        return False

    @model_validator(mode="after")
    def _thoughts_leave_room_for_an_answer(self) -> RewardedKeys:
        budget = self.thinking_budget
        if budget is None:
            return self
        if budget >= self.max_completion_length:
            raise ValueError(f"thinking_budget: {budget} with max_completion_length: {self.max_completion_length} interrupts nothing; expected less")
        if self.thinking_budget_spread >= budget:
            raise ValueError(f"thinking_budget_spread: {self.thinking_budget_spread} with thinking_budget: {budget}; expected less, for a thought has a token")
        if not self.interruption.split():
            raise ValueError("interruption: only blanks; expected a phrase whose last word ends a thought")
        if self.plays or self.stop:
            raise ValueError(f"thinking_budget with {'stop' if self.stop else 'env or tools'}: completions that are sampled in two parts are not proven there; remove one of them")
        return self

    @model_validator(mode="after")
    def _episodes_are_played_where_they_are_proven(self) -> RewardedKeys:
        rollout = self.rollout
        refused = {
            f"rollout.max_staleness: {rollout.max_staleness}": ("rollout.max_staleness: 0", rollout.max_staleness > 0),
            f"rollout.engine: {rollout.engine}": ("embedded or vllm", rollout.engine not in ("embedded", "vllm")),
            "teachers": ("a stage without teachers", bool(self.teachers)),
            self.sharding.group_text: (f"{self.sharding.group_key}: 1", self.sharding.group_size > 1),
        }
        for beside, (instead, found) in refused.items():
            if found and self.plays:
                raise ValueError(f"{'env' if self.env else 'tools'} with {beside}: episodes are not proven there yet; use {instead}")
        return self


class PolicyGradientKeys(RewardedKeys):
    """What stages have that train on the likelihood of completions, weighted by what they were worth."""

    entropy_coef: float = knob(0.0, "Weight of an entropy bonus.", ge=0)
    entropy_target: float | None = knob(None, "Steer an entropy bonus, besides entropy_coef, that grows while the entropy is below so many nats per token.", gt=0, example=0.2)
    kl_estimator: Literal["k1", "k2", "k3"] = knob("k3", "Estimator of the KL that beta weighs (Schulman 2020).")
    kl_reduction: LossReduction | None = knob(None, "How the KL in the loss adds up over tokens; null takes that of the rest of the loss.", example="token_mean")
    kl_in_reward: bool = knob(False, "Put the KL that beta weighs into the reward instead of the loss.")
    use_bias_correction_kl: bool = knob(True, "Multiply the KL in the loss by the importance ratio, as TRL and DeepSeek-V3.2 do: its gradient is then that of the KL, also off-policy.")
    epsilon: float = knob(0.2, "Clip range below 1: the importance ratio is clipped at 1 - epsilon. For gmpo the range of its logarithm (0.4 in the paper), for dppo that of the token's probability.", gt=0)
    epsilon_high: float | None = knob(None, "Clip range above 1; null means epsilon. For cispo the cap on the ratio itself; null means 5.", gt=0, example=0.28)
    delta: float | None = knob(None, "Upper bound of the unclipped ratio (two-sided clipping); null is off.", gt=1, example=4.0)
    importance_sampling_correction: Literal["auto", "off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"] = knob("auto", "Correction between sampler and trainer log-probs; `geometric_mask` leaves out sequences whose ratio per token is outside 1/importance_sampling_cap … importance_sampling_cap; `auto` is off for the embedded engine with max_staleness 0, which needs none, and token_truncate for any other.", also="vllm_importance_sampling_mode (TRL)")
    off_policy_mask_threshold: float | None = knob(None, "Leave a completion with a negative advantage out of the loss where the policy has become less likely to give it by more than so many nats per token (DeepSeek-V3.2); null is off.", gt=0, example=0.5)
    top_entropy_quantile: float = knob(1.0, "Give a policy gradient only to so large a share of an optimizer step's tokens, those at which the policy is least certain (0.2 in arXiv 2506.01939); 1 is all. Costs a forward pass more.", gt=0, le=1, example=0.2)
    allow_uncorrected: bool = knob(False, "Let importance_sampling_correction be off with an engine whose log-probs are not the trainer's.")
    importance_sampling_cap: float = knob(3.0, "Upper bound of the weights of importance_sampling_correction.", gt=1, also="vllm_importance_sampling_cap (TRL), vllm_importance_sampling_clip_max (TRL)")
    credit: Literal["episode", "turn", "step"] = knob("episode", "Which tokens a reward is for: all of the episode; with `turn`, of stages with an env, those up to the turn at which the environment paid it (return-to-go; arXiv 2402.03300 sec. 4.1.3); with `step` those up to the end of the step whose score by the process reward model among reward_funcs it is (the paper's process supervision). All other rewards are the last turn's, or the last step's.")

    @property
    def selects_tokens(self) -> bool:
        return self.top_entropy_quantile < 1

    @property
    def asks_trainer(self) -> bool:
        return self.importance_sampling_correction != "off"

    @property
    def asks_reference(self) -> bool:
        return self.beta > 0

    @property
    def pays_kl(self) -> bool:
        return self.kl_in_reward and self.beta > 0

    @model_validator(mode="after")
    def _turns_are_paid_by_an_environment(self) -> PolicyGradientKeys:
        if self.credit == "turn" and not (self.env and self.reward_funcs.count(ENVIRONMENT) == 1):
            named = "no env" if not self.env else f"reward_funcs: [{', '.join(self.reward_funcs)}]"
            raise ValueError(
                f"credit: turn with {named}: what a turn earns is what the environment pays for it; set env, and name `{ENVIRONMENT}` once in "
                "reward_funcs, or set credit: episode"
            )
        return self

    @property
    def paying_step(self) -> int:
        """Of `reward_funcs` the place of that which pays by turn or step, where credit is by these."""
        return next(
            place for place, spec in enumerate(self.reward_funcs)
            if (spec.startswith(REWARD_MODEL) if self.credit == "step" else spec == ENVIRONMENT)
        )  # fmt: skip

    @model_validator(mode="after")
    def _steps_are_paid_by_one_model(self) -> PolicyGradientKeys:
        models = sum(spec.startswith(REWARD_MODEL) for spec in self.reward_funcs)
        if self.credit == "step" and (models != 1 or self.env):
            named = "env" if self.env else f"{models} times model: in reward_funcs"
            raise ValueError(f"credit: step with {named}: one process reward model says what the steps of an answer are worth; name one `model:FOLDER`, without env, or set credit: episode")
        return self

    @model_validator(mode="before")
    @classmethod
    def _correction_is_chosen(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("importance_sampling_correction", "auto") == "auto":
            chosen = "off" if _samples_as_the_trainer_scores(values.get("rollout")) else "token_truncate"
            return {**values, "importance_sampling_correction": chosen}
        return values

    @model_validator(mode="after")
    def _correction_is_wanted(self) -> PolicyGradientKeys:
        off = self.importance_sampling_correction == "off" and not self.allow_uncorrected
        if off and not _samples_as_the_trainer_scores(self.rollout):
            stale = f"rollout.max_staleness: {self.rollout.max_staleness}"
            beside = stale if self.rollout.max_staleness else f"rollout.engine: {self.rollout.engine}"
            raise ValueError(
                f"importance_sampling_correction: off with {beside}, whose log-probs are not the "
                "trainer's; leave it at auto (token_truncate), or set allow_uncorrected: true beside it"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "scalerl": {
        "loss_type": "cispo", "loss_reduction": "prompt_mean_of_token_mean", "scale_rewards": "batch", "zero_variance_filtering": True,
        "no_resampling_pass_rate": 0.9, "cast_lm_head_to_fp32": True, "rollout": {"max_staleness": 8},
        # The surrogate's ratio is to what sampled a token, so there is nothing left to correct.
        "importance_sampling_correction": "off", "allow_uncorrected": True,
    },
}
"""Name → what it writes where the configuration says nothing. `scalerl`: arXiv 2510.13786."""

GRPOLoss = Literal["grpo", "dr_grpo", "bnpo", "dapo", "cispo", "sapo", "luspo", "gspo", "gmpo", "dppo", "clip_cov", "kl_cov", "rloo", "reinforce_pp"]


class GRPOKeys(PolicyGradientKeys):
    """RL with verifiable rewards: GRPO and its family."""

    preset: Literal["scalerl"] | None = knob(None, "A recipe whose keys stand where the configuration names none of its own; docs/algorithms.md lists what it sets.", example="scalerl")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = knob("sum_then_normalize", "Add the rewards, then normalise; or normalise each first (GDPO).")
    loss_type: GRPOLoss = knob("dapo", "Surrogate of a token and how tokens add up to a loss.")
    loss_reduction: LossReduction | None = knob(None, "How tokens add up to a loss; null is that of loss_type. `prompt_mean_of_token_mean` is the mean over prompts of the mean over all tokens of a prompt's completions (ScaleRL).", also="loss_agg_mode (verl)", example="prompt_mean_of_token_mean")
    zero_variance_filtering: bool = knob(False, "Leave prompts whose completions all earned the same out of the loss, and out of what it is divided by (ScaleRL). Unlike dynamic_sampling it samples no others instead.")
    importance_sampling_level: Literal["token", "sequence"] = knob("token", "Ratio per token, or per sequence (GSPO).")
    scale_rewards: Literal["group", "batch", "none"] = knob("group", "What the centred rewards are divided by: the group's std, the batch's, nothing.")
    advantage_estimator: Literal["group", "rloo", "reinforce_pp", "reinforce_pp_baseline", "maxrl"] = knob("group", "Baseline: group mean (GRPO), leave-one-out (RLOO), batch mean (REINFORCE++), group mean and then whitened over the batch (REINFORCE++-baseline), or group mean and divided by it (MaxRL, for rewards of 0 and above); loss_type rloo and reinforce_pp bring their own.")
    gamma: float = knob(1.0, "With credit: turn or step, the discount of a reward per turn, or step, that it comes later.", gt=0, le=1)
    advantage_eps: float = knob(1e-4, "Added to the std; ddof is 1, as in TRL.", ge=0)
    sapo_temperature_pos: float = knob(1.0, "SAPO's temperature for positive advantages.", gt=0)
    sapo_temperature_neg: float = knob(1.05, "SAPO's temperature for negative advantages.", gt=0)
    clip_cov_ratio: float = knob(2e-4, "loss_type clip_cov: share of an optimizer step's tokens that lose their gradient, drawn from those with a covariance of log-prob and advantage between clip_cov_lb and clip_cov_ub.", gt=0, le=1)
    clip_cov_lb: float = knob(1.0, "The covariance above which clip_cov draws tokens.")
    clip_cov_ub: float = knob(5.0, "The covariance below which clip_cov draws tokens.")
    kl_cov_ratio: float = knob(2e-4, "loss_type kl_cov: share of an optimizer step's tokens, those of highest covariance of log-prob and advantage, that are held by ppo_kl_coef.", gt=0, le=1)
    ppo_kl_coef: float = knob(0.1, "loss_type kl_cov: weight of |log π − log π_old| at those tokens (1 in arXiv 2505.22617, 0.1 in verl).", gt=0)
    teacher_advantage: TeacherAdvantage = knob("opd", "What the teachers do to a completion's advantage: `opd` adds teacher_coef · (log teacher − log policy) to it (on-policy distillation); `rlsd` leaves its sign to the reward and lets the teachers set how much of it each token gets (arXiv 2604.03128).")
    teacher_coef: float = knob(0.5, "Weight of the teachers: opd's factor, rlsd's λ (0 is GRPO, 1 the teachers alone).", ge=0)
    teacher_clip: float = knob(0.2, "RLSD's ε: a token's advantage is the completion's times 1 - ε to 1 + ε.", gt=0, lt=1)
    teacher_warmup_steps: int = knob(0, "Steps in which teacher_coef rises linearly from 0.", ge=0)
    teacher_decay_steps: int = knob(0, "Steps after the warmup in which it falls linearly to 0; 0 lets it stay.", ge=0)

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_what_is_not_written(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("preset") not in PRESETS:
            return values
        filled = {**PRESETS[values["preset"]], **values}
        written = values.get("rollout", {})
        if isinstance(written, dict):
            filled["rollout"] = {**PRESETS[values["preset"]]["rollout"], **written}
        return filled

    @property
    def selects_tokens(self) -> bool:
        return self.loss_type in ("clip_cov", "kl_cov") or super().selects_tokens

    @model_validator(mode="after")
    def _teachers_only_weigh(self) -> GRPOKeys:
        if self.teachers and self.teacher_advantage == "rlsd" and self.teacher_coef > 1:
            raise ValueError(
                f"teacher_coef: {self.teacher_coef:g} with teacher_advantage: rlsd, whose λ is a share; set it to 1 or less (0.5 in the paper)"
            )
        return self

    @model_validator(mode="after")
    def _maxrl_divides_by_what_is_not_negative(self) -> GRPOKeys:
        subtracts = [name for name in ("soft_overlong_cache", "missing_eos_penalty", "kl_in_reward") if getattr(self, name)]
        if self.advantage_estimator == "maxrl" and subtracts:
            raise ValueError(
                f"advantage_estimator: maxrl divides by a group's mean reward, and {subtracts[0]} makes rewards negative; "
                f"take {subtracts[0]} out, or set advantage_estimator: group"
            )
        return self

    @model_validator(mode="after")
    def _tokens_have_the_sign_of_their_completion(self) -> GRPOKeys:
        if self.loss_type == "gmpo" and self.top_entropy_quantile < 1:
            raise ValueError(
                f"top_entropy_quantile: {self.top_entropy_quantile:g} with loss_type: gmpo, whose ratio is made of all tokens of a completion, "
                "each clipped by its advantage; set it to 1, or take gspo"
            )
        return self

    @model_validator(mode="after")
    def _turns_are_normalised_in_their_group(self) -> GRPOKeys:
        own = self.loss_type in ("rloo", "reinforce_pp")
        if self.credit != "episode" and (own or self.advantage_estimator != "group" or self.multi_objective_aggregation != "sum_then_normalize"):
            got = f"loss_type: {self.loss_type}" if own else f"advantage_estimator: {self.advantage_estimator}, multi_objective_aggregation: {self.multi_objective_aggregation}"
            raise ValueError(f"credit: {self.credit} is defined on advantage_estimator: group with sum_then_normalize alone, got {got}")
        return self

    @model_validator(mode="after")
    def _filters_what_rewards_alone_say(self) -> GRPOKeys:
        beside = f"credit: {self.credit}" if self.credit != "episode" else "teachers" if self.teachers else ""
        if self.zero_variance_filtering and beside:
            raise ValueError(
                f"zero_variance_filtering with {beside}, where a prompt whose completions earned the same in all still teaches; set "
                "zero_variance_filtering: false"
            )
        return self

    @model_validator(mode="after")
    def _tokens_are_chosen_once(self) -> GRPOKeys:
        if self.loss_type in ("clip_cov", "kl_cov") and self.top_entropy_quantile < 1:
            raise ValueError(
                f"top_entropy_quantile: {self.top_entropy_quantile:g} with loss_type: {self.loss_type}, which chooses tokens by their covariance; "
                "set it to 1, or take dapo"
            )
        return self

    @model_validator(mode="after")
    def _kl_is_not_normalised_away(self) -> GRPOKeys:
        if self.kl_in_reward and self.beta and self.multi_objective_aggregation == "normalize_then_sum":
            raise ValueError(
                "kl_in_reward with multi_objective_aggregation: normalize_then_sum divides the KL by its own std, so beta "
                "would do nothing; set kl_in_reward: false, which puts the KL into the loss"
            )
        return self

    @model_validator(mode="after")
    def _gdpo_is_defined_on_groups(self) -> GRPOKeys:
        own = self.loss_type in ("rloo", "reinforce_pp")
        if self.multi_objective_aggregation == "normalize_then_sum" and (own or self.advantage_estimator != "group"):
            raise ValueError(
                "multi_objective_aggregation: normalize_then_sum is defined on advantage_estimator: group alone, "
                f"got {f'loss_type: {self.loss_type}' if own else f'advantage_estimator: {self.advantage_estimator}'}"
            )
        return self


def _samples_as_the_trainer_scores(rollout: Any) -> bool:
    """Whether the sampler's log-probs are the trainer's, by keys that may not be validated yet."""
    if isinstance(rollout, RolloutKeys):
        return rollout.engine == "embedded" and not rollout.max_staleness
    given = rollout if isinstance(rollout, dict) else {}
    return given.get("engine", "embedded") == "embedded" and not given.get("max_staleness", 0)
