"""Rewards that are a model's opinion, loaded: a reward model's folder, of whole answers or of steps; and the pool of all rewards of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from posttrain.config.process_reward import AskedProcessRewardKeys
from posttrain.config.rl import PolicyGradientKeys, RLKeys
from posttrain.config.stages import AskedRewardKeys
from posttrain.data.render import StepForm, draft_labelled, draft_steps, tokenize
from posttrain.errors import ConfigError, DataError
from posttrain.files import digest_json
from posttrain.grading.learned import (
    STEP_AGGREGATES,
    is_reward_adapter,
    learned_digest,
    learned_source,
    named_stage,
    rates_steps,
    reward_base,
    split_learned,
    step_options,
)
from posttrain.models.adapters import load_adapter
from posttrain.models.batch import Batch, pack
from posttrain.models.export import adapter_tokenizer
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.models.provenance import check_base, recorded_bits, recorded_separator
from posttrain.models.read import is_token_classifier
from posttrain.models.reward_head import at_steps, up_to_reward
from posttrain.names import JUDGE, REWARD_MODEL, reward_name
from posttrain.recipes.measure.judges import load_judge_reward
from posttrain.rewards.learned import LearnedReward, Opinion
from posttrain.rewards.workers import RewardPool
from posttrain.types import LabelledCompletion, Origin, SteppedCompletion, TokenSeq

_AT_ONCE = 16
"""Completions of one forward."""
_STEP_ROUNDING = {None: 1e-5, torch.bfloat16: 0.02}
_ROUNDING = {None: 1e-4, torch.bfloat16: 0.1}
"""Dtype of the autocast → how far the rewards of one completion may lie apart that is packed with others; probabilities of steps less."""


class ModelReward:
    """A sequence-classification model: what its one label says at the last token of prompt and completion."""

    _rounding = _ROUNDING

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.rounding = self._rounding[policy.placement.autocast_dtype]
        self._longest = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[Opinion]:
        """In batches in which completions of one prompt share it. What cannot be written or is too long is unscored."""
        found: list[Opinion | None] = [None] * len(prompts)
        rows: list[tuple[int, TokenSeq]] = []
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                rows.append((place, self._sequence(prompt, completion)))
            except DataError as error:
                found[place] = Opinion(None, str(error))
        for begin in range(0, len(rows), _AT_ONCE):
            part = rows[begin : begin + _AT_ONCE]
            for (place, _), opinion in zip(part, self._opinions(prompts, completions, part), strict=True):
                found[place] = opinion
        return [opinion for opinion in found if opinion is not None]

    def close(self) -> None:
        """Its memory goes with it."""

    @torch.no_grad()
    def _opinions(
        self, prompts: Sequence[Any], completions: Sequence[Any], rows: Sequence[tuple[int, TokenSeq]]
    ) -> list[Opinion]:
        return [Opinion(value) for value in self._policy.rewards(_packed(prompts, rows)).tolist()]

    def _sequence(self, prompt: Any, completion: Any) -> TokenSeq:
        """As its training writes an answer. Raises: DataError."""
        tokenizer = self._policy.tokenizer
        asked, answer = (value if isinstance(value, str) else tuple(value) for value in (prompt, completion))
        row = LabelledCompletion(Origin("completion", 1), asked, answer, True)
        seq = tokenize(tokenizer, draft_labelled(tokenizer, row)).seqs[0]
        if not any(seq.loss_mask):
            raise DataError("the reward model's chat template writes no token for this answer")
        pad: Any = tokenizer.pad_token_id
        return self._fitting(up_to_reward(seq, pad))

    def _fitting(self, cut: TokenSeq) -> TokenSeq:
        """Raises: DataError for what is too long for the model."""
        if self._longest is not None and len(cut.ids) - 1 > self._longest:
            raise DataError(f"{len(cut.ids) - 1} tokens, and the reward model takes {self._longest}")
        return cut


class StepReward(ModelReward):
    """A process reward model: how likely each step of the answer is right, and of these their minimum, or another aggregate."""

    _rounding = _STEP_ROUNDING

    def __init__(self, policy: Policy, separator: str, aggregate: str) -> None:
        super().__init__(policy)
        self._form, self._aggregate = StepForm(separator), STEP_AGGREGATES[aggregate]

    @torch.no_grad()
    def _opinions(
        self, prompts: Sequence[Any], completions: Sequence[Any], rows: Sequence[tuple[int, TokenSeq]]
    ) -> list[Opinion]:
        right_M = self._policy.label_logits(_packed(prompts, rows)).softmax(-1)[:, 1]
        each = right_M.split([seq.num_loss_tokens for _, seq in rows])
        said = [_answered(prompts[place], completions[place])[1] for place, _ in rows]
        return [
            Opinion(self._aggregate(p), steps=tuple(zip(step_ends(text, self._form.separator), p, strict=True)))
            for text, p in zip(said, (scores.tolist() for scores in each), strict=True)
        ]

    def _sequence(self, prompt: Any, completion: Any) -> TokenSeq:
        """As its training writes steps; of a completion of several messages the last one is the answer. Raises: DataError."""
        tokenizer, separator = self._policy.tokenizer, self._form.separator
        prompt, text = _answered(prompt, completion)
        steps = tuple(step for step in text.split(separator) if step.strip())
        if not steps:
            raise DataError("the answer has no step: nothing is written in it")
        asked = prompt if isinstance(prompt, str) else tuple(prompt)
        row = SteppedCompletion(Origin("completion", 1), asked, steps, ())
        pad: Any = tokenizer.pad_token_id
        return self._fitting(at_steps(tokenize(tokenizer, draft_steps(tokenizer, row, self._form)).seqs[0], pad))


def step_ends(text: str, separator: str) -> list[int]:
    """Where the steps of an answer end, behind their separators. Example: "a\n\nb" cut at "\n" gives 2 and 4: what is blank is no step."""
    ends: list[int] = []
    at = 0
    for part in text.split(separator):
        at = min(at + len(part) + len(separator), len(text))
        if part.strip():
            ends.append(at)
    return ends


def _answered(prompt: Any, completion: Any) -> tuple[Any, str]:
    """What comes before a completion's last message, and the text of that."""
    if isinstance(completion, str):
        return prompt, completion
    *before, last = completion
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    return (asked + before if before or not isinstance(prompt, str) else prompt), str(last["content"])


