"""Formats: each row shape becomes the same noun, is detected, and wrong ones are explained."""

import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.data.formats import FORMATS, detect_format, parse_rows
from posttrain.data.load import read_nouns
from posttrain.data.messages import parse_messages
from posttrain.data.parse import Skip, unpair
from posttrain.data.render import draft_example
from posttrain.errors import DataError
from posttrain.types import Example, Origin

ORIGIN = Origin("train.jsonl", 41)

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def rows_of(*rows):
    return [(Origin("train.jsonl", line), row) for line, row in enumerate(rows, start=1)]


def parse_one(name, row):
    return FORMATS[name].parse(row, Origin("train.jsonl", 41))


SAME_CONVERSATION = {
    "chat": {"messages": [USER, ASSISTANT]},
    "chat as json text": {"messages": '[{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]'},
    "chat in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            ASSISTANT,
        ]
    },
    "chat from parquet": {"messages": [{**USER, "tool_calls": None, "name": None}, {**ASSISTANT, "tool_calls": None}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "completion": {"prompt": [USER], "completion": [ASSISTANT]},
    "completion mixed": {"prompt": "2+2?", "completion": [ASSISTANT]},
}


@pytest.mark.parametrize("case", SAME_CONVERSATION)
def test_every_spelling_of_a_conversation_is_the_same(case):
    row = SAME_CONVERSATION[case]
    detection = detect_format(rows_of(row), "examples")
    assert detection.name == case.split()[0]
    assert parse_one(detection.name, row).messages == (USER, ASSISTANT)


def test_an_alpaca_row_with_two_answers_is_a_pair_of_its_conversation():
    row = {
        "instruction": "2+2?",
        "input": "Now.",
        "system": "Add.",
        "history": [["1+1?", "2"]],
        "chosen": "4",
        "rejected": "5",
    }
    pair = parse_one("alpaca_preference", {**row, "margin": 2})
    assert [(m["role"], m["content"]) for m in pair.prompt] == [
        ("system", "Add."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?\nNow."),
    ]  # fmt: skip
    assert (pair.chosen, pair.rejected, pair.margin) == ((ASSISTANT,), ({"role": "assistant", "content": "5"},), 2.0)
    assert isinstance(parse_one("alpaca_preference", {**row, "rejected": "4"}), Skip)
    for rows in ("pairs", "labels"):
        assert detect_format(rows_of(row), rows, "alpaca_preference").name == "alpaca_preference"
    assert detect_format(rows_of({**row, "prompt": "2+2?"}), "pairs").name == "preference", "it is taken by name alone"
    with pytest.raises(DataError, match=r"`chosen` is list .*; expected text"):
        parse_one("alpaca_preference", {**row, "chosen": [ASSISTANT]})


@pytest.mark.parametrize(
    ("question", "remedy"),
    [
        ("instruction", r"set `type: alpaca_preference` for a conversation, or `columns: \{prompt: instruction\}`"),
        (
            "question",
            r"`type: alpaca_preference` and `columns: \{instruction: question\}` .*`columns: \{prompt: question\}`",
        ),
    ],
)
def test_a_pair_whose_question_would_be_left_out_is_refused(question, remedy):
    row = {question: "2+2?", "chosen": "4", "rejected": "5"}
    for kind in ("pairs", "labels"):
        with pytest.raises(DataError, match=rf"`{question}` beside them would be left out.*{remedy}"):
            detect_format(rows_of(row), kind)
    assert detect_format(rows_of(row), "pairs", "preference").name == "preference", "who names the type has looked"
    talked = [USER, ASSISTANT]
    assert detect_format(rows_of({**row, "chosen": talked, "rejected": talked}), "pairs").name == "preference"


def test_text_rows():
    example = parse_one("completion", {"prompt": "Q: 2+2? A:", "completion": " 4"})
    assert (example.prompt, example.completion, example.messages) == ("Q: 2+2? A:", " 4", ())
    assert parse_one("text", {"text": "once"}).completion == "once"


def test_tool_calls_in_both_spellings():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    openai = parse_one(
        "chat",
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}],
                },
                {"role": "tool", "content": "4"},
                ASSISTANT,
            ],
            "tools": '[{"type": "function", "function": {"name": "add"}}]',
        },
    )
    sharegpt = parse_one(
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 2}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "4"},
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        },
    )
    assert openai.messages == sharegpt.messages
    assert openai.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert openai.tools == sharegpt.tools == ({"type": "function", "function": {"name": "add"}},)


