"""Every template × every form of message: all text is rendered, or the row is refused with the text that is not."""

import json
from itertools import product
from pathlib import Path

import pytest

from posttrain.config.stages import SFTKeys
from posttrain.data.forms import fit
from posttrain.data.load import load_sft
from posttrain.data.messages import parse_messages, parse_tools
from posttrain.data.render import draft_example, draft_prompt, tokenize
from posttrain.data.rendered import DROPPED
from posttrain.data.template import render_text
from posttrain.errors import DataError
from posttrain.types import Example, Origin, Prompt

ORIGIN = Origin("train.jsonl", 41)
FOLDER = Path(__file__).parent / "templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS = {
    "deepseek": "<|eos|>", "gemma": "<end_of_turn>", "glm": "", "llama3": "<|eot_id|>", "mistral": "</s>",
    "phi3": "<|end|>", "qwen3": "<|im_end|>", "chatml": "<|im_end|>",
}  # fmt: skip
SPECIAL = ["<|eos|>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "[gMASK]", "<sop>"]

BEFORE = {
    "nothing": [],
    "system": [{"role": "system", "content": "systemwords"}],
    "developer": [{"role": "developer", "content": "developerwords"}],
}
ASK = {"role": "user", "content": "questionwords"}
NEXT = {"role": "user", "content": "laterwords"}
ANSWER = {"role": "assistant", "content": "answerwords"}
RESULT = {"role": "tool", "content": "resultwords", "tool_call_id": "abcdefghi"}


def call(arguments, content=None, **more):
    function = {"name": "lookupname", "arguments": arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
        **more,
    }


ARGUMENTS = {"cityname": 'say "quoted"\n\\nabla é', "count": 7, "nested": {"gone": None}}
TURNS = {
    "answer": [ASK, ANSWER],
    "two questions": [ASK, ANSWER, NEXT, {"role": "assistant", "content": "finalwords"}],
    "two answers in a row": [ASK, ANSWER, {"role": "assistant", "content": "finalwords"}],
    "call": [ASK, call(ARGUMENTS)],
    "call with arguments as text": [ASK, call(json.dumps(ARGUMENTS))],
    "call with empty content": [ASK, call(ARGUMENTS, "")],
    "call with text": [ASK, call(ARGUMENTS, "besidewords")],
    "call, result, answer": [ASK, call(ARGUMENTS), RESULT, ANSWER],
    "call, result, answer, later turn": [
        ASK, call(ARGUMENTS), RESULT, ANSWER, NEXT, {"role": "assistant", "content": "finalwords"},
    ],
    "reasoning_content": [ASK, {**ANSWER, "reasoning_content": "thoughtwords"}],
    "reasoning": [ASK, {**ANSWER, "reasoning": "thoughtwords"}],
    "thinking": [ASK, {**ANSWER, "thinking": "thoughtwords"}],
    "thinking in the text": [ASK, {**ANSWER, "content": "<think>\nthoughtwords\n</think>\n\nanswerwords"}],
    "thinking in an earlier text": [
        ASK, {**ANSWER, "content": "<think>\nearlierthoughts\n</think>\n\nanswerwords"}, NEXT,
        {"role": "assistant", "content": "finalwords"},
    ],
}  # fmt: skip
TOOL = {
    "name": "lookupname",
    "description": "toolwords",
    "parameters": {"type": "object", "properties": {"cityname": {"type": "string", "description": "parameterwords"}}},
}
TOOLS = {"no tools": [], "tools": [{"type": "function", "function": TOOL}], "bare tools": [TOOL]}
WORDS = (
    "systemwords", "developerwords", "questionwords", "laterwords", "answerwords", "finalwords", "resultwords",
    "lookupname", "cityname", "quoted", "nabla", "é", "besidewords", "thoughtwords", "toolwords", "parameterwords",
)  # fmt: skip


@pytest.fixture
def tokenizer(tokenizer_of):
    def make(name):
        made = tokenizer_of("raw")
        made.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<bos>"})
        made.eos_token = ENDS[name] or "<|endoftext|>"
        made.chat_template = CHATML if name == "chatml" else (FOLDER / f"{name}.jinja").read_text()
        return made

    return make


def example(messages, tools=()):
    return Example(ORIGIN, parse_messages(messages, ORIGIN, "messages"), tools=parse_tools(list(tools), ORIGIN))


def trained(tokenizer, row):
    (seq,) = tokenize(tokenizer, draft_example(tokenizer, row, "assistant")).seqs
    stretches, before = [], False
    for token, on in zip(seq.ids, seq.loss_mask, strict=True):
        if on:
            stretches += [] if before else [[]]
            stretches[-1].append(token)
        before = on
    return [tokenizer.decode(ids) for ids in stretches]


@pytest.mark.parametrize("template", [*TEMPLATES, "chatml"])
def test_all_text_is_rendered_or_the_row_is_refused_by_name(tokenizer, template):
    made = tokenizer(template)
    rendered = 0
    for before, turns, tools in product(BEFORE, TURNS, TOOLS):
        row = example([*BEFORE[before], *TURNS[turns]], TOOLS[tools])
        try:
            (draft,) = draft_example(made, row, "assistant")
        except DataError as error:
            assert str(error).startswith("train.jsonl:41: the chat template "), error
            continue
        rendered += 1
        given = json.dumps([row.messages, row.tools], ensure_ascii=False)
        missing = [word for word in WORDS if word in given and word not in draft.text]
        assert missing == [], (before, turns, tools, draft.text)
        assert ("earlierthoughts" in draft.text) == ("earlierthoughts" in given and not draft.dropped)
        for start, end in draft.spans:
            assert end > start and "questionwords" not in draft.text[start:end]
            assert "resultwords" not in draft.text[start:end] and "laterwords" not in draft.text[start:end]
        answers = [m["content"] for m in row.messages if m["role"] == "assistant"]
        last = draft.text[slice(*draft.spans[-1])]
        assert answers[-1].rpartition("\n")[2].strip() in last
        if ENDS[template] and not (template == "deepseek" and turns.startswith("call")):
            assert last.endswith(ENDS[template]) and last.count(ENDS[template]) == 1, last
    assert rendered >= 4


KNOWN = {  # what each template can hold, read off the template by hand
    ("qwen3", "developer", "call, result, answer", "tools"): True,
    ("qwen3", "system", "reasoning", "no tools"): True,
    ("deepseek", "developer", "call, result, answer", "no tools"): True,
    ("deepseek", "nothing", "call with text", "no tools"): False,
    ("deepseek", "nothing", "thinking in the text", "no tools"): False,
    ("deepseek", "nothing", "answer", "tools"): False,
    ("llama3", "nothing", "call, result, answer, later turn", "no tools"): True,
    ("llama3", "nothing", "call with text", "no tools"): False,
    ("llama3", "nothing", "reasoning_content", "no tools"): False,
    ("mistral", "nothing", "call, result, answer, later turn", "tools"): True,
    ("mistral", "nothing", "call, result, answer, later turn", "bare tools"): True,
    ("mistral", "system", "answer", "no tools"): False,
    ("gemma", "system", "answer", "no tools"): False,
    ("phi3", "developer", "two questions", "no tools"): True,
    ("phi3", "nothing", "call", "no tools"): False,
    ("glm", "developer", "answer", "no tools"): True,
    ("chatml", "nothing", "call, result, answer", "no tools"): False,
    ("chatml", "nothing", "answer", "tools"): False,
    ("chatml", "developer", "answer", "no tools"): True,
}


@pytest.mark.parametrize("case", KNOWN, ids="-".join)
def test_a_form_the_template_knows_is_found(tokenizer, case):
    template, before, turns, tools = case
    row = example([*BEFORE[before], *TURNS[turns]], TOOLS[tools])
    if KNOWN[case]:
        draft_example(tokenizer(template), row, "assistant")
    else:
        with pytest.raises(DataError, match=r"^train\.jsonl:41: the chat template (does not write|refuses) "):
            draft_example(tokenizer(template), row, "assistant")


def test_the_text_that_is_lost_is_named(tokenizer):
    cases = {
        "call": "the call of `lookupname` in message 2 of 2 (assistant)",
        "thinking": "the thinking of message 2 of 2 (assistant)",
    }
    for turns, name in cases.items():
        with pytest.raises(DataError) as caught:
            draft_example(tokenizer("chatml"), example(TURNS[turns]), "assistant")
        assert name in str(caught.value) and "set `chat_template`" in str(caught.value)
    with pytest.raises(DataError, match="does not write the tool `lookupname`"):
        draft_example(tokenizer("glm"), example(TURNS["answer"], TOOLS["tools"]), "assistant")


def test_short_texts_are_not_taken_for_letters_of_the_template(tokenizer):
    call = {"type": "function", "function": {"name": "a", "arguments": {"s": 1}}}
    row = example([{"role": "user", "content": "e"}, {"role": "assistant", "content": "", "tool_calls": [call]}])
    with pytest.raises(DataError, match="the call of `a`"):
        draft_example(tokenizer("chatml"), row, "assistant")


def test_text_that_is_lost_for_what_it_says_is_refused(tokenizer):
    """Qwen3-like templates cut an answer at `</think>`: what stands before `<think>` is gone."""
    row = example([ASK, {"role": "assistant", "content": "prefacewords <think>x</think> answerwords"}])
    with pytest.raises(DataError, match=r"does not write the text before <think> of message 2 of 2"):
        draft_example(tokenizer("qwen3"), row, "assistant")
    earlier = example(
        [ASK, {"role": "assistant", "content": "prefacewords <think>x</think> answerwords"}, NEXT, ANSWER]
    )
    with pytest.raises(DataError, match=r"does not write the text before <think> of message 2 of 4"):
        draft_example(tokenizer("qwen3"), earlier, "assistant")
    (draft,) = draft_example(tokenizer("chatml"), earlier, "assistant")
    assert "prefacewords" in draft.text


@pytest.mark.parametrize("arguments", [dict, json.dumps], ids=["object", "text"])
def test_explicit_nulls_of_json_are_kept(tokenizer, write_jsonl, arguments):
    given = {"a": 1, "u": None, "n": {"v": None}}
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer", "default": None}}}}
    function = {"name": "f", "arguments": arguments(given)}
    turn = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}
    path = write_jsonl([{"messages": [ASK, turn], "tools": [{"type": "function", "function": tool}]}])
    made = tokenizer("qwen3")
    (seq,) = load_sft(SFTKeys(base_model="x", datasets=[{"path": str(path)}]), made).rows
    text = made.decode(seq.ids)
    assert '"arguments": {"a": 1, "u": null, "n": {"v": null}}' in text
    assert '"default": null' in text


