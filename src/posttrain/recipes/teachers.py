"""Those who teach a policy on given tokens: loaded, asked with prompts of their own, averaged by weight and by prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from posttrain.config.ppo import PPOKeys
from posttrain.config.rl import RLKeys, SamplingKeys
from posttrain.config.stages import ModelKeys, TrainKeys
from posttrain.config.teachers import TeacherKeys
from posttrain.data.prompt_format import columns_of
from posttrain.data.render import draft_prompt, tokenize
from posttrain.errors import DataError, ModelError
from posttrain.files import digest_start
from posttrain.grading.learned import held_models
from posttrain.models.adapters import load_adapter
from posttrain.models.batch import pack
from posttrain.models.load import load_config, load_policy, load_tokenizer, model_shape
from posttrain.models.policy import Policy
from posttrain.models.provenance import check_base
from posttrain.models.vocabulary import vocabulary_digest
from posttrain.objectives.distill import DistillSpec, Head, divergence
from posttrain.planner.shape import ModelShape
from posttrain.protocols import Ranks, Scorer
from posttrain.recipes.scorers import NOTHING, PolicyScorer, ReferenceScorer
from posttrain.recipes.teacher_server import ServerScorer, check_vocabulary
from posttrain.rollout.experience import Group
from posttrain.rollout.http import Address, Client
from posttrain.types import Prompt, PromptRow, Sample, Text
from posttrain.uris import loopback

Lesson = tuple[Prompt, Group]
"""A prompt and samples that answer it."""
_PROMPT = "prompt"


@dataclass(frozen=True)
class Teacher:
    """One teacher: whom it teaches, what it reads, and how its log-probs and its distributions are had."""

    keys: TeacherKeys
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    in_use: Callable[[], AbstractContextManager[Policy]]
    """The model that answers, while this lasts."""

    def teaches(self, prompt: Prompt) -> bool:
        return all(str(prompt.columns.get(name)) == value for name, value in self.keys.when.items())

    def asked(self, prompt: Prompt, group: Group) -> Group:
        """The samples behind this teacher's own prompt."""
        if self.keys.prompt is None:
            return group
        return tuple(_behind(self.prompt_ids(prompt), sample) for sample in group)

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Raises: DataError where the row lacks a column, or its template refuses the prompt."""
        assert self.keys.prompt is not None
        written = replace(prompt, prompt=_written(self.keys.prompt, prompt))
        return tokenize(self.tokenizer, draft_prompt(self.tokenizer, written)).seqs[0].ids


class Teachers:
    """All teachers of a stage. A token's log-prob is the mean of theirs, each with its weight."""

    def __init__(self, teachers: Sequence[Teacher], *, sharded: bool = False) -> None:
        self.all, self._sharded = teachers, sharded

    @classmethod
    def of(cls, teachers: Sequence[TeacherKeys], keys: SamplingKeys, policy: Policy, ranks: Ranks) -> Teachers:
        """Load what is not there yet. Raises: ModelError, for another vocabulary too."""
        made = [_teacher(number, one, keys, policy, ranks) for number, one in enumerate(teachers)]
        return cls(made, sharded=policy.sharded)

    def check(self, rows: Iterable[PromptRow], longest: int) -> None:
        """Raises: DataError for a row that nobody teaches, that lacks a column of a prompt, or whose prompt is longer."""
        for prompt, _ in rows:
            taught_by = [teacher for teacher in self.all if teacher.teaches(prompt)]
            if not taught_by:
                wanted = " or ".join(str(teacher.keys.when) for teacher in self.all)
                raise DataError(f"{prompt.origin}: no teacher teaches this prompt; expected columns with {wanted}")
            for teacher in taught_by:
                length = 0 if teacher.keys.prompt is None else len(teacher.prompt_ids(prompt))
                if length > longest:
                    raise DataError(
                        f"{prompt.origin}: what the teacher reads in place of the prompt has {length} tokens > sequence_len - "
                        f"max_completion_length = {longest}; raise sequence_len, or shorten teachers.prompt"
                    )

    def logp(self, lessons: Sequence[Lesson]) -> list[np.ndarray]:
        """Per sample, in order, float32. All ranks ask, also without lessons."""
        count = sum(len(group) for _, group in lessons)
        sums: list[Any] = [0.0] * count
        weights = [0.0] * count
        for teacher in self.all:
            places, groups = self._of_one(teacher, lessons)
            for place, logp in zip(places, teacher.scorer.logp(groups), strict=True):
                sums[place] = sums[place] + teacher.keys.weight * logp.astype(np.float64)
                weights[place] += teacher.keys.weight
        return [np.asarray(total / weight, np.float32) for total, weight in zip(sums, weights, strict=True)]

    def compared(
        self, lessons: Sequence[Lesson], student: Head, target_M: torch.Tensor, spec: DistillSpec
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """A term per trained token of the lessons, and what is logged of it; `student` makes the policy's logits there."""
        lengths = [sample.num_loss_tokens for _, group in lessons for sample in group]
        tokens = torch.arange(len(target_M), device=target_M.device).split(lengths)
        sums, weight_M = (
            torch.zeros(4, len(target_M), device=target_M.device),
            torch.zeros_like(target_M, dtype=torch.float32),
        )
        for teacher in self.all:
            places, groups = self._of_one(teacher, lessons)
            # Ranks of a sharded model run it equally often.
            if not groups and not self._sharded:
                continue
            with torch.no_grad(), teacher.in_use() as model:
                head, _ = model.head(pack(groups or [[NOTHING]]))
            if not groups:
                continue
            where_M = torch.cat([tokens[place] for place in places])
            with model.placement.autocast():
                term_M, said = divergence(student.at(where_M), head, target_M[where_M], spec)
            sums = sums.index_add(1, where_M, teacher.keys.weight * torch.cat([term_M[None], said]).to(sums.dtype))
            weight_M = weight_M.index_add(0, where_M, torch.full_like(term_M.detach(), teacher.keys.weight))
        term_M, gap_M, entropy_M, agrees_M = (sums / weight_M).unbind(0)
        return term_M, {"teacher/gap": gap_M, "entropy": entropy_M, "teacher/agreement": agrees_M}

    def _of_one(self, teacher: Teacher, lessons: Sequence[Lesson]) -> tuple[list[int], list[Group]]:
        """What one of them is asked, with the places of the samples among all."""
        places: list[int] = []
        groups: list[Group] = []
        at = 0
        for prompt, group in lessons:
            if teacher.teaches(prompt):
                groups.append(teacher.asked(prompt, group))
                places += range(at, at + len(group))
            at += len(group)
        return places, groups


def shapes_beside(keys: TrainKeys) -> dict[str, Any]:
    """Of the models that are held beside the policy, by what they do, for a plan of memory. Raises: ConfigError, ModelError."""
    asked = keys.teachers if isinstance(keys, SamplingKeys) else []
    paid_by = held_models(keys.reward_funcs, keys.base_model) if isinstance(keys, RLKeys) else []
    held = {
        "teachers": [_keys_of(one, keys) for one in asked if one.is_loaded],
        "critics": [keys.critic] if isinstance(keys, PPOKeys) else [],
        "judges": [ModelKeys.model_validate({"base_model": one, "device": keys.device}) for one in paid_by],
    }
    return {
        name: [ModelShape.from_config(model_shape(load_config(one))) for one in models] for name, models in held.items()
    }


def _keys_of(asked: TeacherKeys, keys: TrainKeys) -> ModelKeys:
    return ModelKeys(
        base_model=asked.model, revision=asked.revision, trust_remote_code=asked.trust_remote_code, device=keys.device,
        bf16=keys.bf16,
    )  # fmt: skip


def _teacher(number: int, asked: TeacherKeys, keys: SamplingKeys, policy: Policy, ranks: Ranks) -> Teacher:
    how = (keys.temperature, keys.per_device_train_batch_size, ranks)
    if asked.model == "policy":
        return Teacher(asked, policy.tokenizer, PolicyScorer(policy, *how), lambda: nullcontext(policy))
    if asked.model == "start":
        return Teacher(asked, policy.tokenizer, ReferenceScorer(policy, *how), policy.reference)
    if asked.url is not None:
        client = Client(Address(*loopback(asked.url)), os.environ.get(asked.token_env, ""), asked.timeout_s)
        check_vocabulary(client, asked.model, policy.tokenizer, number)
        return Teacher(asked, policy.tokenizer, ServerScorer(client, asked.model), _has_no_model)
    model = _load(number, asked, keys, policy)
    return Teacher(asked, policy.tokenizer, PolicyScorer(model, *how), lambda: nullcontext(model))


def _has_no_model() -> AbstractContextManager[Policy]:
    raise AssertionError("keys refuse a server where distributions are compared")


def refuse_other_vocabulary(
    number: int, asked: TeacherKeys, keys: SamplingKeys, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raises: ModelError for a teacher of this process that reads other tokens, or whose adapter is for another base."""
    if not asked.is_loaded:
        return
    of_model = _keys_of(asked, keys)
    ours, theirs = (vocabulary_digest(one) for one in (tokenizer, load_tokenizer(of_model)))
    if ours != theirs:
        raise ModelError(
            f"teachers.{number}.model: {asked.model} has another vocabulary (digest {digest_start(theirs)}…) than the policy "
            f"({digest_start(ours)}…), so its log-probs are of other tokens; name a model with the policy's tokenizer, or train SFT "
            "on what it says"
        )
    if asked.adapter is not None:
        check_base(Path(asked.adapter), Path(asked.model))


def _load(number: int, asked: TeacherKeys, keys: SamplingKeys, policy: Policy) -> Policy:
    """Raises: ModelError."""
    refuse_other_vocabulary(number, asked, keys, policy.tokenizer)
    of_model = _keys_of(asked, keys)
    if asked.adapter is None:
        teacher = load_policy(of_model, tokenizer=policy.tokenizer, trainable=False, sharding=policy.sharding)
        return teacher.without_dropout()
    teacher = load_policy(of_model, tokenizer=policy.tokenizer, trainable=False)
    teacher.model = load_adapter(teacher.base, Path(asked.adapter)).eval()
    return teacher.without_dropout()


def _behind(prompt_ids: Sequence[int], sample: Sample) -> Sample:
    """The trained tokens and all after the first of them, behind another prompt. No stream goes with them."""
    first = int(sample.loss_mask.argmax()) if sample.loss_mask.any() else len(sample.ids)
    ids = np.concatenate([np.array(prompt_ids, np.int32), sample.ids[first:]])
    return Sample(ids, np.concatenate([np.zeros(len(prompt_ids), np.bool_), sample.loss_mask[first:]]))


def _written(text: str, prompt: Prompt) -> Text:
    """The prompt, or its last user turn, in the teacher's form. Raises: DataError."""
    if isinstance(prompt.prompt, str):
        return _filled(text, prompt.prompt, prompt)
    turns = list(prompt.prompt)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None or not isinstance(turns[last]["content"], str):
        raise DataError(
            f"{prompt.origin}: teachers.prompt takes the place of the last user turn, and there is none in text"
        )
    turns[last] = {**turns[last], "content": _filled(text, turns[last]["content"], prompt)}
    return tuple(turns)


def _filled(text: str, own: str, prompt: Prompt) -> str:
    values: Mapping[str, Any] = {**prompt.columns, _PROMPT: own}
    missing = [name for name in columns_of(text) if values.get(name) is None]
    if missing:
        raise DataError(
            f"{prompt.origin}: teachers.prompt names {{{missing[0]}}}; this row has {', '.join(f'`{name}`' for name in values)}"
        )
    return text.format(**{name: values[name] for name in columns_of(text)})
