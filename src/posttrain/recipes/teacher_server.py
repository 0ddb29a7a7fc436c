"""A teacher behind OpenAI's completions: it echoes given token ids with their log-probs, as `posttrain serve` and vLLM do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from posttrain.errors import ModelError
from posttrain.files import digest_json, digest_start
from posttrain.models.text import decoder
from posttrain.rollout.http import Client, RefusedError
from posttrain.types import Sample

_AT_ONCE = 32
"""Sequences of one request."""
_IDS_AT_ONCE = 4096


@dataclass(frozen=True)
class ServerScorer:
    """A `Scorer`: the model that a server has under this name, at temperature 1."""

    client: Client
    model: str

    def logp(self, groups: Sequence[Sequence[Sample]]) -> list[np.ndarray]:
        samples = [sample for group in groups for sample in group]
        return [logp for at in range(0, len(samples), _AT_ONCE) for logp in self._some(samples[at : at + _AT_ONCE])]

    def _some(self, samples: Sequence[Sample]) -> Iterator[np.ndarray]:
        body = {"model": self.model, "prompt": [sample.ids.tolist() for sample in samples]}
        asked = {"echo": True, "max_tokens": 0, "logprobs": 0, "temperature": 1.0}
        answer = self.client.call("POST", "/v1/completions", body | asked)
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for sample, choice in zip(samples, choices, strict=True):
            yield self._of_one(sample, choice["logprobs"]["token_logprobs"])

    def _of_one(self, sample: Sample, logprobs: Sequence[float | None]) -> np.ndarray:
        """Of the trained tokens. Raises: ModelError unless there is one for each token that was sent."""
        found = [logprob for logprob, trained in zip(logprobs, sample.loss_mask, strict=False) if trained]
        if len(logprobs) != len(sample.ids) or any(logprob is None for logprob in found):
            raise ModelError(
                f"teachers: {self.model} at {self.client.address} gave {len(logprobs)} log-probs for {len(sample.ids)} token ids; expected "
                "one each, from a server that echoes token ids (`posttrain serve`, vLLM)"
            )
        return np.array(found, np.float32)


def check_vocabulary(client: Client, model: str, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    """Compares what every id means, by digest. Raises: ModelError for another vocabulary."""
    ids = range(max(tokenizer.get_vocab().values()) + 1)
    parts = [list(ids[at : at + _IDS_AT_ONCE]) for at in range(0, len(ids), _IDS_AT_ONCE)]
    decode = decoder(tokenizer, special=True)
    ours = digest_json([decode(part) for part in parts])
    try:
        theirs = digest_json([_detokenized(client, model, part) for part in parts])
    except RefusedError as error:
        raise ModelError(
            f"teachers.{number}: {model} at {client.address} cannot say what the policy's {len(ids)} token ids mean, so that the vocabularies "
            f"could be compared ({error}); expected a server with /detokenize (`posttrain serve`, vLLM) that has this model"
        ) from error
    if ours != theirs:
        raise ModelError(
            f"teachers.{number}: {model} at {client.address} has another vocabulary (digest {digest_start(theirs)}…) than the policy "
            f"({digest_start(ours)}…), so its log-probs are of other tokens; serve a model with the policy's tokenizer"
        )


def _detokenized(client: Client, model: str, ids: list[int]) -> Any:
    return client.call("POST", "/detokenize", {"model": model, "tokens": ids})["prompt"]
