"""Episodes: the policy speaks, tools and an environment answer, and it speaks again; all episodes of a batch turn by turn.

What is trained on are the ids that were sampled, in the order in which they were sampled, and ids that the environment wrote between them
(`data/turns.py`). Everything follows from seeds: an episode that was cut short by a crash is played again whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

from posttrain.config.episodes import EpisodeKeys
from posttrain.data.render import continuation_ids
from posttrain.data.tool_calls import SaidCall
from posttrain.data.turns import SampledCall, ids_between, stand_in, text_pieces
from posttrain.environments.pool import EnvironmentPool, PlacedCall
from posttrain.environments.spec import EnvironmentSpec
from posttrain.errors import DataError, PosttrainError, RewardError
from posttrain.models.text import decoder, end_of_turn_id
from posttrain.protocols import Engine, Ranks
from posttrain.recipes.experience.call_syntax import CALL_ID, readable_syntax
from posttrain.rollout.collect import SampleGroups, as_reward_input, sample_groups
from posttrain.rollout.routed import experts_along
from posttrain.rollout.sampling import request_seed
from posttrain.types import (
    Completion,
    Episode,
    Finish,
    Message,
    Prompt,
    PromptRow,
    Request,
    SamplingParams,
    in_order,
)

MAX_FAILED = 0.5
"""Share of the episodes of a batch that may be lost to their environment."""
_MOST_CALLS = 16
"""Calls of one turn that are answered; the model reads that there were more."""
_TOO_MANY = f"error: at most {_MOST_CALLS} calls in a turn"


@dataclass(frozen=True, slots=True)
class Begin:
    """An episode to play: its prompt, the request for its first turn, and the seed of its environment."""

    prompt: Prompt
    request: Request
    env_seed: int


@dataclass(slots=True)
class _Playing:
    """An episode under way. `ids` are those behind the prompt, with what the losses want to know of each."""

    begin: Begin
    place: int
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    parts: list[tuple[Completion, int]] = field(default_factory=list)
    """What was sampled, each with how many ids were written behind it."""
    written: list[Message] = field(default_factory=list)
    """For rewards: what was said."""
    rendered: list[Message] = field(default_factory=list)
    """For the template: the same with stand-ins for what was sampled."""
    last: Sequence[int] = ()
    turn_tokens: list[int] = field(default_factory=list[int])
    turn_rewards: list[float | None] = field(default_factory=list[float | None])
    calls: int = 0
    failed_calls: int = 0
    env_reward: float | None = None
    env_metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    env_s: float = 0.0
    has_ended: bool = False
    """Whether the environment says that this was all."""
    error: str | None = None
    finish: Finish | None = None

    @property
    def turns(self) -> int:
        return len(self.turn_tokens)

    def take(self, completion: Completion) -> None:
        self.turn_tokens.append(len(completion.ids))
        self.turn_rewards.append(None)
        self.last = completion.ids
        self.parts.append((completion, 0))
        self.ids += completion.ids
        self.logp += completion.logp
        self.versions += completion.policy_versions or [completion.policy_version] * len(completion.ids)
        self.sampled += [True] * len(completion.ids)
        if completion.finish != "stop":
            self.finish = completion.finish

    def read(self, ids: Sequence[int]) -> None:
        """What the environment wrote."""
        self.parts[-1] = (self.parts[-1][0], self.parts[-1][1] + len(ids))
        self.ids += ids
        self.logp += [0.0] * len(ids)
        self.versions += [self.versions[-1]] * len(ids)
        self.sampled += [False] * len(ids)

    def earn(self, answers: Sequence[Mapping[str, Any]]) -> bool:
        """What the environment pays for the last turn; whether it says that this was the end."""
        for paid in (answer["reward"] for answer in answers if answer.get("reward") is not None):
            self.env_reward = (self.env_reward or 0.0) + paid
            self.turn_rewards[-1] = (self.turn_rewards[-1] or 0.0) + paid
        self.env_metrics = next((answer["metrics"] for answer in answers if answer.get("metrics")), {})
        self.has_ended = any(answer.get("done") for answer in answers)
        return self.has_ended

    def completion(self) -> Completion:
        episode = Episode(
            tuple(self.sampled), tuple(self.written), self.turns, self.calls, self.failed_calls, self.env_reward, self.env_s, self.error,
            tuple(self.turn_tokens), tuple(self.turn_rewards), self.env_metrics,
        )  # fmt: skip
        first = self.versions[0] if self.versions else 0
        versions = tuple(self.versions) if len(set(self.versions)) > 1 else ()
        return Completion(
            tuple(self.ids), tuple(self.logp), self.finish or "aborted", first, self.place, versions, episode, experts_along(self.parts)
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Standing:
    """A rank's episodes between two turns: those unfinished, all, why some were lost, and what stopped the rank."""

    unfinished: int
    num: int
    lost: Sequence[str]
    error: PosttrainError | None