def _packed(prompts: Sequence[Any], rows: Sequence[tuple[int, TokenSeq]]) -> Batch:
    """Completions of one prompt share it."""
    return pack([[seq for _, seq in family] for _, family in groupby(rows, key=lambda row: prompts[row[0]])])


def load_learned(
    spec: str, folder: Path | None = None, options: Mapping[str, Any] | None = None, *, device: str = "auto"
) -> LearnedReward:
    """Raises: ConfigError, ModelError."""
    parts = split_learned(spec)
    assert parts is not None
    if named_stage(spec) is not None:
        raise ConfigError(
            f"{spec}: a stage is named within a pipeline, whose earlier stage it is; here expected model:FOLDER of a reward model"
        )
    return LEARNED[parts[0]](learned_source(spec, folder), reward_name(spec), options or {}, device)


_loaded: WeakValueDictionary[tuple[str, str, str], ModelReward] = WeakValueDictionary()
"""Those that somebody holds: a stage and its suite ask one copy."""


def _reward_model(source: Path | str, name: str, options: Mapping[str, Any], device: str) -> LearnedReward:
    place = (learned_digest(f"{REWARD_MODEL}{source}"), digest_json(dict(options)), device)
    reward = _loaded.get(place)
    if reward is None:
        _loaded[place] = reward = _read_reward(str(source), name, options, device)
    return reward


def _read_reward(source: str, name: str, options: Mapping[str, Any], device: str) -> ModelReward:
    of_steps = rates_steps(Path(source)) if Path(source).is_dir() else is_token_classifier(source)
    policy = _asked(source, device, of_steps).without_dropout()
    if not of_steps:
        if options:
            raise ConfigError(f"reward_kwargs: {name!r} takes no options: it rates whole answers, no steps")
        return ModelReward(policy)
    wanted = step_options(f"reward_kwargs: {name}", options)
    return StepReward(policy, wanted.step_separator or recorded_separator(Path(source)) or "\n", wanted.aggregate)


def _judge(source: Path | str, name: str, options: Mapping[str, Any], device: str) -> LearnedReward:
    if options:
        raise ConfigError(f"reward_kwargs: {name!r} takes no options; a judge's stand in its file")
    return load_judge_reward(source, device)


def _asked(source: str, device: str, of_steps: bool) -> Policy:
    """A whole model; or an adapter on its base, in 4 or 8 bits where it was trained so. Raises: ModelError."""
    of = AskedProcessRewardKeys if of_steps else AskedRewardKeys
    keys = of.model_validate({"base_model": source, "device": device})
    adapter = Path(source)
    if not is_reward_adapter(adapter):
        return load_policy(keys, trainable=False)
    base = reward_base(adapter)
    check_base(adapter, Path(base))
    keys = keys.model_copy(update={"base_model": base} | recorded_bits(adapter))
    policy = load_policy(keys, tokenizer=adapter_tokenizer(base, adapter, keys), trainable=False)
    policy.model = load_adapter(policy.base, adapter).requires_grad_(False).eval()
    return policy


LEARNED: Mapping[str, Callable[[Path | str, str, Mapping[str, Any], str], LearnedReward]] = {
    REWARD_MODEL: _reward_model,
    JUDGE: _judge,
}
"""Prefix → what loads such a reward by its source, name and options on a device."""


def reward_pool(keys: RLKeys) -> RewardPool:
    """The rewards of a stage. Models among them are loaded beside the policy, whole on every rank. Raises: ConfigError."""
    if isinstance(keys, PolicyGradientKeys) and keys.credit == "step":
        source = learned_source(keys.reward_funcs[keys.paying_step])
        if isinstance(source, Path) and not rates_steps(source):
            raise ConfigError(
                f"credit: step: {keys.reward_funcs[keys.paying_step]} rates whole answers; name a process reward model, or set credit: episode"
            )
    return RewardPool(
        keys.reward_funcs, keys.reward_weights, keys.reward_kwargs, keys.reward_workers, keys.reward_timeout_s,
        load=partial(load_learned, device=keys.device),
    )  # fmt: skip
