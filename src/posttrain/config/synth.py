"""The keys of `posttrain data synth`: rows made of a model's own samples. No torch here."""

from __future__ import annotations

from copy import copy
from typing import Any, Literal

from pydantic import field_validator, model_validator

from posttrain.config.datasets import DatasetKeys, read_once
from posttrain.config.knob import Keys, knob
from posttrain.config.rl import RLKeys
from posttrain.config.rollout import RolloutKeys

KeepRule = Literal["top1", "all_correct", "pairs", "prompts"]
Repeats = Literal["off", "exact", "near"]

ROWS, LEFT = "rows.jsonl", "left.jsonl"
"""What is written in `output_dir`: the rows, and what is in none of them."""

# fmt: off
# One key a line, as in `stages`.


def _as_in_rl(name: str) -> Any:
    """The key of a stage of RL as it is: default, meaning, range and other names."""
    return copy(RLKeys.model_fields[name])


class DifficultyKeys(Keys):
    """Prompts by how often the model is right."""

    k: int = knob(1, "Samples of pass@k, by its unbiased estimate.", ge=1)
    min: float = knob(0.0, "Prompts of a lower pass@k are left out; above 0 it takes out what is never solved.", ge=0, le=1, example=0.1)
    max: float = knob(1.0, "Prompts of a higher pass@k are left out; below 1 it takes out what is always solved.", ge=0, le=1, example=0.9)

    @model_validator(mode="after")
    def _has_room(self) -> DifficultyKeys:
        if self.min > self.max:
            raise ValueError(f"min: {self.min:g} above max: {self.max:g} keeps no prompt; swap them")
        return self


class SynthKeys(Keys):
    """Completions of a model, scored, and what of them becomes rows to train on."""

    base_model: str = _as_in_rl("base_model")
    revision: str | None = _as_in_rl("revision")
    trust_remote_code: bool = _as_in_rl("trust_remote_code")
    chat_template: str | None = _as_in_rl("chat_template")
    chat_template_kwargs: dict[str, Any] = _as_in_rl("chat_template_kwargs")
    bf16: bool | Literal["auto"] = _as_in_rl("bf16")
    device: Literal["auto", "cpu", "cuda"] = _as_in_rl("device")
    datasets: list[DatasetKeys] = knob(..., "Prompts, as for `grpo`; their other columns go to the rewards.", min_length=1, example=[{"path": "./prompts.jsonl"}])
    output_dir: str = knob("", "Folder of `rows.jsonl` and its report, relative to the YAML; empty means `runs/NAME` with the name of the YAML.", example="runs/samples")
    seed: int = _as_in_rl("seed")
    sequence_len: int = knob(2048, "Longest prompt and completion together, in tokens; longer prompts are left out.", ge=8)
    num_generations: int = knob(8, "Completions per prompt (N).", ge=1, also="num_return_sequences, n")
    max_completion_length: int = _as_in_rl("max_completion_length")
    temperature: float = knob(1.0, "Sampling temperature.", gt=0)
    top_p: float = _as_in_rl("top_p")
    top_k: int = _as_in_rl("top_k")
    min_p: float = _as_in_rl("min_p")
    stop: list[str] = _as_in_rl("stop")
    rollout_batch_size: int = _as_in_rl("rollout_batch_size")
    prompts_per_part: int = knob(32, "Prompts that are sampled, scored and written at once: what a kill can cost.", ge=1)
    rollout: RolloutKeys = _as_in_rl("rollout")
    reward_funcs: list[str] = _as_in_rl("reward_funcs")
    reward_weights: list[float] | None = _as_in_rl("reward_weights")
    reward_kwargs: dict[str, dict[str, Any]] = _as_in_rl("reward_kwargs")
    reward_timeout_s: float = _as_in_rl("reward_timeout_s")
    reward_workers: int = _as_in_rl("reward_workers")
    keep: KeepRule = knob("all_correct", "What becomes a row: the best completion of each prompt (`top1`, Best-of-N), all of a reward from correct_from on (`all_correct`, rejection sampling), a better and a worse one (`pairs`), or the prompt itself (`prompts`).")
    correct_from: float = knob(1.0, "Reward from which a completion is correct: for `all_correct` and for difficulty.")
    min_reward: float | None = knob(None, "With top1 and pairs: a best or chosen completion of a lower reward is not kept.", example=0.5)
    min_margin: float = knob(0.0, "With pairs: the chosen reward is higher by more than this.", ge=0)
    max_per_prompt: int | None = knob(None, "Rows of one prompt, the best first.", ge=1, example=4)
    keep_truncated: bool = knob(False, "Keep completions that were cut at max_completion_length too.")
    difficulty: DifficultyKeys = knob(DifficultyKeys(), "Prompts by measured pass@k of this model.", example={"min": 0.1, "max": 0.9})
    dedup: Repeats = knob("exact", "Leave out rows that repeat an earlier one: up to case and white space, or also nearly (`near`, Jaccard index of 5-word runs from 0.8 on).")
    decontaminate: list[str] = knob([], "Suites (JSONL, or `lm-eval:TASK`) whose prompts no row may hold, by 13-word runs.", example=["evals/heldout.jsonl"])
    balance: str | None = knob(None, "Column of the prompts whose values are to be about equally many rows.", example="subject")
    balance_ratio: float = knob(1.0, "With balance: rows of one value are at most so many times those of the rarest.", ge=1)

    @property
    def distinct(self) -> bool:
        """Whether completions of one prompt that say the same count once."""
        return self.dedup != "off"

    @property
    def asked(self) -> RLKeys:
        """What samples and scores, as a stage of RL has it."""
        own = {"num_generations", *(name for name in type(self).model_fields if name not in RLKeys.model_fields)}
        return RLKeys.model_validate({name: getattr(self, name) for name in type(self).model_fields if name not in own})

    @model_validator(mode="after")
    def _asks_one_model(self) -> SynthKeys:
        for name, value in self.rollout.given("max_staleness", "routed_experts"):
            raise ValueError(f"rollout.{name}: {value} where nothing is trained; remove it")
        return self

    _once = field_validator("datasets")(read_once)

    @model_validator(mode="after")
    def _samples_what_it_measures(self) -> SynthKeys:
        if self.keep == "pairs" and self.num_generations < 2:
            raise ValueError("num_generations: 1 with keep: pairs, which compares two; set num_generations: 2 or more")
        if self.difficulty.k > self.num_generations:
            raise ValueError(f"difficulty.k: {self.difficulty.k} with num_generations: {self.num_generations}; fewer samples say nothing of pass@k")
        return self

    @model_validator(mode="after")
    def _reads_every_key(self) -> SynthKeys:
        unread = {
            f"keep: {self.keep}": {
                "top1": ("min_margin", "max_per_prompt"), "all_correct": ("min_reward", "min_margin"), "pairs": (),
                "prompts": ("min_reward", "min_margin", "max_per_prompt", "keep_truncated"),
            }[self.keep],
            "no balance": () if self.balance else ("balance_ratio",),
        }
        for beside, names in unread.items():
            for name in names:
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} does nothing with {beside}; remove it")
        return self