@dataclass(slots=True)
class _TurnReply:
    """What an episode asks after a turn: calls of its tools, or a step of its environment."""

    playing: _Playing
    calls: Sequence[SaidCall]
    asked: list[PlacedCall]

    @property
    def sampled_calls(self) -> list[SampledCall]:
        start = self.playing.calls - len(self.calls)
        return [SampledCall(name, CALL_ID.format(start + n)) for n, (name, _) in enumerate(self.calls)]


class Episodes:
    """Plays with `pool`, sampling from `engine`. All ranks call `play` together.

    Raises: ConfigError where there are tools, and the tokenizer's template has no form of calls that can be read.
    """

    def __init__(
        self, pool: EnvironmentPool, engine: Engine, tokenizer: Any, ranks: Ranks | None, max_turns: int
    ) -> None:
        self._pool, self._engine, self._tokenizer, self._ranks = pool, engine, tokenizer, ranks
        self._max_turns = max_turns
        self._text, self._raw = decoder(tokenizer), decoder(tokenizer, special=True)
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._ends = special | {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
        self.tools = pool.tools
        self._syntax = readable_syntax(tokenizer, pool.tools) if pool.tools else None

    def groups(
        self, rows: Sequence[PromptRow], num_generations: int, params: SamplingParams,
        seed_parts: Sequence[int], numbers: Sequence[int],
    ) -> list[list[Completion]]:  # fmt: skip
        """As `sample_groups`: the environments of a group begin alike, and the first turn is what a completion alone would be."""
        begins = [
            Begin(prompt, Request(ids, request_seed(*seed_parts, number, sample)), request_seed("env", *seed_parts, number))
            for (prompt, ids), number in zip(rows, numbers, strict=True)
            for sample in range(num_generations)
        ]  # fmt: skip
        played = self.play(begins, params)
        return [played[i : i + num_generations] for i in range(0, len(played), num_generations)]

    def play(self, begins: Sequence[Begin], params: SamplingParams) -> list[Completion]:
        """Each episode to its end; `params.max_tokens` holds for all that stands behind its prompt.

        Raises: RewardError where the environment loses more than half of all ranks'; what stops one rank is raised on all.
        """
        unpaid = 0.0 if self._pool.steps or self._pool.calls_pay else None
        playing = [_Playing(begin, place, env_reward=unpaid) for place, begin in enumerate(begins)]
        error = _stopped_by(self._reset, playing) if self._pool.has_state else None
        while any(standing.unfinished for standing in self._all_standings(playing, error)):
            speaking = [one for one in playing if one.finish is None]
            requests = [self._request(one, params) for one in speaking]
            for one, completion in zip(speaking, in_order(self._engine.generate(requests, params)), strict=True):
                one.take(completion)
            error = _stopped_by(self._answer, speaking, params)
        return [one.completion() for one in playing]

    def _all_standings(self, playing: Sequence[_Playing], error: PosttrainError | None) -> list[_Standing]:
        """Of all ranks: each asks the engine until none has an episode to go on with, and none is left to wait for one that cannot."""
        lost = [one.error for one in playing if one.error]
        mine = _Standing(sum(one.finish is None for one in playing), len(playing), lost, error)
        found = [mine] if self._ranks is None else self._ranks.gather(mine)
        for standing in found:
            if standing.error is not None:
                raise standing.error
        if not any(standing.unfinished for standing in found):
            _refuse_lost([why for standing in found for why in standing.lost], sum(one.num for one in found))
        return found

    def _request(self, one: _Playing, params: SamplingParams) -> Request:
        first = one.begin.request
        seed = request_seed(first.seed, "turn", one.turns) if one.turns else first.seed
        return Request((*first.prompt_ids, *one.ids), seed, params.max_tokens - len(one.ids))

    # --- the environment's side ------------------------------------------------------------------------------------

    def _reset(self, playing: Sequence[_Playing]) -> None:
        asked: list[PlacedCall] = [
            (one.place, {
                "do": "reset", "prompt": as_reward_input(one.begin.prompt.prompt), "seed": one.begin.env_seed,
                "columns": dict(one.begin.prompt.columns),
            })
            for one in playing
        ]  # fmt: skip
        for one, answer in zip(playing, self._pool.ask(asked), strict=True):
            self._account(one, [answer], "reset")

    def _answer(self, speaking: Sequence[_Playing], params: SamplingParams) -> None:
        """All that the episodes ask after this turn, at once; then each reads its answers."""
        replies = [self._reply(one) for one in speaking]
        wanted = [reply for reply in replies if reply is not None]
        answers = iter(self._pool.ask(list(chain.from_iterable(reply.asked for reply in wanted))))
        for reply in wanted:
            self._take(reply, [next(answers) for _ in reply.asked], params)
        if self._pool.takes_turns:
            self._end_cut([reply.playing for reply in wanted])

    def _end_cut(self, played: Sequence[_Playing]) -> None:
        """An environment that takes turns still waits for one where the budget is spent; what it pays for the episode as it is counts."""
        cut = [one for one in played if one.finish == "length" and not one.has_ended]
        for one, answer in zip(cut, self._pool.ask([(one.place, {"do": "cut"}) for one in cut]), strict=True):
            if self._account(one, [answer], "cut"):
                one.earn([answer])

    def _reply(self, one: _Playing) -> _TurnReply | None:
        """What this turn asks of tools or environment. None where the episode ends with it."""
        raw = self._raw(one.last[:-1] if one.last[-1] in self._ends else one.last)
        words, calls = self._syntax.split(raw) if self._syntax else (raw, [])
        if self._syntax and not calls and not self._syntax.is_whole_answer and self._syntax.begin in raw:
            one.calls, one.failed_calls = one.calls + 1, one.failed_calls + 1  # begun, and no call
        if calls:
            one.calls += len(calls)
            asked = [{"do": "call", "name": n, "arguments": json_object(a)} for n, a in calls[:_MOST_CALLS]]
            reply = _TurnReply(one, calls, [(one.place, call) for call in asked])
            shown = [_shown(call, said) for call, said in zip(reply.sampled_calls, calls, strict=True)]
            one.written.append({"role": "assistant", "content": words, "tool_calls": shown})
        else:
            text = self._text(one.last)
            one.written.append({"role": "assistant", "content": text})
            reply = _TurnReply(one, (), [(one.place, {"do": "step", "answer": text})] if self._pool.steps else [])
        one.rendered.append(stand_in(one.turns, reply.sampled_calls))
        if self._pool.takes_turns and one.finish in (None, "length"):
            return self._whole_turn(reply)
        if one.finish is not None:
            return None
        if not reply.asked:
            one.finish = "stop"
        elif calls and one.turns >= self._max_turns and not self._pool.calls_pay:
            one.finish = "length"
        return reply if one.finish is None else None

    def _whole_turn(self, reply: _TurnReply) -> _TurnReply:
        """The last turn too, even if it was cut short: only the environment can say what the episode is worth."""
        one = reply.playing
        calls = [
            {"id": call.id, "name": call.name, "arguments": arguments}
            for call, (_, arguments) in zip(reply.sampled_calls[:_MOST_CALLS], reply.calls, strict=False)
        ]
        is_cut = one.finish == "length"
        is_last = is_cut or one.turns >= self._max_turns
        turn = {"do": "turn", "text": one.written[-1]["content"], "calls": calls, "is_last": is_last, "is_cut": is_cut}
        return replace(reply, asked=[(one.place, turn)])

    def _take(self, reply: _TurnReply, answers: Sequence[Mapping[str, Any]], params: SamplingParams) -> None:
        one = reply.playing
        if not self._account(one, answers, str(reply.asked[0][1]["do"])):
            return
        said = _whole_reply(reply, answers[0]["messages"]) if self._pool.takes_turns else _replies(reply, answers)
        one.written += said
        one.rendered += said
        if one.earn(answers):
            if one.finish is None:
                one.finish = "length" if any(answer.get("was_cut") for answer in answers) else "stop"
            return
        if one.turns >= self._max_turns:
            one.finish = "length"
            return
        try:
            ids = self._between(one, said)
        except DataError as error:
            one.error, one.finish = (
                f"{self._pool.spec.env or 'tools'}: what it wrote cannot be shown: {error}",
                "aborted",
            )
            return
        if len(one.ids) + len(ids) >= params.max_tokens:
            one.finish = "length"
        else:
            one.read(ids)

    def _between(self, one: _Playing, said: Sequence[Message]) -> list[int]:
        prompt = one.begin.prompt
        if isinstance(prompt.prompt, str):
            text = "".join(message["content"] for message in said)
            return continuation_ids(self._tokenizer, self._raw(one.ids), text_pieces(self._tokenizer, text))
        conversation = (*prompt.prompt, *one.rendered)
        return ids_between(self._tokenizer, conversation, prompt.tools or self.tools, one.turns, one.last)

    def _account(self, one: _Playing, answers: Sequence[Mapping[str, Any]], what: str) -> bool:
        """Count what the answers took; False where one of them says that the episode cannot go on."""
        one.env_s += sum(answer.get("env_s", 0.0) for answer in answers)
        failed = next((answer["failed"] for answer in answers if "failed" in answer), None)
        if failed is None:
            return True
        one.error, one.finish = f"{self._pool.spec.env or 'tools'}: {what}: {failed}", "aborted"
        return False


def _replies(reply: _TurnReply, answers: Sequence[Mapping[str, Any]]) -> list[Message]:
    """What was answered to each call, or to the words."""
    if not reply.calls:
        (answer,) = answers
        return [{"role": "user", "content": answer["text"]}] if answer["text"] else []
    unasked = len(reply.calls) - len(answers)
    reply.playing.failed_calls += sum(bool(answer.get("error")) for answer in answers) + unasked
    texts = [answer["text"] for answer in answers] + [_TOO_MANY] * unasked
    return [_tool_message(call, text) for call, text in zip(reply.sampled_calls, texts, strict=True)]


def _whole_reply(reply: _TurnReply, messages: Sequence[Message]) -> list[Message]:
    """All that stands before the next turn: what was answered to the calls first. An environment that ends answers no call."""
    by_id = {call.id: call for call in reply.sampled_calls}
    answered = [_tool_message(by_id[str(m["tool_call_id"])], m["content"]) for m in messages if m["role"] == "tool"]
    unasked = reply.sampled_calls[_MOST_CALLS:] if messages else []
    reply.playing.failed_calls += len(unasked)
    spoken = [message for message in messages if message["role"] != "tool"]
    return [*answered, *(_tool_message(call, _TOO_MANY) for call in unasked), *spoken]


def _tool_message(call: SampledCall, text: Any) -> Message:
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}


