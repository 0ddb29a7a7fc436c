"""The keys of `posttrain data instruct`: prompts, or prompts for given answers, written by a teacher. No torch here."""

from __future__ import annotations

import re
from copy import copy
from typing import Any, Literal

from pydantic import field_validator, model_validator

from posttrain.config.datasets import DatasetKeys, read_once
from posttrain.config.judge import JudgeKeys
from posttrain.config.knob import Keys, knob
from posttrain.config.synth import Repeats

InstructMethod = Literal["self_instruct", "evolve", "back_translate"]

# fmt: off
# One key a line, as in `stages`.


def _as_of_a_judge(name: str) -> Any:
    """The key of a judge as it is, for a teacher is asked in the same way."""
    return copy(JudgeKeys.model_fields[name])


class InstructKeys(Keys):
    """A teacher that writes instructions, and how it is asked."""

    datasets: list[DatasetKeys] = knob(..., "What the teacher is shown: prompts, or for back_translate examples, whose answers it writes instructions for.", min_length=1, example=[{"path": "./seeds.jsonl"}])
    output_dir: str = knob("", "Folder of `rows.jsonl`, `left.jsonl` and the report, relative to the YAML; empty means `runs/NAME` with the name of the YAML.", example="runs/instructions")
    method: InstructMethod = knob("self_instruct", "`self_instruct` shows some prompts and asks for a new one, `evolve` asks for a harder or rarer form of one, `back_translate` asks what a given answer answers.")
    num_instructions: int | None = knob(None, "Instructions that are asked for; null asks for one per row of datasets.", ge=1, example=1000)
    num_shown: int = knob(4, "With self_instruct: prompts that are shown at a time.", ge=1)
    prompt: str | None = knob(None, "What the teacher is asked, with `{shown}` for the prompts or the answer; null takes the form that ships.", example="Write one exam question like these:\n{shown}")
    model: str = knob(..., "The teacher's name at `url`; without one a local model folder or a hub id.", example="Qwen/Qwen3-32B")
    url: str | None = _as_of_a_judge("url")
    token_env: str = knob("POSTTRAIN_TEACHER_KEY", "Environment variable that holds the API key of the server at `url`.")
    seed: int = knob(42, "What is shown, and the seed of each answer, follow from it.", ge=0)
    temperature: float = knob(0.7, "Of the teacher's answers.", ge=0)
    max_tokens: int = knob(512, "Longest answer of the teacher in tokens, its thoughts among them.", ge=1)
    keep_truncated: bool = knob(False, "Keep instructions that were cut at max_tokens too.")
    timeout_s: float = _as_of_a_judge("timeout_s")
    retries: int = _as_of_a_judge("retries")
    at_once: int = _as_of_a_judge("at_once")
    max_chars: int = knob(4000, "Longer instructions leave.", ge=1)
    dedup: Repeats = knob("near", "Leave out instructions that repeat an earlier one or one that was shown.")
    near: float = knob(0.7, "Jaccard index of 5-word runs from which two are nearly the same.", ge=0.5, le=1)
    decontaminate: list[str] = knob([], "Suites (JSONL, or `lm-eval:TASK`) whose prompts no row may hold, by 13-word runs.", example=["evals/heldout.jsonl"])

    def asked(self, cache: str) -> JudgeKeys:
        """The teacher as one that is asked, whose answers are kept in `cache`."""
        same = ("model", "url", "token_env", "temperature", "max_tokens", "timeout_s", "retries", "at_once")
        return JudgeKeys.model_validate({**{name: getattr(self, name) for name in same}, "cache": cache})

    _once = field_validator("datasets")(read_once)

    @field_validator("prompt")
    @classmethod
    def _shows_something(cls, prompt: str | None) -> str | None:
        if prompt is not None and "{shown}" not in prompt:
            raise ValueError("has no {shown}, so the teacher would see none of the rows")
        return prompt

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is not None and not re.match(r"https?://[^\s/]+", url):
            raise ValueError(f"got {url!r}, expected http://HOST or https://HOST, up to /v1")
        return url

    @model_validator(mode="after")
    def _reads_every_key(self) -> InstructKeys:
        if self.method != "self_instruct" and self.num_shown != 4:
            raise ValueError(f"num_shown does nothing with method: {self.method}, which shows one; remove it")
        if self.dedup != "near" and self.near != 0.7:
            raise ValueError(f"near does nothing with dedup: {self.dedup}; remove it")
        return self
