"""A model with transformers' sequence-classification head: its reward after every token, and which token's is the answer's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from posttrain.errors import ModelError
from posttrain.types import TokenSeq


class _RewardPerToken:
    """transformers gives the reward of a row's last token alone; packed rows need it where each of them ends."""

    base_model: Any
    score: Any

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **options: Any) -> Any:
        """Shapes: [1, N] → logits [1, M, 1] at the M places to keep; all N where none are named."""
        options.pop("labels", None)  # which PEFT hands on, also where there are none
        hidden = self.base_model(input_ids=input_ids, **options).last_hidden_state
        kept = slice(None) if isinstance(logits_to_keep, int) else logits_to_keep
        return SequenceClassifierOutputWithPast(logits=self.score(hidden[:, kept]))


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