def test_alpaca_joins_and_history_is_not_trained():
    example = parse_one(
        "alpaca", {"instruction": "Add", "input": "2 2", "output": "4", "system": "S", "history": [["1+1?", "2"]]}
    )
    assert [m["content"] for m in example.messages] == ["S", "1+1?", "2", "Add\n2 2", "4"]
    assert [m.get("weight", 1) for m in example.messages] == [1, 1, 0, 1, 1]


PREFERENCES = {
    "messages": {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "5"}]},
    "text prompt": {"prompt": "2+2?", "chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "5"}]},
    "one message": {"prompt": [USER], "chosen": ASSISTANT, "rejected": {"role": "assistant", "content": "5"}},
    "implicit": {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "5"}]},
    "ultrafeedback": {
        "prompt": "2+2?",
        "chosen": [USER, ASSISTANT],
        "rejected": [USER, {"role": "assistant", "content": "5"}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    },
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_every_spelling_of_a_pair_is_the_same(case):
    pair = parse_one(detect_format(rows_of(PREFERENCES[case]), "pairs").name, PREFERENCES[case])
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        (USER,),
        (ASSISTANT,),
        ({"role": "assistant", "content": "5"},),
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: 2+2? A: 4", "Q: 2+2? A: 5", "Q: 2+2? A:"),
        ("the answer is 4", "the answer is 42", "the answer is"),  # never inside a word, never an empty answer
        ("yes", "no", ""),
        ("Assistant:\n\nYes", "Assistant:\n\nNo", "Assistant:"),
    ],
)
def test_implicit_text_prompt_ends_at_a_word(chosen, rejected, prompt):
    pair = parse_one("preference", {"chosen": chosen, "rejected": rejected})
    assert (pair.prompt, pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (prompt, chosen, rejected)


def test_kto_labels_and_unpairing():
    for written, label in [(True, True), (0, False), ("true", True), ("0", False), (1.0, True)]:
        assert parse_one("kto", {"prompt": "a", "completion": "b", "label": written}).label is label
    rows = unpair(parse_one("preference", PREFERENCES["messages"]))
    assert [(row.completion[0]["content"], row.label) for row in rows] == [("4", True), ("5", False)]


def test_prompts_keep_all_other_columns():
    for row in ({"prompt": "2+2?", "answer": 4, "level": "easy"}, {"messages": [USER], "answer": 4, "level": "easy"}):
        assert detect_format(rows_of(row), "prompts").name == "prompt"
        assert parse_one("prompt", row).columns == {"answer": 4, "level": "easy"}


SKIPS = {
    "no assistant turn": ("chat", {"messages": [USER]}),
    "empty completion": ("chat", {"messages": [USER, {"role": "assistant", "content": ""}]}),
    "empty completion (text)": ("completion", {"prompt": "a", "completion": ""}),
    "empty completion (pair)": ("preference", {"prompt": "a", "chosen": "", "rejected": "b"}),
    "identical chosen and rejected": ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}),
}


@pytest.mark.parametrize("case", SKIPS)
def test_documented_skips(case):
    name, row = SKIPS[case]
    assert parse_one(name, row) == Skip(Origin("train.jsonl", 41), case.split(" (")[0])


