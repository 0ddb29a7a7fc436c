"""What the endpoints do, without HTTP: a request's fields in, an answer under way out, within the limits."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.serve.answering import Answering, Wanted, make_choices
from posttrain.serve.codec import ServedCodec
from posttrain.serve.faults import ApiRefusal, bad_request
from posttrain.serve.meter import Meter
from posttrain.serve.options import ServeOptions
from posttrain.serve.pool import Lease
from posttrain.serve.router import Router
from posttrain.serve.shapers import AnswerShaper, check_bias
from posttrain.serve.shapes import AnswerShape, ChatShape, CompletionShape, EchoedPrompt, listed_logprobs
from posttrain.serve.text import Detokenizer
from posttrain.serve.wire import Asked, ChatAsked, CompletionAsked, DetokenizeAsked, NamedTool, TokenizeAsked

_COMPLETION_TOKENS = 16
"""OpenAI's `max_tokens` of /v1/completions where none is given."""

_UNSEEN_TOOLS = "the chat template of this model does not write tools: describe them in a message"
"""Goes into a header: the model calls what it learned or was told, and its calls are recognised all the same."""


@dataclass(frozen=True)
class Opened:
    """A request that was let in: what answers it, and in which form. `notes` go into the header."""

    answering: Answering
    shape: AnswerShape
    num_asked: int
    """Tokens of the prompts."""
    notes: Sequence[str] = ()

    @property
    def usage(self) -> dict[str, int]:
        asked, said = self.num_asked, self.answering.num_sampled
        return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


class Service:
    def __init__(self, options: ServeOptions, router: Router) -> None:
        self.options, self.router = options, router
        self.is_draining = False
        self.num_open = 0
        """Answers that were let in and have not ended."""
        self._open: set[asyncio.Task[Any]] = set()
        self._ended_s: deque[float] = deque(maxlen=64)
        self.meter = Meter(self._rows, lambda: router.num_swaps)

    def _rows(self) -> tuple[int, int]:
        decoding = min(self.num_open, self.options.max_num_seqs)
        return decoding, self.num_open - decoding

    # --- letting in ---

    @contextlib.asynccontextmanager
    async def open(self, asked: CompletionAsked | ChatAsked) -> AsyncIterator[Opened]:
        """The answers of a request. Raises: ApiRefusal. However it is left, its rows are free and its model is let go."""
        count = (asked.n or 1) * (len(asked.prompts) if isinstance(asked, CompletionAsked) else 1)
        with self._let_in(count):
            lease = await self.router.acquire(asked.model)
            try:
                if isinstance(asked, ChatAsked):
                    yield await self._open_chat(lease, asked)
                else:
                    yield await self._open_completion(lease, asked)
            finally:
                lease.release()

    @contextlib.contextmanager
    def _let_in(self, count: int):
        if self.is_draining:
            raise ApiRefusal(503, "the server is shutting down", code="shutting_down", retry_after_s=5)
        most = self.options.max_num_seqs + self.options.max_queue
        if count > most:
            raise bad_request(f"{count} answers in one request; this server lets in {most} at once", "n")
        if self.num_open + count > most:
            raise ApiRefusal(
                429, f"{self.num_open} answers are under way, of {most}; ask again later", code="queue_full",
                retry_after_s=self._wait_s(count),
            )  # fmt: skip
        self.num_open += count
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            yield
        finally:
            self._open.discard(task)
            self.num_open -= count
            self._ended_s.append(time.monotonic())

    def _wait_s(self, count: int) -> int:
        """When there will be room, as fast as answers ended lately."""
        if len(self._ended_s) < 2:
            return 1
        pace = (self._ended_s[-1] - self._ended_s[0]) / (len(self._ended_s) - 1)
        return max(1, min(60, round(pace * count)))

    async def drain(self, within_s: float) -> None:
        """Let in nobody; return when all have their answers, or it takes too long: then they are told so."""
        self.is_draining = True
        if self._open:
            await asyncio.wait(self._open, timeout=within_s)
        await self.router.close()
        if self._open:
            await asyncio.wait(self._open, timeout=self.options.stall_s)

    # --- completions ---

    async def _open_completion(self, lease: Lease, asked: CompletionAsked) -> Opened:
        codec = lease.served.codec
        wanted_tokens = _COMPLETION_TOKENS if asked.max_tokens is None else asked.max_tokens
        if wanted_tokens == 0 and not asked.echo:
            raise bad_request("max_tokens: 0 needs echo: true; expected at least 1", "max_tokens")
        if asked.echo and asked.stream and wanted_tokens == 0:
            raise bad_request("max_tokens: 0 has nothing to stream", "stream")
        given = asked.prompts
        encoded = await asyncio.to_thread(lambda: [codec.encode(p) if isinstance(p, str) else p for p in given])
        prompts = [codec.check_ids(ids, "prompt") for ids in encoded]
        rooms = [codec.room(prompt, wanted_tokens) for prompt in prompts]
        echoed = [await self._echo(lease, prompt, asked) for prompt in prompts] if asked.echo else []
        number = asked.n or 1
        wanted = Wanted(prompts, rooms, number, asked.logprobs)
        shapers = [_shaper(asked, codec) for _ in range(number * len(prompts))]
        choices = make_choices(lease, asked, wanted, _seed(asked), shapers)
        shape = CompletionShape(lease.served, asked.logprobs, echoed, number)
        return Opened(Answering(lease, choices), shape, sum(map(len, prompts)))

    async def _echo(self, lease: Lease, prompt: tuple[int, ...], asked: CompletionAsked) -> EchoedPrompt:
        served, codec = lease.served, lease.served.codec
        text = codec.text(prompt, codec.hidden_ids)
        if asked.logprobs is None:
            return EchoedPrompt(text, None)
        scores = await served.rows.prompt_scores(prompt, asked.logprobs, served.adapter)
        return EchoedPrompt(text, listed_logprobs(codec, prompt, _offsets(codec, prompt), [None, *scores]))

    # --- chat ---

    async def _open_chat(self, lease: Lease, asked: ChatAsked) -> Opened:
        codec = lease.served.codec
        messages = [turn.message() for turn in asked.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] if asked.calls_tools else []
        _check_tools(codec, asked)
        notes = [] if not tools or codec.writes_tools(messages, tools) else [_UNSEEN_TOOLS]
        ids = await asyncio.to_thread(codec.encode_chat, messages, [] if notes else tools)
        prompt = codec.check_ids(ids, "messages")
        room = codec.room(prompt, asked.most_tokens)
        number, num_top = asked.n or 1, (asked.top_logprobs or 0) if asked.logprobs else None
        grammar = await asyncio.to_thread(_grammar, codec, asked)
        shapers = [_shaper(asked, codec, grammar) for _ in range(number)]
        syntax = codec.call_syntax if asked.calls_tools else None
        shown = _marks(codec) if syntax is not None else ()
        wanted = Wanted([prompt], [room], number, num_top, shown)
        choices = make_choices(lease, asked, wanted, _seed(asked), shapers)
        return Opened(Answering(lease, choices), ChatShape(lease.served, num_top, syntax), len(prompt), notes)

    # --- tokens ---

    async def tokenize(self, asked: TokenizeAsked) -> dict[str, Any]:
        async with self._codec(asked.model) as codec:
            # A long text takes seconds, in which the others are not to wait.
            ids = await asyncio.to_thread(_ids_of, codec, asked)
            return {"count": len(ids), "max_model_len": codec.window, "tokens": list(ids)}

    async def detokenize(self, asked: DetokenizeAsked) -> dict[str, Any]:
        async with self._codec(asked.model) as codec:
            ids = codec.check_ids(asked.tokens, "tokens") if asked.tokens else ()
            return {"prompt": await asyncio.to_thread(codec.decode, ids)}

    @contextlib.asynccontextmanager
    async def _codec(self, model: str | None) -> AsyncIterator[ServedCodec]:
        lease = await self.router.acquire(model or self.router.default)
        try:
            yield lease.served.codec
        finally:
            lease.release()


