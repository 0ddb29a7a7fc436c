"""SGLang behind HTTP, given by URL: token ids in, ids and log-probs out, weights as a checkpoint on disk.

Written from its documentation; bodies are held to examples of it by tests. It has never been run against SGLang.
Source: docs.sglang.io, native API, sampling parameters, SGLang for RL systems (2026-03).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file

from posttrain.errors import EngineError
from posttrain.protocols import Weights
from posttrain.rollout.folder import OwnFolder
from posttrain.rollout.http import Address, Client, RefusedError
from posttrain.rollout.transfer.whole import num_bytes, portions
from posttrain.rollout.vllm.asking import Decode, kept_length
from posttrain.types import Completion, EngineInfo, Finish, Moved, Request, SamplingParams
from posttrain.uris import loopback

SEED_BITS = 31
_LONGEST_S = 24 * 3600.0
_BEAT_S = 2.0
_FINISH: Mapping[str, Finish] = {"stop": "stop", "length": "length", "abort": "aborted"}
_Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: Mapping[str, _Dtype] = {
    "float32": "float32", "float": "float32", "bfloat16": "bfloat16", "float16": "float16", "half": "float16",
}  # fmt: skip
DETERMINISTIC = {"enable_deterministic_inference": "--enable-deterministic-inference"}
"""What a server must have been started with: without it SGLang does not read the seed of a request."""


@dataclass(frozen=True)
class SGLangOptions:
    """How a server is used. `config`: the base's config.json; `stored_dtype`: its dtype, which `--dtype auto` goes by.

    `at_once`: requests under way. `stop_token_ids`: what ends a completion besides what a request says.
    """

    config: str
    stored_dtype: str
    stop_token_ids: tuple[int, ...]
    at_once: int
    update_timeout_s: float


class SGLangEngine:
    """The engine of one server. Log-probs are those at the temperature, before the cuts.

    Raises, from what asks the server: EngineGoneError where it ended or hangs, EngineError where it refuses.
    """

    def __init__(self, client: Client, options: SGLangOptions, decode: Decode) -> None:
        self._client, self._options, self._decode = client, options, decode
        found: Mapping[str, Any] = client.call("GET", "/server_info")
        missing = [flag for name, flag in DETERMINISTIC.items() if not found[name]]
        if missing:
            raise EngineError(f"SGLang at {client.address} was started without {' '.join(missing)}; start it with that")
        self._release = str(found["version"])
        self._dtype: _Dtype = _dtype(str(found["dtype"]), options.stored_dtype)
        self._longest = int(found["max_req_input_len"])
        self._version, self._label, self._pushes = 0, "", count(1)
        self._under_way = 0
        self._folder = OwnFolder()

    @property
    def policy_version(self) -> int:
        return self._version

    def describe(self) -> EngineInfo:
        return EngineInfo("sglang", self._release, self._dtype, "uncut", SEED_BITS, exact_resume=False)

    # --- sampling --------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """The seed of a request decides its tokens; another engine draws others from the same seed."""
        for number, request in enumerate(requests):
            if not request.prompt_ids:
                raise EngineError(
                    f"request {number} has an empty prompt; expected at least one token (a BOS, for example)"
                )
            self._check_length(f"request {number}", len(request.prompt_ids) + request.most(params))
        return self._completions(requests, params)

    def _completions(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        bodies = [generate_body(request, params, self._options.stop_token_ids) for request in requests]
        for place, answer in self._answers(bodies):
            self._check_version(answer)
            ids, logp = sampled(answer)
            kept = kept_length(ids, params.stop, self._decode)
            finish = sglang_finish(answer["meta_info"]["finish_reason"])
            yield Completion(ids[:kept], logp[:kept], finish, self._version, place)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        """At temperature 1 only. Raises: EngineError at another."""
        if temperature != 1.0:
            raise EngineError(f"SGLang scores given tokens at temperature 1 only, got {temperature}")
        for ids, start in sequences:
            if not 1 <= start <= len(ids):
                raise EngineError(
                    f"score: start={start} of a sequence of {len(ids)} tokens; the first token has no log-prob"
                )
            self._check_length("score", len(ids) + 1)
        found: list[list[float]] = [[] for _ in sequences]
        for place, answer in self._answers([score_body(ids, start) for ids, start in sequences]):
            found[place] = scored(answer, *sequences[place])
        return found

    def _answers(self, bodies: Sequence[dict[str, Any]]) -> Iterator[tuple[int, Any]]:
        """As they end. Who stops asking for more ends the others: the server is hung up on."""
        left = len(bodies)
        self._under_way += left
        calls = self._client.calls(
            "/generate", bodies, at_once=self._options.at_once, timeout_s=_LONGEST_S, beat=self._beat, every_s=_BEAT_S
        )
        try:
            with closing(calls):
                for place, answer in calls:
                    left -= 1
                    self._under_way -= 1
                    yield place, answer
        finally:
            self._under_way -= left

    def _beat(self) -> None:
        self._client.call("GET", "/health")

    def _check_length(self, what: str, wanted: int) -> None:
        if wanted > self._longest:
            raise EngineError(f"{what}: {wanted} tokens; SGLang at {self._client.address} takes {self._longest}")

    def _check_version(self, answer: Mapping[str, Any]) -> None:
        label = str(answer["meta_info"]["weight_version"])
        if self._label and label != self._label:
            raise EngineError(
                f"SGLang at {self._client.address} sampled with weights {label!r}, the last push was {self._label!r}: "
                "somebody else updates it; give each run a server of its own"
            )

    # --- weights ---------------------------------------------------------------------------------------------------

    def update(self, weights: Weights, version: int) -> Moved:
        """The whole model, an adapter merged into it, as a checkpoint that the server reads and that is then removed.

        Raises: EngineError while completions are being sampled.
        """
        if self._under_way:
            raise EngineError(
                f"weights of version {version} came while completions of version {self._version} are being sampled; "
                "take these, or close their iterator, first"
            )
        label = f"{version}.{next(self._pushes)}"
        folder = self._folder.path / label
        moved = write_checkpoint(weights, folder, self._options.config)
        try:
            answer = self._client.call(
                "POST", "/update_weights_from_disk", update_body(folder, label), self._options.update_timeout_s
            )
        except RefusedError as error:
            raise EngineError(f"SGLang could not take its weights: {error}") from error
        finally:
            shutil.rmtree(folder)
        if not answer["success"]:
            raise EngineError(f"SGLang could not take its weights: {answer['message']}")
        self._version, self._label = version, label
        return Moved(moved, moved)

    def rest(self) -> None:
        """Somebody else's, which nobody here puts to sleep."""

    def close(self) -> None:
        self._folder.remove()