MALFORMED = {
    "messages is text": (
        "chat",
        {"messages": "hello"},
        r"train\.jsonl:41: `messages` is str \"hello\"; expected a non-empty list",
    ),
    "messages is broken json": ("chat", {"messages": "[{]"}, r"41: `messages` holds text that is not JSON"),
    "empty list": ("chat", {"messages": []}, r"41: `messages` is list \[\]; expected a non-empty list"),
    "no role": (
        "chat",
        {"messages": [{"content": "a"}]},
        r"41: `messages\[0\]` has role missing; expected one of assistant",
    ),
    "odd role": (
        "chat",
        {"messages": [USER, {"role": "wizard", "content": "a"}]},
        r"41: `messages\[1\]` has role str \"wizard\"",
    ),
    "number content": (
        "chat",
        {"messages": [{"role": "user", "content": 4}]},
        r"41: `messages\[0\]` has content int 4; expected text",
    ),
    "image": (
        "chat",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        r"images and audio are not supported",
    ),
    "message is text": ("chat", {"messages": ["hi"]}, r"41: `messages\[0\]` is str \"hi\"; expected an object"),
    "tools": (
        "chat",
        {"messages": [USER, ASSISTANT], "tools": ["add"]},
        r"41: `tools` is list .*; expected a list of JSON schemas",
    ),
    "call": (
        "chat",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"x": 1}]}]},
        r"41: .*tool call .*expected \{name, arguments\}",
    ),
    "call arguments": (
        "sharegpt",
        {"conversations": [{"from": "tool_call", "value": "add(2)"}]},
        r"41: `conversations\[0\]` holds text that is not JSON",
    ),
    "history": (
        "alpaca",
        {"instruction": "a", "output": "b", "history": ["x"]},
        r"41: `history` holds str \"x\"; expected \[user text, assistant text\]",
    ),
    "number text": ("text", {"text": 5}, r"41: `text` is int 5; expected text; this row has `text`"),
    "null completion": (
        "completion",
        {"prompt": "a", "completion": None},
        r"41: `completion` is missing; expected text or a list",
    ),
    "completion from user": (
        "completion",
        {"prompt": [USER], "completion": [USER, USER]},
        r"begins with user after the prompt",
    ),
    "mixed pair": (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": [ASSISTANT]},
        r"41: one of `chosen` and `rejected` is text",
    ),
    "pair without prompt": (
        "preference",
        {"chosen": [ASSISTANT], "rejected": [{"role": "assistant", "content": "5"}]},
        r"41: .*do not share a prompt",
    ),
    "label": (
        "kto",
        {"prompt": "a", "completion": "b", "label": "good"},
        r"41: `label` is str \"good\"; expected true",
    ),
    "answered prompt": (
        "prompt",
        {"messages": [USER, ASSISTANT]},
        r"41: `messages` ends with an assistant turn; .*remove that turn",
    ),
    "empty prompt": ("prompt", {"prompt": ""}, r"41: `prompt` is empty"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_rows_are_errors(case):
    name, row, message = MALFORMED[case]
    with pytest.raises(DataError, match=message):
        parse_one(name, row)


def test_detection_says_why_and_what_is_ignored():
    detection = detect_format(
        rows_of({"messages": [USER, ASSISTANT], "source": "x"}, {"messages": [USER, ASSISTANT]}), "examples"
    )
    assert str(detection) == "chat (column `messages` in all 2 rows; columns not read: source)"


def test_mixture_names_the_first_offender_and_both_formats():
    rows = rows_of(
        {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b"}, {"messages": [USER, ASSISTANT]}
    )
    with pytest.raises(DataError, match=r"train\.jsonl:3: this row is chat .* from train\.jsonl:1 on are completion"):
        detect_format(rows, "examples")


WRONG_COLUMNS = [
    ("examples", {"question": "a", "answer": "b"}, r"`answer`, `question`; expected for examples one of: chat: `messages`.*`columns: \{instruction: question, output: answer\}`"),
    ("examples", {"body": "a"}, r"`columns: \{text: body\}` \(then the format is text\)"),
    ("prompts", {"question": "a", "answer": "b"}, r"`columns: \{prompt: question\}`"),
    ("examples", {"prompt": "a", "chosen": "b", "rejected": "c"}, r"This is the preference format, which is for dpo"),
    ("pairs", {"prompt": "a", "completion": "b", "label": True}, r"This is the kto format: set `loss_type: kto`"),
    ("pairs", {"messages": [USER, ASSISTANT]}, r"This is the chat format, which is for sft"),
    ("examples", {"x": 1}, r"`columns: \{messages: <your column>\}`"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "row", "message"), WRONG_COLUMNS)
def test_wrong_columns_say_found_expected_and_fix(stage, row, message):
    with pytest.raises(DataError, match=r"train\.jsonl:1: found columns .*" + message):
        detect_format(rows_of(row), stage)


def test_named_type_is_checked():
    with pytest.raises(DataError, match=r"`type: chat` is not for pairs; expected one of preference"):
        detect_format(rows_of({"messages": [USER]}), "pairs", "chat")
    with pytest.raises(DataError, match=r"train\.jsonl:2: found columns `body`; expected `text` for `type: text`"):
        detect_format(rows_of({"text": "a"}, {"body": "b"}), "examples", "text")
    both = {"text": "a", "messages": [USER, ASSISTANT]}
    assert detect_format(rows_of(both), "examples").name == "chat"
    assert detect_format(rows_of(both), "examples", "text").name == "text"


def test_parse_rows_separates_skips():
    nouns, skips = parse_rows(rows_of({"text": "a"}, {"text": ""}), "text", DatasetKeys(path="train.jsonl"))
    assert [n.origin.line for n in nouns] == [1] and [s.origin.line for s in skips] == [2]


@pytest.mark.parametrize("name", ["weight", "train", "trainable", "loss"])
def test_flags_of_other_tools_leave_a_turn_out_of_the_loss_like_weight(name, tokenizer_of):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bad", name: False},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "good", name: 1},
    ]
    messages = parse_messages(turns, ORIGIN, "messages")
    assert [m.get("weight") for m in messages] == [None, 0, None, 1]
    assert not any(name in m for m in messages for name in ("train", "trainable", "loss"))
    (draft,) = draft_example(tokenizer_of("chatml"), Example(ORIGIN, messages=messages), "assistant")
    assert [draft.text[a:b] for a, b in draft.spans] == ["good<|im_end|>"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": "no"}, r"`messages\[0\]` has train str \"no\"; expected true or 1"),
        ({"weight": 0.5}, r"has weight float 0\.5; expected true or 1"),
        ({"train": False, "weight": 1}, r"is both trained and not \(weight: 1, train: False\)"),
        ({"reasoning": ["x"]}, r"has reasoning list .*; expected text"),
        ({"reasoning": "x", "thinking": "y"}, "has different texts in reasoning and thinking"),
        ({"content": None}, r"`messages\[0\]` \(assistant\) has no content; expected text"),
    ],
)
def test_a_malformed_turn_is_named(more, message):
    with pytest.raises(DataError, match=message):
        parse_messages([{"role": "assistant", "content": "x", **more}], ORIGIN, "messages")


