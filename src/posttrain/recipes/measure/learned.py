"""Rewards that are a model's opinion, loaded: a reward model's folder; and the pool of all rewards of a stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from posttrain.config.rl import RLKeys
from posttrain.config.stages import AskedRewardKeys
from posttrain.data.render import draft_labelled, tokenize
from posttrain.errors import ConfigError, DataError
from posttrain.grading.learned import (
    is_reward_adapter,
    learned_digest,
    learned_source,
    named_stage,
    reward_base,
    split_learned,
)
from posttrain.models.adapters import load_adapter
from posttrain.models.batch import pack
from posttrain.models.export import adapter_tokenizer
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.models.provenance import check_base, recorded_bits
from posttrain.models.reward_head import up_to_reward
from posttrain.names import JUDGE, REWARD_MODEL
from posttrain.recipes.measure.judges import load_judge_reward
from posttrain.rewards.learned import LearnedReward, Opinion
from posttrain.rewards.workers import RewardPool
from posttrain.types import LabelledCompletion, Origin, TokenSeq

_AT_ONCE = 16
"""Completions of one forward."""
_ROUNDING = {None: 1e-4, torch.bfloat16: 0.1}
"""Dtype of the autocast → how far the rewards of one completion may lie apart that is packed with others."""


class ModelReward:
    """A sequence-classification model: what its one label says at the last token of prompt and completion."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.rounding = _ROUNDING[policy.placement.autocast_dtype]
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
            for (place, _), value in zip(part, self._rewards(prompts, part), strict=True):
                found[place] = Opinion(value)
        return [opinion for opinion in found if opinion is not None]

    def close(self) -> None:
        """Its memory goes with it."""

    @torch.no_grad()
    def _rewards(self, prompts: Sequence[Any], rows: Sequence[tuple[int, TokenSeq]]) -> list[float]:
        families = [[seq for _, seq in family] for _, family in groupby(rows, key=lambda row: prompts[row[0]])]
        return self._policy.rewards(pack(families)).tolist()

    def _sequence(self, prompt: Any, completion: Any) -> TokenSeq:
        """As its training writes an answer. Raises: DataError."""
        tokenizer = self._policy.tokenizer
        asked, answer = (value if isinstance(value, str) else tuple(value) for value in (prompt, completion))
        row = LabelledCompletion(Origin("completion", 1), asked, answer, True)
        seq = tokenize(tokenizer, draft_labelled(tokenizer, row)).seqs[0]
        if not any(seq.loss_mask):
            raise DataError("the reward model's chat template writes no token for this answer")
        pad: Any = tokenizer.pad_token_id
        cut = up_to_reward(seq, pad)
        if self._longest is not None and len(cut.ids) - 1 > self._longest:
            raise DataError(f"{len(cut.ids) - 1} tokens, and the reward model takes {self._longest}")
        return cut


def load_learned(spec: str, folder: Path | None = None, *, device: str = "auto") -> LearnedReward:
    """Raises: ConfigError, ModelError."""
    parts = split_learned(spec)
    assert parts is not None
    if named_stage(spec) is not None:
        raise ConfigError(
            f"{spec}: a stage is named within a pipeline, whose earlier stage it is; here expected model:FOLDER of a reward model"
        )
    return LEARNED[parts[0]](learned_source(spec, folder), device)


_loaded: WeakValueDictionary[tuple[str, str], ModelReward] = WeakValueDictionary()
"""Those that somebody holds: a stage and its suite ask one copy."""


def _reward_model(source: Path | str, device: str) -> LearnedReward:
    place = (learned_digest(f"{REWARD_MODEL}{source}"), device)
    reward = _loaded.get(place)
    if reward is None:
        _loaded[place] = reward = ModelReward(_asked(str(source), device).without_dropout())
    return reward


def _asked(source: str, device: str) -> Policy:
    """A whole model; or an adapter on its base, in 4 or 8 bits where it was trained so. Raises: ModelError."""
    keys = AskedRewardKeys.model_validate({"base_model": source, "device": device})
    adapter = Path(source)
    if not is_reward_adapter(adapter):
        return load_policy(keys, trainable=False)
    base = reward_base(adapter)
    check_base(adapter, Path(base))
    keys = keys.model_copy(update={"base_model": base} | recorded_bits(adapter))
    policy = load_policy(keys, tokenizer=adapter_tokenizer(base, adapter, keys), trainable=False)
    policy.model = load_adapter(policy.base, adapter).requires_grad_(False).eval()
    return policy


LEARNED: Mapping[str, Callable[[Path | str, str], LearnedReward]] = {
    REWARD_MODEL: _reward_model,
    JUDGE: load_judge_reward,
}
"""Prefix → what loads such a reward on a device."""


def reward_pool(keys: RLKeys) -> RewardPool:
    """The rewards of a stage. Models among them are loaded beside the policy, whole on every rank."""
    return RewardPool(
        keys.reward_funcs, keys.reward_weights, keys.reward_kwargs, keys.reward_workers, keys.reward_timeout_s,
        load=partial(load_learned, device=keys.device),
    )  # fmt: skip
