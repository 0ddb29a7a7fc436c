"""The kinds of stages. A new one is a row here, a row in `posttrain.recipes.kinds`, its keys and its loop.

Everyone else asks a row for its traits, or its keys for what depends on their values; nobody asks for a name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.config.datasets import ROWS_OF_TYPE, RowKind
from posttrain.config.distill import DistillKeys
from posttrain.config.ebft import EBFTKeys
from posttrain.config.online_dpo import OnlineDPOKeys
from posttrain.config.ppo import PPOKeys
from posttrain.config.preference import DPOKeys
from posttrain.config.process_reward import ProcessRewardModelKeys
from posttrain.config.rl import GRPOKeys, PolicyGradientKeys, RLKeys, SamplingKeys
from posttrain.config.schema import did_you_mean
from posttrain.config.stages import RewardModelKeys, SFTKeys, TrainKeys
from posttrain.errors import ConfigError

LearnsFrom = Literal["examples", "pairs", "rated pairs", "rated steps", "samples", "teachers"]
"""What a kind learns from: answers of its rows, which of two answers is better, the same as a reward of each,
which steps of an answer are right, rewards of completions
of the policy itself, or what teachers say of tokens."""


@dataclass(frozen=True, slots=True)
class StageKind:
    """One row. `name` is the verb and the key in a pipeline; `rows` are what its keys may ask for, `also`
    other names that a user may give it."""

    name: str
    keys: type[TrainKeys]
    help: str
    rows: tuple[RowKind, ...]
    also: tuple[str, ...] = ()

    @property
    def pairs(self) -> bool:
        """Whether it learns which of two answers is better."""
        return "pairs" in self.rows

    @property
    def types(self) -> tuple[str, ...]:
        """Row formats that give rows it reads."""
        return tuple(name for name, rows in ROWS_OF_TYPE.items() if set(rows) & set(self.rows))

    @property
    def samples(self) -> bool:
        """Whether it trains on completions of the policy itself."""
        return issubclass(self.keys, SamplingKeys)

    @property
    def rewarded(self) -> bool:
        """Whether its completions earn rewards, which need a certificate."""
        return issubclass(self.keys, RLKeys)

    @property
    def learns_from(self) -> LearnsFrom:
        if self.pairs:
            return "rated pairs" if issubclass(self.keys, RewardModelKeys) else "pairs"
        if "steps" in self.rows:
            return "rated steps"
        if issubclass(self.keys, DistillKeys):
            return "teachers"
        return "samples" if self.samples else "examples"

    @property
    def has_critic(self) -> bool:
        """Whether it trains a critic beside the policy."""
        return issubclass(self.keys, PPOKeys)

    @property
    def has_entropy_bonus(self) -> bool:
        """Whether its loss has a term that a health rule can raise the entropy by."""
        return issubclass(self.keys, PolicyGradientKeys)

    def demands(self, keys: TrainKeys) -> dict[str, bool]:
        """What a plan of memory and time must know of the kind, by the names that the planner uses."""
        return {
            "samples": self.samples,
            "pairs": keys.row_kind == "pairs",
            "holds_reference": keys.holds_reference,
            "scores_reference": keys.pull > 0,
            "selects_tokens": keys.selects_tokens,
        }


STAGE_KINDS: dict[str, StageKind] = {
    row.name: row
    for row in (
        StageKind("sft", SFTKeys, "Run one stage of supervised fine-tuning.", ("examples",)),
        StageKind("dpo", DPOKeys, "Run one stage of preference optimisation.", ("pairs", "labels"), ("kto",)),
        StageKind("reward_model", RewardModelKeys, "Train a reward model on preferences.", ("pairs",)),
        StageKind(
            "process_reward_model", ProcessRewardModelKeys, "Train a process reward model on rated steps.", ("steps",)
        ),
        StageKind("grpo", GRPOKeys, "Run one stage of RL with verifiable rewards.", ("prompts",)),
        StageKind("ppo", PPOKeys, "Run one stage of RL with a critic.", ("prompts",)),
        StageKind("online_dpo", OnlineDPOKeys, "Run one stage of DPO on the policy's own completions.", ("prompts",)),
        StageKind("distill", DistillKeys, "Distil what teachers know into the model.", ("prompts", "examples")),
        StageKind("ebft", EBFTKeys, "Match answers in the features of the given model.", ("examples",)),
    )
}
"""Name → row. A program may add rows of its own before it loads a configuration."""


def kinds_by_name() -> dict[str, str]:
    """What a user may call a kind → its name."""
    return {called: row.name for row in STAGE_KINDS.values() for called in (row.name, *row.also)}


def kind_reading(rows: RowKind) -> str:
    """The first kind that reads such rows."""
    return next(row.name for row in STAGE_KINDS.values() if rows in row.rows)


def kinds_with(type_: str) -> list[str]:
    """The kinds that take rows of this format."""
    return [row.name for row in STAGE_KINDS.values() if type_ in row.types]


def stage_kind(name: str) -> StageKind:
    """Raises: ConfigError if there is no such kind."""
    if name not in STAGE_KINDS:
        raise ConfigError(
            f"no such stage: {name}; expected one of {', '.join(STAGE_KINDS)}{did_you_mean(name, list(STAGE_KINDS))}"
        )
    return STAGE_KINDS[name]