@pytest.mark.parametrize("role", ["system", "user", "tool", "assistant"])
def test_a_turn_without_content_is_named_with_file_and_line(role, write_jsonl):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": role, "content": None}]}]
    keys = DatasetKeys(path=str(write_jsonl(rows)))
    with pytest.raises(DataError, match=rf"train\.jsonl:1: `messages\[1\]` \({role}\) has no content"):
        read_nouns([keys], "examples")


STEPS = {"prompt": "2+2?", "completions": ["2+2 is 4.", "So 4."], "labels": [True, 0.25]}


def test_steps_have_a_label_each():
    assert detect_format(rows_of(STEPS), "steps").name == "stepwise_supervised"
    noun = parse_one("stepwise_supervised", STEPS)
    assert (noun.prompt, noun.steps, noun.labels) == ("2+2?", ("2+2 is 4.", "So 4."), (1.0, 0.25))
    assert parse_one("stepwise_supervised", {**STEPS, "prompt": [USER], "labels": ["true", 0]}).labels == (1.0, 0.0)
    assert isinstance(parse_one("stepwise_supervised", {**STEPS, "completions": [], "labels": []}), Skip)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"labels": [True]}, "2 `completions` and 1 `labels`; expected a label for each step"),
        ({"labels": [True, 2]}, "label 2 of `labels` is int 2"),
        ({"labels": [True, "+"]}, "label 2 of `labels` is .*expected true"),
        ({"labels": [True, None]}, "label 2 of `labels`"),
        ({"labels": [True, float("nan")]}, "label 2 of `labels`"),
        ({"completions": ["2+2 is 4.", " "]}, "step 2 of `completions` is .*expected text; take an empty step out"),
        ({"completions": "2+2 is 4."}, "`completions` is .*expected a list"),
        ({"prompt": [USER, ASSISTANT]}, "`prompt` has no question at its end"),
    ],
)
def test_broken_steps_are_refused_with_their_line(change, why):
    with pytest.raises(DataError, match=rf"train\.jsonl:41: .*{why}"):
        parse_one("stepwise_supervised", STEPS | change)
