"""A judge, loaded: its questions to an OpenAI-compatible server or a model in this process, its answers kept on disk by digest."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPException
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from posttrain.config.judge import JudgeKeys
from posttrain.config.load import load_judge
from posttrain.config.paths import resolve_path
from posttrain.config.stages import ModelKeys
from posttrain.data.cache import cache_root
from posttrain.data.render import chat_ids
from posttrain.errors import ConfigError, DataError, ModelError, RewardError
from posttrain.files import digest_json, read_json, write_json
from posttrain.grading.learned import learned_source
from posttrain.models.load import load_config, load_tokenizer, missing_chat_template
from posttrain.models.provenance import source_digest
from posttrain.models.text import decoder
from posttrain.names import JUDGE
from posttrain.recipes.experience.engines import EngineSource, make_engine
from posttrain.rewards.learned import Opinion
from posttrain.rewards.library import text_of
from posttrain.rewards.verdicts import JudgeQuestion, JudgeReply, NothingToJudgeError, VerdictForm
from posttrain.rollout.sampling import request_seed
from posttrain.types import Request, SamplingParams, in_order
from posttrain.uris import without_secrets

_FORM = 1
"""Of what is kept of an answer."""
_BUSY = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_WAIT_S = 0.5
"""Before a question is put again; twice as long each time."""
_MAX_CHARS = 300
_MAX_ANSWER_BYTES = 1 << 24
_PIECE = 1 << 16
_MOST_TOKENS = 1 << 40
"""What a server may say that one answer took: it is added up as a float."""
_NOBODY = 8
"""So many questions in a row without an answer: nobody is there, and the rest would wait for hours."""

Messages = list[dict[str, str]]
AskedJudge = tuple[Messages, int]
"""A question as it is put, with the seed of its answer."""


class JudgeModel(Protocol):
    """Who answers: `identity` is what verdicts are kept under, beside what was asked."""

    @property
    def identity(self) -> str: ...

    def replies(self, questions: Sequence[AskedJudge]) -> Generator[tuple[int, JudgeReply]]:
        """One to each of (messages, seed), with its place, as they come. A question that failed has its reason."""
        ...

    def close(self) -> None: ...


class JudgeReward:
    """A `LearnedReward`: verdicts on completions, each question asked of whoever answers unless its answer is known."""

    rounding = 0.0

    def __init__(self, keys: JudgeKeys, asked: JudgeModel) -> None:
        self._keys, self._asked = keys, asked
        criteria = tuple((one.criterion, one.weight) for one in keys.rubric)
        self._judging = VerdictForm(keys.asked, re.compile(keys.verdict), keys.scale, criteria, keys.against)
        self._cache = Path(keys.cache) if keys.cache else cache_root().parent / "verdicts"

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> list[Opinion]:
        """Raises: RewardError for a column that is not there; with `on_failure: stop` for the first that has no verdict."""
        rows = [
            self._questions(prompt, completion, {name: column[place] for name, column in columns.items()})
            for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        ]
        wanted = [one for row in rows if not isinstance(row, str) for one in self._put(row)]
        replies = iter(self.replies(wanted))
        opinions = [
            Opinion(None, row) if isinstance(row, str)
            else self._judging.opinion([(question, [next(replies) for _ in self._samples]) for question in row])
            for row in rows
        ]  # fmt: skip
        failed = next((opinion.error for opinion in opinions if opinion.error is not None), None)
        if failed is not None and self._keys.on_failure == "stop":
            raise RewardError(f"judge {self._asked.identity}: {failed}; on_failure: stop ends the run here")
        return opinions

    @property
    def is_served(self) -> bool:
        """Whether it is asked at a server, where another model may come to answer."""
        return self._keys.url is not None

    def asked(self, prompt: Any, completion: Any, columns: Mapping[str, Any]) -> list[AskedJudge]:
        """All that is asked about one completion; nothing where its row lacks what the judge is to read."""
        row = self._questions(prompt, completion, columns)
        return [] if isinstance(row, str) else self._put(row)

    def verdicts(self, asked: Sequence[AskedJudge], *, anew: bool = False) -> list[float | None]:
        """Question by question, 0 to 1, of A in a comparison; `anew` asks also for what is kept, and keeps nothing."""
        return [self._judging.read(reply, JudgeQuestion(""))[0] for reply in self.replies(asked, anew=anew)]

    def close(self) -> None:
        self._asked.close()

    def _put(self, row: Sequence[JudgeQuestion]) -> list[AskedJudge]:
        return [(self._messages(question), self._seed(sample)) for question in row for sample in self._samples]

    @property
    def _samples(self) -> range:
        return range(self._keys.samples)

    def _seed(self, sample: int) -> int:
        return self._keys.seed + sample

    def _questions(self, prompt: Any, completion: Any, columns: Mapping[str, Any]) -> list[JudgeQuestion] | str:
        """Or why there is nothing to ask."""
        try:
            return self._judging.questions(_as_text(prompt), text_of(completion), columns)
        except NothingToJudgeError as error:
            return str(error)

    def _messages(self, question: JudgeQuestion) -> Messages:
        system = [{"role": "system", "content": self._keys.system}] if self._keys.system else []
        return [*system, {"role": "user", "content": question.text}]

    def replies(self, wanted: Sequence[AskedJudge], *, anew: bool = False) -> list[JudgeReply]:
        """What is on disk is not asked again unless `anew`, nor is anything twice at once; nor is what is left when the server has gone.

        Raises: RewardError where it was never there.
        """
        paths = [self._path(messages, seed) for messages, seed in wanted]
        found = {path: None if anew else _kept(path) for path in dict.fromkeys(paths)}
        new = {path: question for path, question in zip(paths, wanted, strict=True) if found[path] is None}
        places, answered, silent = list(new), False, 0
        with closing(self._asked.replies(list(new.values()))) as replies:
            for place, reply in replies:
                found[places[place]] = reply
                if reply.text is not None:
                    if not anew:
                        self._keep(places[place], reply)
                    answered, silent = True, 0
                    continue
                silent += reply.unanswered
                if silent >= _NOBODY and not answered:
                    raise RewardError(f"{silent} questions and no answer yet: {reply.error}; start the server, or see to `url` and `timeout_s`")  # fmt: skip
                if silent >= _NOBODY:
                    gone = JudgeReply(None, f"not asked, for the last {silent} had no answer: {reply.error}", unanswered=True)  # fmt: skip
                    found |= {path: gone for path in places if found[path] is None}
                    break
        return [cast("JudgeReply", found[path]) for path in paths]

    def _keep(self, path: Path, reply: JudgeReply) -> None:
        """Raises: RewardError; an answer that is not kept would be paid for again, and may be another then."""
        try:
            write_json(path, {"text": reply.text, "tokens": reply.tokens, "cut": reply.cut})
        except OSError as error:
            raise RewardError(f"judge: its answer cannot be kept in {self._cache} ({error}); set `cache` in the judge's file to a folder that can be written") from None  # fmt: skip

    def _path(self, messages: Messages, seed: int) -> Path:
        keys = self._keys
        how = [keys.temperature, keys.max_tokens, seed]
        name = digest_json([_FORM, self._asked.identity, how, messages]).removeprefix("sha256:")
        return self._cache / name[:2] / f"{name}.json"


def _kept(path: Path) -> JudgeReply | None:
    try:
        record = read_json(path)
        text, tokens, cut = record["text"], record["tokens"], record.get("cut") is True
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (
        JudgeReply(text, tokens=tokens, cached=True, cut=cut)
        if isinstance(text, str) and isinstance(tokens, int)
        else None
    )


def _as_text(prompt: Any) -> str:
    """A question as it stands, a conversation as its turns."""
    if isinstance(prompt, str):
        return prompt
    turns = [(str(message.get("role")), text_of([{**message, "role": "assistant"}])) for message in prompt]
    return turns[0][1] if len(turns) == 1 else "\n\n".join(f"{role}: {text}" for role, text in turns)


# --- a server ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgeServer:
    """OpenAI's chat completions at `url`, many at once. The API key comes from the environment and goes nowhere else."""

    keys: JudgeKeys
    identity: str

    def replies(self, questions: Sequence[AskedJudge]) -> Generator[tuple[int, JudgeReply]]:
        threads = ThreadPoolExecutor(self.keys.at_once)
        try:
            asked = {threads.submit(self._reply, *question): place for place, question in enumerate(questions)}
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Each question has a connection of its own."""

    def _reply(self, messages: Messages, seed: int) -> JudgeReply:
        keys = self.keys
        body = {"model": keys.model, "messages": messages, "max_tokens": keys.max_tokens, "temperature": keys.temperature, "seed": seed}  # fmt: skip
        why, refused = "", False
        for attempt in range(keys.retries + 1):
            if attempt:
                time.sleep(_WAIT_S * 2 ** (attempt - 1))
            try:
                return _read_reply(self._call(json.dumps(body).encode()))
            except urllib.error.HTTPError as error:
                why, refused = f"answered {error.code}: {_said(error)}", error.code not in _BUSY
            # Nobody there, too late, cut off, no HTTP, no JSON.
            except (OSError, HTTPException, ValueError, RecursionError) as error:
                why = f"did not answer: {error!s}"
            if refused:
                break
        return JudgeReply(
            None, f"the judge at {keys.url} {self._without_key(why)[:_MAX_CHARS]}", unanswered=not refused
        )

    def _call(self, body: bytes) -> Any:
        """Raises: OSError, HTTPException, ValueError."""
        token = judge_key(self.keys)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
        request = urllib.request.Request(f"{self.keys.url}/chat/completions", body, headers)
        opener = urllib.request.build_opener(*_no_proxy(self.keys.url or ""), _NoRedirects)
        end = time.monotonic() + self.keys.timeout_s
        found = bytearray()
        with opener.open(request, timeout=self.keys.timeout_s) as answer:
            while piece := answer.read1(_PIECE):
                found += piece
                if len(found) > _MAX_ANSWER_BYTES:
                    raise ValueError(f"over {_MAX_ANSWER_BYTES} bytes")
                if time.monotonic() > end:  # the timeout of a socket is that of each piece
                    raise TimeoutError("timed out")
        return json.loads(found)

    def _without_key(self, said: str) -> str:
        """Some servers repeat the key that they refuse."""
        key = judge_key(self.keys)
        return without_secrets(said.replace(key, "…") if key else said)


def judge_key(keys: JudgeKeys) -> str:
    """Raises: ConfigError, which does not repeat it, for what no header can hold."""
    key = os.environ.get(keys.token_env, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{keys.token_env}: got an API key with line breaks or characters beyond ASCII; expected the key alone")  # fmt: skip
    return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """An API key is for the server that was named."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _no_proxy(url: str) -> list[urllib.request.ProxyHandler]:
    """A server of this machine is not asked through a proxy."""
    host = urlsplit(url).hostname or ""
    try:
        here = ip_address(host).is_loopback
    except ValueError:
        here = host == "localhost"
    return [urllib.request.ProxyHandler({})] if here else []


