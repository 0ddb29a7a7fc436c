"""Tool calls: recognised in each family's form, forced where they are asked for, and the same whole or streamed."""

import json

import httpx
import openai
import pytest

from posttrain.data.tool_calls import SYNTAXES, syntax_of
from posttrain.serve.setup import ServedNames

CALL = {"name": "weather", "arguments": {"city": 'Zürich "ß"', "days": 2}}
ARGS = json.dumps(CALL["arguments"], ensure_ascii=False)
TEXTS = {
    "hermes": f'Let me see.\n<tool_call>\n{{"name": "weather", "arguments": {ARGS}}}\n</tool_call>',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGS}, "id": "abcdefghi"}}]',
    "deepseek": f"<|calls_begin|><|call_begin|>function<|sep|>weather\n```json\n{ARGS}\n```<|call_end|><|calls_end|>",
    "llama": f'{{"name": "weather", "parameters": {ARGS}}}',
}
NO_CALLS = {
    "hermes": [
        "<tool_call>",
        "<tool_call>\n{}\n</tool_call>",
        "a <b",
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
    ],
    "mistral": ["[TOOL_CALLS]", "[TOOL_CALLS] 3", "[TOOL"],
    "deepseek": ["<|calls_begin|>", "<|calls_begin|><|call_begin|>x<|call_end|>"],
    "llama": ["{", '{"a": 1}', 'so {"name": "weather", "parameters": {}}', "[1]"],
}
TEMPLATES = {
    "hermes": "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ c.function.name }}\", \"arguments\": "
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>{% endfor %}",
    "mistral": "{% for m in messages %}[INST]{{ m['content'] }}{% if m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls }}{% endif %}"
    "<|im_end|>{% endfor %}",
    "deepseek": "{% for m in messages %}{{ m['content'] }}{% if m.tool_calls %}<|calls_begin|>{{ m.tool_calls }}{% endif %}"
    "<|im_end|>{% endfor %}",
    "llama": "{% for m in messages %}{{ m['content'] }}{% if m.tool_calls %}{\"name\": \"x\", \"parameters\": 1}{% endif %}"
    "<|im_end|>{% endfor %}",
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Bern", "Basel"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.mark.parametrize("name", TEXTS)
def test_a_call_is_recognised_with_its_arguments(name):
    syntax = syntax_of(TEMPLATES[name])
    assert syntax is not None and syntax.name == name
    words, [(called, arguments)] = syntax.split(TEXTS[name])
    assert (called, json.loads(arguments)) == ("weather", CALL["arguments"])
    assert TEXTS[name].startswith(words)


@pytest.mark.parametrize("name", NO_CALLS)
def test_what_only_looks_like_a_call_stays_text(name):
    syntax = syntax_of(TEMPLATES[name])
    opens, half = TEXTS[name].partition("{")[0], TEXTS[name].replace("Zürich", r"\ud83d")
    for text in [*NO_CALLS[name], half, opens + '{"a":' * 5000, TEXTS[name].replace(ARGS, "[" * 5000)]:
        assert syntax.split(text) == (text, [])


@pytest.mark.parametrize("name", TEXTS)
def test_words_are_certain_only_before_a_call_may_begin(name):
    syntax = syntax_of(TEMPLATES[name])
    words, _ = syntax.split(TEXTS[name])
    certain = [syntax.certain(TEXTS[name][:n]) for n in range(len(TEXTS[name]) + 1)]
    assert max(certain) == len(words) and certain == sorted(certain)


def test_a_template_without_calls_has_no_syntax():
    assert syntax_of("{% for m in messages %}{{ m['content'] }}{% endfor %}") is None and syntax_of(None) is None
    assert {syntax.name for syntax in SYNTAXES} == set(TEXTS)


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request, running, make_model_in, tmp_path_factory):
    """A server of the tiny model with a template of that family, whose marks are tokens of their own for two of them."""
    from transformers import AutoTokenizer

    own = make_model_in(tmp_path_factory.mktemp("family") / request.param, "qwen3", vocab_size=320)
    changed = AutoTokenizer.from_pretrained(own)
    changed.chat_template = TEMPLATES[request.param]
    if request.param == "mistral":
        changed.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    if request.param == "hermes":
        changed.add_tokens(["<tool_call>", "</tool_call>"])
    changed.save_pretrained(own)
    with running(ServedNames([str(own)], own, name="tiny")) as serving:
        yield request.param, serving


def test_a_call_that_is_required_comes_whole_and_streamed(family, make_client):
    name, serving = family
    client = make_client(serving)
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "max_tokens": 150}
    named = {"type": "function", "function": {"name": "weather"}}
    for seed, choice in enumerate(["required", named, "required"]):
        answer = client.chat.completions.with_raw_response.create(**asked, tool_choice=choice, seed=seed)
        assert ("x-posttrain-note" in answer.headers) == (name != "hermes"), "the others do not show tools to the model"
        [found] = answer.parse().choices
        assert found.finish_reason == "tool_calls", found
        [call] = found.message.tool_calls
        assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Bern", "Basel")
        assert len(call.id) == 9 and found.message.content is None
        chunks = list(client.chat.completions.create(**asked, tool_choice=choice, seed=seed, stream=True))
        [streamed] = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        assert (streamed.index, streamed.function.arguments) == (0, call.function.arguments)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""


def test_a_model_that_is_free_to_call_may_just_answer(family, make_client):
    _, serving = family
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": TOOLS,
        "max_tokens": 8,
        "seed": 1,
    }
    client = make_client(serving)
    [found] = client.chat.completions.create(**asked).choices
    assert found.message.tool_calls is None and found.message.content
    stream = client.chat.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == found.message.content


def test_tools_of_a_template_without_calls_are_refused(client, serving):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": TOOLS}
    with pytest.raises(openai.BadRequestError, match="has no form for tool calls"):
        client.chat.completions.create(**asked)
    assert client.chat.completions.create(**asked, tool_choice="none", max_tokens=2).choices
    for fields, said in (
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "not in tools"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice needs tools"),
        ({"tool_choice": "required", "stop": ["a"]}, "stop would cut the call"),
    ):
        answer = httpx.post(f"{serving.address}/v1/chat/completions", json={**asked, **fields})
        assert answer.status_code == 400 and said in answer.json()["error"]["message"]
