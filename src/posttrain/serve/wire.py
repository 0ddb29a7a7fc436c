"""What may be asked, in OpenAI's words: every field is acted on, changes nothing, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_MOST_LOGPROBS = 20
_MOST_CHOICES = 128
_MOST_STOPS = 16
_MOST_PROMPTS = 128
_LONGEST_TEXT = 1 << 30
_LARGEST_ID = (1 << 31) - 1


def _one_or_many(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_or_many), Field(max_length=_MOST_STOPS)
]
TokenIds = list[Annotated[int, Field(ge=0, le=_LARGEST_ID, strict=True)]]


class Wire(BaseModel):
    # With a longest text pydantic reads each as Unicode, and refuses half a surrogate pair, which no tokenizer takes.
    model_config = ConfigDict(extra="forbid", str_max_length=_LONGEST_TEXT)


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Wire):
    """What both endpoints take. `None` is OpenAI's way to leave a field out."""

    model: str
    n: int | None = Field(None, ge=1, le=_MOST_CHOICES)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=0)
    stop: Stops = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    # Of vLLM's server: what our sampling has beyond OpenAI's.
    top_k: int | None = Field(None, ge=0, le=_LARGEST_ID)
    min_p: float | None = Field(None, ge=0, le=1)
    stop_token_ids: TokenIds = []

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Asked:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self


class CompletionAsked(Asked):
    prompt: str | TokenIds | list[str] | list[TokenIds]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    best_of: int | None = None
    suffix: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt: Any = self.prompt
        many = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], (str, list))
        return prompt if many else [prompt]

    @model_validator(mode="after")
    def _only_what_is_done(self) -> CompletionAsked:
        if len(self.prompts) > _MOST_PROMPTS:
            raise ValueError(f"{len(self.prompts)} prompts; at most {_MOST_PROMPTS} in one request")
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of other than n is not supported")
        if self.suffix:
            raise ValueError("suffix is not supported")
        return self


class TextPart(Wire):
    type: Literal["text"]
    text: str


class CalledFunction(Wire):
    name: str
    arguments: str


class ToolCall(Wire):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatTurn(Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    def message(self) -> dict[str, Any]:
        kept = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}
        return self.model_dump(include=kept, exclude_none=True, exclude={"tool_calls": {"__all__": {"index"}}})


class Function(Wire):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}
    strict: bool | None = None


class OfferedTool(Wire):
    type: Literal["function"]
    function: Function


class NamedFunction(Wire):
    name: str


class NamedTool(Wire):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Wire):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_named(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type: json_schema, and with no other type")
        return self


class ChatAsked(Asked):
    messages: list[ChatTurn] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[OfferedTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # Said to OpenAI about storing and billing; they change no answer.
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatAsked:
        both = (self.max_tokens, self.max_completion_tokens)
        checks: list[tuple[bool, str]] = [
            (None not in both and both[0] != both[1], "max_tokens and max_completion_tokens differ; give one"),
            (self.max_tokens == 0, "max_tokens: 0; expected at least 1"),
            (bool(self.top_logprobs) and not self.logprobs, "top_logprobs needs logprobs: true"),
            (self.wants_json and bool(self.stop), "stop would cut the JSON of response_format; leave one out"),
            (self.forces_call and bool(self.stop), "stop would cut the call of tool_choice; leave one out"),
            (self.wants_json and self.calls_tools, "response_format beside tools is not supported; leave one out"),
            (self.tool_choice not in (None, "none") and not self.tools, "tool_choice needs tools"),
        ]
        for is_wrong, why in checks:
            if is_wrong:
                raise ValueError(why)
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.functions:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}, which is not in tools")
        return self

    @property
    def wants_json(self) -> bool:
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def calls_tools(self) -> bool:
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forces_call(self) -> bool:
        return self.calls_tools and self.tool_choice not in (None, "auto")

    @property
    def functions(self) -> dict[str, dict[str, Any]]:
        return {tool.function.name: tool.function.parameters for tool in self.tools or ()}


class TokenizeAsked(Wire):
    """As vLLM's server takes it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None
    tools: list[OfferedTool] | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeAsked:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected prompt, or messages")
        return self


class DetokenizeAsked(Wire):
    model: str | None = None
    tokens: TokenIds


def complaint(errors: list[Any]) -> tuple[str, str | None]:
    """What pydantic found in the first field that is wrong, in OpenAI's words, and the field.

    Of a field that may have several shapes, that of the shape that the value is nearest to: where the error lies deepest.
    """
    field = errors[0]["loc"][:2]
    error = max((error for error in errors if error["loc"][:2] == field), key=lambda error: len(error["loc"]))
    loc = [] if error["type"] == "json_invalid" else [part for part in error["loc"] if part != "body"]
    named = len(loc) if error["type"] == "extra_forbidden" else 0  # the last step is the client's own word then
    where = [str(part) for place, part in enumerate(loc, start=1) if place == named or not _is_shape(part)]
    param = ".".join(where) or None
    said = _SAID.get(error["type"])
    return (said(where) if said else f"{param or 'body'}: {error['msg'].removeprefix('Value error, ')}"), param


def _is_shape(part: str | int) -> bool:
    """Whether a step of pydantic's way to an error is its word for a shape, such as `list[TextPart]`, and no field."""
    is_name = isinstance(part, int) or part.isdecimal() or (part.isidentifier() and not part[0].isupper())
    return not is_name or part in ("str", "int", "float", "bool")


_SAID: dict[str, Callable[[list[str]], str]] = {
    "extra_forbidden": lambda where: f"Unrecognized request argument supplied: {'.'.join(where)}",
    "missing": lambda where: f"you must provide the {'.'.join(where) or 'body'} parameter",
    "json_invalid": lambda where: "the body is not JSON",
    "model_attributes_type": lambda where: (
        f"{'.'.join(where) or 'the body'} is not a JSON object; send one with the header Content-Type: application/json"
    ),
}