def _read_reply(answer: Any) -> JudgeReply:
    """Raises: ValueError for what is no chat completion."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        cut = choice.get("finish_reason") == "length"
        tokens = (answer.get("usage") or {}).get("total_tokens") or 0
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"expected a chat completion, got {json.dumps(answer)[:80]} ({error!r})") from error
    if not isinstance(text, str) or not isinstance(tokens, int) or not 0 <= tokens < _MOST_TOKENS:
        raise ValueError(f"expected text and a number of tokens, got {json.dumps([text, tokens])[:80]}")
    return JudgeReply(text, tokens=tokens, cut=cut)


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return " ".join(error.read(2000).decode("utf-8", "replace").split())
    except (OSError, HTTPException):
        return "and hung up"


# --- a model in this process ---------------------------------------------------------------------------------------


class LocalJudge:
    """A model of this process, which our engine decodes."""

    def __init__(self, keys: JudgeKeys, device: str) -> None:
        model = ModelKeys.model_validate({"base_model": keys.model, "device": device})
        self.identity = source_digest(keys.model)
        self._params = SamplingParams(max_tokens=keys.max_tokens, temperature=keys.temperature)
        self._tokenizer = load_tokenizer(model)
        if missing_chat_template(self._tokenizer):
            raise ModelError(f"judge: {keys.model} has no chat template; expected a model that answers in chats")
        self._decode = decoder(self._tokenizer)
        self._longest = getattr(load_config(model).get_text_config(), "max_position_embeddings", None)
        self._engine = make_engine(EngineSource(model))

    def replies(self, questions: Sequence[AskedJudge]) -> Generator[tuple[int, JudgeReply]]:
        requests: list[tuple[int, Request]] = []
        for place, (messages, seed) in enumerate(questions):
            try:
                ids = self._ids(messages)
            except DataError as error:
                yield place, JudgeReply(None, f"the judge cannot read it: {error}")
            else:
                requests.append((place, Request(ids, request_seed("judge", seed, digest_json(messages)))))
        answers = (
            in_order(self._engine.generate([request for _, request in requests], self._params)) if requests else []
        )
        for (place, request), answer in zip(requests, answers, strict=True):
            tokens = len(request.prompt_ids) + len(answer.ids)
            yield place, JudgeReply(self._decode(answer.ids), tokens=tokens, cut=answer.finish == "length")

    def _ids(self, messages: Messages) -> tuple[int, ...]:
        """Raises: DataError."""
        if not all(_is_text(message["content"]) for message in messages):
            raise DataError("it holds half a character (a lone surrogate)")
        ids = chat_ids(self._tokenizer, tuple(cast("Any", messages)))
        if self._longest is not None and len(ids) + self._params.max_tokens > self._longest:
            raise DataError(
                f"{len(ids)} tokens and {self._params.max_tokens} of its answer, and the judge takes {self._longest}"
            )
        return ids

    def close(self) -> None:
        self._engine.close()


def _is_text(value: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def check_judges(specs: Sequence[str], folder: Path | None = None) -> None:
    """What can be found without asking anybody: the keys of each judge among these rewards, and its API key. Raises: ConfigError."""
    for spec in specs:
        if spec.startswith(JUDGE) and (keys := load_judge(Path(learned_source(spec, folder)))).url is not None:
            judge_key(keys)


def load_judge_reward(file: Path | str, device: str) -> JudgeReward:
    """Raises: ConfigError, ModelError."""
    keys = load_judge(Path(file))
    if keys.url is None:  # at a server it is a name, whatever lies beside the file
        keys = keys.model_copy(update={"model": resolve_path(keys.model, Path(file).parent)})
    else:
        judge_key(keys)
    return asked_judge(keys, device)


def asked_judge(keys: JudgeKeys, device: str = "auto") -> JudgeReward:
    """At its server, or loaded here; its answers are kept."""
    asked = LocalJudge(keys, device) if keys.url is None else JudgeServer(keys, f"{keys.url} {keys.model}")
    return JudgeReward(keys, asked)