def test_dropped_thinking_of_earlier_turns_is_counted_in_the_summary(tokenizer, write_jsonl):
    path = write_jsonl([{"messages": TURNS["thinking in an earlier text"]}, {"messages": TURNS["answer"]}])
    data = load_sft(SFTKeys(base_model="x", datasets=[{"path": str(path)}]), tokenizer("qwen3"))
    assert data.summary.sources[0].notes[DROPPED] == 1
    assert data.summary.sources[0].rows_kept == 2


def test_a_call_and_a_later_user_turn_under_a_mistral_like_template(tokenizer):
    made = tokenizer("mistral")
    row = example(TURNS["call, result, answer, later turn"], TOOLS["tools"])
    first, second, third = trained(made, row)
    assert first.startswith('[TOOL_CALLS] [{"name": "lookupname", "arguments": {') and first.endswith('"}]</s>')
    assert (second, third) == (" answerwords</s>", " finalwords</s>")


def test_a_last_turn_ends_at_its_end_of_turn_and_not_behind_what_the_template_adds(tokenizer):
    made = tokenizer("phi3")
    made.eos_token = "<|endoftext|>"
    for turns in ("answer", "two questions"):
        stretches = trained(made, example(TURNS[turns]))
        assert [text.endswith("words<|end|>") for text in stretches] == [True] * len(stretches)


def test_two_assistant_turns_in_a_row_start_their_spans_alike(tokenizer):
    assert trained(tokenizer("qwen3"), example(TURNS["two answers in a row"])) == [
        "answerwords<|im_end|>",
        "<think>\n\n</think>\n\nfinalwords<|im_end|>",
    ]
    for template in ("llama3", "phi3", "chatml"):
        first, second = trained(tokenizer(template), example(TURNS["two answers in a row"]))
        assert (first, second) == (f"answerwords{ENDS[template]}", f"finalwords{ENDS[template]}")


def test_prompts_and_evals_go_through_the_same_forms(tokenizer):
    made = tokenizer("phi3")
    messages = parse_messages([BEFORE["developer"][0], ASK], ORIGIN, "prompt")
    (draft,) = draft_prompt(made, Prompt(ORIGIN, messages))
    assert draft.text.startswith("<|system|>\ndeveloperwords<|end|>")
    with pytest.raises(DataError, match=r"^train\.jsonl:41: .*does not write the tool"):
        draft_prompt(made, Prompt(ORIGIN, messages, tools=(TOOL,)))
    fitted = fit(made, messages, (), True)
    assert render_text(made, fitted.messages, (), True) == draft.text