def _ids_of(codec: ServedCodec, asked: TokenizeAsked) -> tuple[int, ...]:
    if asked.prompt is not None:
        return codec.encode(asked.prompt, asked.add_special_tokens)
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    return codec.encode_chat([turn.message() for turn in asked.messages or ()], tools)


def _offsets(codec: ServedCodec, ids: Sequence[int]) -> list[int]:
    """Where the text of each token begins."""
    detokenizer, offsets, length = Detokenizer(codec.decode, codec.hidden_ids), list[int](), 0
    for token in ids:
        offsets.append(length)
        length += len(detokenizer.push(token))
    return offsets


def _seed(asked: Asked) -> int:
    return secrets.randbits(63) if asked.seed is None else asked.seed


def _shaper(asked: Asked, codec: ServedCodec, grammar: str | None = None) -> AnswerShaper | None:
    """Each answer has its own: a grammar remembers where it is."""
    bias = asked.logit_bias or {}
    check_bias(bias, codec.num_ids)
    shaper = AnswerShaper(asked.presence_penalty or 0.0, asked.frequency_penalty or 0.0, bias, grammar, codec)
    return shaper if shaper.acts else None


def _grammar(codec: ServedCodec, asked: ChatAsked) -> str | None:
    """What the answer must be, where something is asked of it. Raises: ApiRefusal."""
    if asked.wants_json and asked.response_format is not None:
        named = asked.response_format.json_schema
        return codec.grammars.json_schema({"type": "object"} if named is None else named.schema_)
    if codec.call_syntax is not None and asked.forces_call:
        names = [asked.tool_choice.function.name] if isinstance(asked.tool_choice, NamedTool) else list(asked.functions)
        return codec.grammars.calls(codec.call_syntax, {name: asked.functions[name] for name in names})
    return None


def _check_tools(codec: ServedCodec, asked: ChatAsked) -> None:
    """Raises: ApiRefusal where the template has no form for a call, or more is asked than can be promised."""
    if not asked.calls_tools:
        return
    if codec.call_syntax is None:
        raise bad_request(
            "the chat template of this model has no form for tool calls; leave tools out", "tools", "no_tool_calls"
        )
    if asked.parallel_tool_calls is False and not asked.forces_call:
        raise bad_request(
            "parallel_tool_calls: false cannot be promised; leave it out, or set tool_choice: required, which is one call",
            "parallel_tool_calls",
        )


def _marks(codec: ServedCodec) -> Collection[int]:
    """Special tokens that calls are written with."""
    syntax = codec.call_syntax
    assert syntax is not None
    written = "".join((syntax.begin, syntax.open, syntax.close, *syntax.around))
    return frozenset(i for i, token in codec.tokenizer.added_tokens_decoder.items() if str(token) in written)
