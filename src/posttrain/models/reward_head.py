"""A model with transformers' head for classifying sequences or tokens: what it says after every token, and which tokens count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from posttrain.config.process_reward import AskedProcessRewardKeys
from posttrain.config.stages import AskedRewardKeys, ModelKeys
from posttrain.errors import ModelError
from posttrain.types import TokenSeq

REWARD_TASKS: Mapping[str, type[AskedRewardKeys]] = {"SEQ_CLS": AskedRewardKeys, "TOKEN_CLS": AskedProcessRewardKeys}
"""PEFT's task of an adapter under such a head → the keys that load the model."""


class _RewardPerToken:
    """transformers gives the reward of a row's last token alone, and labels of all tokens; packed rows need those of some.

    Where transformers drops out before the head of token labels, nothing is dropped here.
    """

    base_model: Any
    score: Any

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **options: Any) -> Any:
        """Shapes: [1, N] → logits [1, M, labels] at the M places to keep; all N where none are named."""
        options.pop("labels", None)  # which PEFT hands on, also where there are none
        hidden = self.base_model(input_ids=input_ids, **options).last_hidden_state
        kept = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[:, kept]))


def task_type(keys: ModelKeys) -> str:
    """PEFT's name for what an adapter is trained to do."""
    if not keys.is_reward_model:
        return "CAUSAL_LM"
    return next(task for task, asked in REWARD_TASKS.items() if asked.rates_steps == keys.rates_steps)


def reward_head(model: torch.nn.Module) -> torch.nn.Linear | None:
    """What makes a reward of a hidden state, in a model that has such a head."""
    score = getattr(model, "score", None)
    return score if isinstance(score, torch.nn.Linear) else None


def with_reward_per_token(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, of a class of the same name whose forward gives a reward per token. Raises: ModelError without such a head."""
    of = type(model)
    if reward_head(model) is None:
        raise ModelError(
            f"reward_model: {of.__name__} has no linear `score` on its decoder; expected a decoder-only model, "
            "such as Qwen, Llama, Mistral or Gemma"
        )
    # By name and module still what transformers wrote, for it stands in the exported config.
    model.__class__ = type(of.__name__, (_RewardPerToken, of), {"__module__": of.__module__})
    return model


def up_to_reward(sequence: TokenSeq, pad_token_id: int) -> TokenSeq:
    """The sequence up to its last trained token, where its reward is read; the one token after it is never seen.

    As transformers, which reads it at the last token that is no padding. A prompt of two tokens and an answer of three, the
    last one its end: five tokens, then one with loss_mask True, whose `source` is the answer's end.
    """
    ids: Sequence[int] = sequence.ids
    last = max(place for place, trained in enumerate(sequence.loss_mask) if trained)
    while last > 0 and ids[last] == pad_token_id:
        last -= 1
    return TokenSeq((*ids[: last + 1], pad_token_id), (False,) * (last + 1) + (True,), sequence.origin)


def at_steps(sequence: TokenSeq, pad_token_id: int) -> TokenSeq:
    """The sequence up to its last marked token, each mark moved one on: what is rated is read at the marked token itself.

    Example: ids 5 6 7 1 9 1, marked the two 1, padding 0: ids 5 6 7 1 9 1 0, loss_mask F F F F T F T.
    """
    ids: Sequence[int] = sequence.ids
    last = max(place for place, marked in enumerate(sequence.loss_mask) if marked)
    return TokenSeq((*ids[: last + 1], pad_token_id), (False, *sequence.loss_mask[: last + 1]), sequence.origin)