class NoEnvironment:
    """Of a stage whose completions are one turn."""

    tools: tuple[Mapping[str, Any], ...] = ()

    def close(self) -> None:
        pass


def environment_of(keys: EpisodeKeys) -> EnvironmentPool | NoEnvironment:
    """What the keys name, started. Raises: ConfigError."""
    if not keys.plays:
        return NoEnvironment()
    return EnvironmentPool(environment_spec(keys), keys.env_timeout_s, keys.env_workers).open()


def environment_spec(keys: EpisodeKeys) -> EnvironmentSpec:
    return EnvironmentSpec(keys.env, tuple(keys.tools))


def sampler(
    environment: EnvironmentPool | NoEnvironment, engine: Engine, tokenizer: Any, ranks: Ranks | None, keys: EpisodeKeys
) -> tuple[SampleGroups, Episodes | None]:
    """How groups are made: a completion each, or an episode each. Raises: ConfigError."""
    if isinstance(environment, NoEnvironment):
        return partial(sample_groups, engine), None
    episodes = Episodes(environment, engine, tokenizer, ranks, keys.max_turns)
    return episodes.groups, episodes


def json_object(text: str) -> dict[str, Any]:
    """The arguments of a call, which its syntax has parsed once."""
    return json.loads(text)


def _shown(call: SampledCall, said: SaidCall) -> dict[str, Any]:
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": json_object(said[1])}}


def _stopped_by(work: Callable[..., None], *given: Any) -> PosttrainError | None:
    try:
        work(*given)
    except PosttrainError as error:
        return error
    return None


def _refuse_lost(errors: Sequence[str], num: int) -> None:
    """Raises: RewardError."""
    if len(errors) > MAX_FAILED * num:
        first = " | ".join(list(dict.fromkeys(errors))[:3])
        raise RewardError(
            f"{len(errors)} of {num} episodes were lost to their environment; at most {MAX_FAILED:.0%} may be. First reasons: {first}. "
            "Fix the environment, or raise env_timeout_s if it is slow"
        )
