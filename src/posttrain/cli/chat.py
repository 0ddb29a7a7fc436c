"""`posttrain chat MODEL`: a conversation through the chat template and the embedded engine, on a terminal or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.terminal import printable
from posttrain.errors import ModelError

if TYPE_CHECKING:
    from posttrain.types import Message, SamplingParams

HELP = "/reset forgets the conversation, /exit ends it."


def chat(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this, print the answer and end.")] = None,
    system: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Nucleus sampling.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same questions: same answers.")] = 0,
) -> None:
    """Talk to a model. Piped lines are one question each; /reset forgets the conversation, /exit ends it."""
    from posttrain.cli.model import model_keys
    from posttrain.types import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p)
    talk = _load(model_keys(model), params, system, seed)
    if not talk.has_template:
        typer.echo("no chat template: every line is continued as plain text, without history", err=True)
    for line in [prompt] if prompt is not None else _lines():
        if prompt is None and line in ("/exit", "/quit"):
            break
        if prompt is None and line == "/reset":
            talk.reset()
            continue
        try:
            answer = talk.answer(line)
            typer.echo(printable(answer) if sys.stdout.isatty() else answer)
        except _TooLong as error:
            if prompt is not None or not sys.stdin.isatty():
                raise
            typer.echo(str(error), err=True)


class _TooLong(ModelError):
    """The conversation does not fit the model's window."""


@dataclass
class Conversation:
    """What was said so far, and the engine that answers."""

    engine: Any
    codec: Any
    params: SamplingParams
    window: int | None
    system: str | None = None
    seed: int = 0
    history: list[Message] = field(default_factory=list)
    turn: int = 0

    @property
    def has_template(self) -> bool:
        return bool(getattr(self.codec.tokenizer, "chat_template", None))

    def answer(self, text: str) -> str:
        """The model's answer, remembered with its question. Raises: ModelError if the window is full."""
        from posttrain.rollout.sampling import request_seed
        from posttrain.types import Request

        question: Message = {"role": "user", "content": text}
        first: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        asked = (*first, *self.history, question) if self.has_template else text
        ids = self.codec.encode_prompt(asked)
        room = self.params.max_tokens if self.window is None else min(self.params.max_tokens, self.window - len(ids))
        if room < 1:
            raise _TooLong(
                f"the conversation is {len(ids)} tokens long and the model's window is {self.window}; /reset starts over"
            )
        request = Request(ids, request_seed("chat", self.seed, self.turn))
        [completion] = self.engine.generate([request], replace(self.params, max_tokens=room))
        said = self.codec.decode(completion.ids)
        self.turn += 1
        self.history += [question, {"role": "assistant", "content": said}]
        return said

    def reset(self) -> None:
        self.history.clear()
        self.turn = 0


def _load(keys: Any, params: SamplingParams, system: str | None, seed: int) -> Conversation:
    from posttrain.models.load import load_policy
    from posttrain.pipeline.show import quiet_libraries
    from posttrain.recipes.experience.engines import EngineSource, make_engine
    from posttrain.recipes.measure.evaluate import TokenizerCodec

    quiet_libraries()
    policy = load_policy(keys, trainable=False)
    engine = make_engine(EngineSource(keys, policy), rows=1)
    window = getattr(policy.base.config.get_text_config(), "max_position_embeddings", None)
    return Conversation(engine, TokenizerCodec(policy.tokenizer), params, window, system, seed)


def _lines() -> Iterator[str]:
    """Questions: typed after a prompt on a terminal, one per line from a pipe. Empty lines are passed over."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` its line editing

        typer.echo(HELP, err=True)
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else sys.stdin.readline()
        except EOFError:
            return
        if not line and not sys.stdin.isatty():
            return
        if line.strip():
            yield line.strip()