def given_sglang(url: str, token: str, timeout_s: float, options: SGLangOptions, decode: Decode) -> SGLangEngine:
    """Raises: EngineGoneError where nobody answers, EngineError for a server that was started otherwise than we need."""
    return SGLangEngine(Client(Address(*loopback(url)), token, timeout_s), options, decode)


def sglang_version(url: str, token: str, timeout_s: float) -> str:
    """Raises: EngineGoneError."""
    return str(Client(Address(*loopback(url)), token, timeout_s).call("GET", "/server_info")["version"])


def generate_body(request: Request, params: SamplingParams, stop_token_ids: Sequence[int]) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": request.most(params), "temperature": params.temperature, "top_p": params.top_p,
        "top_k": params.top_k or -1, "min_p": params.min_p, "ignore_eos": True,
        "stop_token_ids": sorted({*stop_token_ids, *params.stop_token_ids}),
        "sampling_seed": request.seed & ((1 << SEED_BITS) - 1),
        # The strings are looked for in all of the text, and the token that completes one is part of the answer.
        "no_stop_trim": True, "skip_special_tokens": False, "spaces_between_special_tokens": False,
    }  # fmt: skip
    if params.stop:
        options["stop"] = list(params.stop)
    return {"input_ids": list(request.prompt_ids), "sampling_params": options, "return_logprob": True}


def score_body(ids: Sequence[int], start: int) -> dict[str, Any]:
    # The first token from `logprob_start_len` on has no log-prob there.
    return {
        "input_ids": list(ids), "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True, "logprob_start_len": start - 1,
    }  # fmt: skip


def update_body(folder: Path, label: str) -> dict[str, Any]:
    return {"model_path": str(folder), "flush_cache": True, "weight_version": label}


def sampled(answer: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Ids and log-probs. Raises: EngineError where the log-probs are of other tokens than the text's last ones."""
    rows = answer["meta_info"]["output_token_logprobs"]
    ids = tuple(int(row[1]) for row in rows)
    # Some releases put the end of the prompt before them.
    found = answer["output_ids"][-len(ids) :] if ids else []
    if list(ids) != list(found):
        raise EngineError(f"SGLang gave log-probs of the tokens {list(ids)[:5]}, and sampled {list(found)[:5]}")
    return ids, tuple(float(row[0]) for row in rows)


def scored(answer: Mapping[str, Any], ids: Sequence[int], start: int) -> list[float]:
    """Log-probs of `ids[start:]`. Raises: EngineError where they are of other tokens."""
    rows = answer["meta_info"]["input_token_logprobs"][1:]
    if [int(row[1]) for row in rows] != list(ids[start:]):
        raise EngineError(f"SGLang scored {len(rows)} tokens, asked were {len(ids) - start}, or others were scored")
    return [float(row[0]) for row in rows]


def sglang_finish(reason: Mapping[str, Any]) -> Finish:
    """Raises: EngineError for an end that is none of ours."""
    if reason["type"] not in _FINISH:
        raise EngineError(f"SGLang ended a completion with {reason['type']!r}; expected stop, length or abort")
    return _FINISH[reason["type"]]


def write_checkpoint(weights: Weights, folder: Path, config: str) -> int:
    """Shards with their index, as transformers writes them. Returns their bytes."""
    folder.mkdir(parents=True)
    names: dict[str, str] = {}
    total = 0
    for number, portion in enumerate(portions(weights.weights("all"))):
        file = f"model-{number:05d}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in portion}, folder / file)
        names |= {name: file for name, _ in portion}
        total += num_bytes(portion)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(config)
    return total


def _dtype(said: str, stored: str) -> _Dtype:
    """What it computes in; `auto` is that of the file, and half precision for one in float32."""
    if said == "auto":
        return "bfloat16" if stored == "bfloat16" else "float16"
    if said not in _DTYPES:
        raise EngineError(f"SGLang computes in {said}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[said]
