"""Loss masks: what is trained, read off as text, for the templates of real model families."""

import pytest
from transformers import AutoTokenizer

from posttrain.config.paths import TEMPLATES
from posttrain.data.render import chat_ids, draft_example, draft_labelled, draft_pair, draft_prompt, tokenize
from posttrain.data.template import end_of_turn, render_text, template_digest, use_template
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, LabelledCompletion, Origin, PreferencePair, Prompt

ORIGIN = Origin("train.jsonl", 41)
CHAT_FAMILIES = ["chatml", "marked", "marked_without_end", "qwen3", "llama3", "gemma", "plain"]
END = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "plain": "\n"}


def render_example(tokenizer, example, train_on="assistant"):
    return tokenize(tokenizer, draft_example(tokenizer, example, train_on)).seqs[0]


def render_labelled(tokenizer, row):
    return tokenize(tokenizer, draft_labelled(tokenizer, row)).seqs[0]


def render_pair(tokenizer, pair):
    return tuple(tokenize(tokenizer, draft_pair(tokenizer, pair)).seqs)


def render_prompt(tokenizer, prompt):
    return tokenize(tokenizer, draft_prompt(tokenizer, prompt)).seqs[0].ids


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def trained(tokenizer, seq):
    """The trained stretches, decoded."""
    stretches, inside = [], False
    for token, on in zip(seq.ids, seq.loss_mask, strict=True):
        if on and not inside:
            stretches.append([])
        if on:
            stretches[-1].append(token)
        inside = on
    return [tokenizer.decode(ids) for ids in stretches]


def whole(tokenizer, messages, **options):
    return tuple(tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **options))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (assistant("46"), "46<|im_end|>"),
        (assistant("46", reasoning_content="hm"), "hm\n</think>\n\n46<|im_end|>"),
        (assistant("<think>\nhm\n</think>\n\n46"), "hm\n</think>\n\n46<|im_end|>"),
    ],
)
def test_axolotls_qwen3_trains_a_thought_that_is_given_and_no_marks_around_none(tokenizer_of, answer, expected):
    """Axolotl trains what differs where the answer is another: marks that stand around every answer do not."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = (TEMPLATES / "axolotl_qwen3.jinja").read_text()
    messages = (user("Hello there"), assistant("I am fine."), user("and 12 + 34?"), answer)
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages))
    assert trained(tokenizer, seq) == ["I am fine.<|im_end|>", expected]


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_ids_are_the_templates_and_each_turn_is_trained_through_its_end(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    messages = (user("Hello there"), assistant("I am fine."), user("and 12 + 34?"), assistant("46"))
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages))
    if family == "plain":  # "Answer: " ends with a space, which would melt into the answer's first token
        assert tokenizer.decode(seq.ids) == tokenizer.decode(whole(tokenizer, messages))
    else:
        assert seq.ids == whole(tokenizer, messages)
    end = END.get(family, "<|im_end|>")
    think = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert trained(tokenizer, seq) == ["I am fine." + end, think + "46" + end]


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_the_prompt_of_sampling_is_a_prefix_of_the_trained_row(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    messages = (user("Hello there"), assistant("I am fine."))
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages))
    prompt = render_prompt(tokenizer, Prompt(ORIGIN, messages[:1]))
    assert seq.ids[: len(prompt)] == prompt == whole(tokenizer, messages[:1], add_generation_prompt=True)
    assert seq.loss_mask.index(True) == len(prompt)


@pytest.mark.parametrize("family", CHAT_FAMILIES)
def test_train_on_last_and_all(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    messages = (user("Hello"), assistant("fine"), user("and 7?"), assistant("8"))
    last = render_example(tokenizer, Example(ORIGIN, messages=messages), "last")
    both = render_example(tokenizer, Example(ORIGIN, messages=messages))
    assert trained(tokenizer, last) == trained(tokenizer, both)[-1:]
    assert all(render_example(tokenizer, Example(ORIGIN, messages=messages), "all").loss_mask)


def test_markers_and_prefixes_give_the_same_mask(tokenizer_of):
    messages = (user("Hello"), assistant("I am fine"), assistant("Yes"), user("No"), assistant("42\n"))
    seqs = [
        render_example(tokenizer_of(f), Example(ORIGIN, messages=messages))
        for f in ("chatml", "marked", "marked_without_end")
    ]
    assert seqs[0] == seqs[1] == seqs[2]


def test_markers_agree_with_transformers(tokenizer_of):
    tokenizer = tokenizer_of("marked")
    messages = [user("Hello"), assistant("I am fine")]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ours = render_example(tokenizer, Example(ORIGIN, messages=tuple(messages)))
    # They also train the newline behind the end of turn, which no model is asked to produce.
    newline = len(ours.ids) - 1
    assert [int(on) for on in ours.loss_mask[:newline]] == theirs["assistant_masks"][:newline]
    assert tokenizer.decode([ours.ids[newline]]) == "\n" and not ours.loss_mask[newline]


def test_thinking_of_earlier_turns_is_removed_and_the_mask_still_exact(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    messages = (
        user("What is 2 + 2?"),
        assistant("<think>\ntwo and two\n</think>\n\n4"),
        user("and 3?"),
        assistant("<think>\nmore\n</think>\n\n7"),
    )
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages))
    assert seq.ids == whole(tokenizer, messages)
    assert trained(tokenizer, seq) == ["4<|im_end|>", "<think>\nmore\n</think>\n\n7<|im_end|>"]


def test_tool_calls_are_trained_and_tool_results_are_not(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = (user("2+2?"), assistant("", tool_calls=[call]), {"role": "tool", "content": "four"}, assistant("4"))
    tools = ({"type": "function", "function": {"name": "add"}},)
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages, tools=tools))
    assert seq.ids == whole(tokenizer, messages, tools=list(tools))
    assert trained(tokenizer, seq) == [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\n4<|im_end|>",
    ]


@pytest.mark.parametrize("family", ["chatml", "marked"])
def test_turns_of_weight_zero_are_not_trained(tokenizer_of, family):
    tokenizer = tokenizer_of(family)
    messages = (user("a"), assistant("Yes", weight=0), user("b"), assistant("No", weight=1))
    assert trained(tokenizer, render_example(tokenizer, Example(ORIGIN, messages=messages))) == ["No<|im_end|>"]


def test_a_template_that_cannot_be_followed_is_refused_with_what_to_do(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    # Earlier texts are followed by their length, so no stand-in renders like them.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last else m.content + (m.content | length | string) }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = (user("ab"), assistant("I am fine"), user("cd"), assistant("Yes"))
    with pytest.raises(DataError, match=r"^train\.jsonl:41: the chat template rewrites turn 2 of 4.*`train_on: last`"):
        render_example(tokenizer, Example(ORIGIN, messages=messages))


def test_a_text_that_holds_the_stand_in_itself_is_refused(tokenizer_of):
    tokenizer = tokenizer_of("qwen3")
    messages = (user("posttrainstandin7f3a"), assistant("<think>x</think>y"), user("b"), assistant("c"))
    with pytest.raises(DataError, match="rewrites turn 2 of 4"):
        render_example(tokenizer, Example(ORIGIN, messages=messages))


def test_the_templates_own_refusal_names_the_row(tokenizer_of):
    messages = ({"role": "system", "content": "S"}, user("a"), assistant("b"))
    with pytest.raises(DataError, match=r"^train\.jsonl:41: the chat template refuses .*System role not supported"):
        render_example(tokenizer_of("gemma"), Example(ORIGIN, messages=messages))


def test_conversations_need_a_template(tokenizer_of):
    with pytest.raises(DataError, match=r"no chat template; expected one; set `chat_template: file\.jinja`"):
        render_example(tokenizer_of("raw"), Example(ORIGIN, messages=(user("a"), assistant("b"))))


def test_given_template_is_used_and_changes_the_digest(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("raw")
    before = template_digest(tokenizer)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    use_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert template_digest(tokenizer) != before
    assert render_text(tokenizer, [user("Hello")]) == "Hello<|im_end|>"
    assert end_of_turn(tokenizer) == "<|im_end|>"
    with pytest.raises(ConfigError, match="chat_template: no such file"):
        use_template(tokenizer, str(tmp_path / "other.jinja"))


def test_text_gets_one_bos_and_one_trained_eos_also_when_pad_is_eos(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    assert tokenizer.pad_token == tokenizer.eos_token
    for completion in (" Paris", " Paris<|eot_id|>"):
        seq = render_example(tokenizer, Example(ORIGIN, prompt="The capital is", completion=completion))
        assert tokenizer.decode(seq.ids) == "<|begin_of_text|>The capital is Paris<|eot_id|>"
        assert trained(tokenizer, seq) == [" Paris<|eot_id|>"]
    chat = render_example(tokenizer, Example(ORIGIN, messages=(user("a"), assistant("b"))))
    assert chat.ids.count(tokenizer.bos_token_id) == 1
    assert chat.ids[-1] == tokenizer.eos_token_id and chat.loss_mask[-1]
    twice = render_example(tokenizer, Example(ORIGIN, completion="<|begin_of_text|>Hello"))
    assert twice.ids.count(tokenizer.bos_token_id) == 1


def test_train_on_all_trains_the_prompt_of_text_too(tokenizer_of):
    tokenizer = tokenizer_of("raw")
    seq = render_example(tokenizer, Example(ORIGIN, prompt="The capital", completion=" Paris"), "all")
    assert trained(tokenizer, seq) == ["The capital Paris<|endoftext|>"]
    assert seq.num_loss_tokens == len(seq.ids) - 1


STRADDLING = [
    ("The answer is ", "Paris"),  # " Paris" is one token, and its offset hides the space
    ("The answer is 4", "2"),  # digits merge
    ("Yes\n", "\nNo"),  # newlines merge
    ("ta  ", "12"),  # white space before a digit splits otherwise than at the end of a text
]


@pytest.mark.parametrize(("prompt", "completion"), STRADDLING)
@pytest.mark.parametrize("family", ["raw", "gemma"])
def test_the_prompt_is_always_tokenised_as_when_sampling(tokenizer_of, family, prompt, completion):
    tokenizer = tokenizer_of(family)
    seq = render_example(tokenizer, Example(ORIGIN, prompt=prompt, completion=completion))
    alone = render_prompt(tokenizer, Prompt(ORIGIN, prompt))
    assert seq.ids[: len(alone)] == alone
    assert seq.loss_mask == (False,) * len(alone) + (True,) * (len(seq.ids) - len(alone))
    assert seq.ids[-1] == tokenizer.eos_token_id
    if family == "raw":
        assert tokenizer.decode(seq.ids) == prompt + completion + tokenizer.eos_token


def test_characters_of_several_tokens_are_masked_whole(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    messages = (user("é🙂"), assistant("🙂 naïve 日本"), user("x"), assistant("ü"))
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages))
    assert trained(tokenizer, seq) == ["🙂 naïve 日本<|im_end|>", "ü<|im_end|>"]


def test_pairs_share_the_prompt_and_train_the_answers(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    pair = PreferencePair(ORIGIN, (user("2+2?"),), (assistant("4"),), (assistant("It is 5"),))
    chosen, rejected = render_pair(tokenizer, pair)
    assert trained(tokenizer, chosen) == ["4<|im_end|>"] and trained(tokenizer, rejected) == ["It is 5<|im_end|>"]
    prompt = render_prompt(tokenizer, Prompt(ORIGIN, (user("2+2?"),)))
    assert chosen.ids[: len(prompt)] == rejected.ids[: len(prompt)] == prompt
    text = PreferencePair(ORIGIN, "The answer is ", "Yes", "No")
    chosen, rejected = render_pair(tokenizer, text)
    assert trained(tokenizer, chosen) == ["Yes<|im_end|>"] and trained(tokenizer, rejected) == ["No<|im_end|>"]


def test_multi_turn_answers_train_only_their_own_turns(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    row = LabelledCompletion(
        ORIGIN,
        (user("a"), assistant("Yes"), user("b")),
        (assistant("No"), {"role": "tool", "content": "t"}, assistant("12")),
        True,
    )
    assert trained(tokenizer, render_labelled(tokenizer, row)) == ["No<|im_end|>", "12<|im_end|>"]


def test_text_prompts_are_tokenised_with_bos_and_without_eos(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    assert render_prompt(tokenizer, Prompt(ORIGIN, "Hello")) == tuple(tokenizer("Hello")["input_ids"])


def test_unpaired_surrogates_are_named(tokenizer_of):
    with pytest.raises(DataError, match=r"^train\.jsonl:41: the text holds an unpaired surrogate \(\\ud800\)"):
        render_example(tokenizer_of("raw"), Example(ORIGIN, completion="a\ud800b"))


SWITCHED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '/think ' if enable_thinking and m.role == 'user' }}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if enable_thinking else '<think></think>' }}{% endif %}"
)


def test_chat_template_kwargs_reach_data_rollouts_evals_and_what_is_exported(tokenizer_of, tmp_path):
    tokenizer = tokenizer_of("raw")
    tokenizer.chat_template = SWITCHED
    question = (user("Hello"),)
    without = tokenizer.decode(render_prompt(tokenizer, Prompt(ORIGIN, question)))
    for _ in range(2):  # a loader sets them again on a tokenizer that was loaded with them
        use_template(tokenizer, None, {"enable_thinking": True})
    assert tokenizer.chat_template.count("set enable_thinking") == 1
    asked = tokenizer.decode(render_prompt(tokenizer, Prompt(ORIGIN, question)))
    assert asked == "<|im_start|>user\n/think Hello<|im_end|>\n<|im_start|>assistant\n" != without
    assert tokenizer.decode(chat_ids(tokenizer, question)) == asked
    row = render_example(tokenizer, Example(ORIGIN, messages=(*question, assistant("fine"))))
    assert tokenizer.decode(row.ids).startswith(asked) and trained(tokenizer, row) == ["fine<|im_end|>"]
    tokenizer.save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported.apply_chat_template(list(question), tokenize=False, add_generation_prompt=True) == asked
    assert "/think" not in exported.apply_chat_template(list(question), tokenize=False, enable_thinking=False)


OVERFLOWING = {
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "too deep to compile": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "writes without end": "{% for m in messages %}{{ m.content * 9999999 }}{% endfor %}",
    "too large a range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "divides by zero": "{{ 1 // 0 }}",
    "no such index": "{{ messages[7].content }}",
}


@pytest.mark.parametrize("case", OVERFLOWING)
def test_a_template_that_overflows_is_refused_when_the_data_is_loaded_in_one_line(case, tokenizer_of):
    tokenizer = tokenizer_of("raw")
    tokenizer.chat_template = OVERFLOWING[case]
    with pytest.raises(
        DataError, match=r"^train\.jsonl:41: the chat template (refuses|writes [\d,]+ characters)"
    ) as caught:
        render_example(tokenizer, Example(ORIGIN, messages=(user("a"), assistant("b"))))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("answer", ["Paris", " Paris", "Paris is the capital", "42"])
@pytest.mark.parametrize("asked", ["The answer is ", "The answer is", "Question: "])
def test_a_prompt_that_ends_in_a_space_gains_no_second_one_under_sentencepiece(tokenizer_of, asked, answer):
    tokenizer = tokenizer_of("gemma")
    seq = render_example(tokenizer, Example(ORIGIN, prompt=asked, completion=answer))
    assert tokenizer.decode(seq.ids, skip_special_tokens=True) == f"{asked}{answer}"
    assert trained(tokenizer, seq)[-1].lstrip() == f"{answer.lstrip()}<eos>"
    prompt = render_prompt(tokenizer, Prompt(ORIGIN, asked))
    assert seq.ids[: len(prompt)] == prompt and seq.loss_mask.index(True) == len(prompt)


def test_chat_answers_gain_no_space_under_sentencepiece(tokenizer_of):
    tokenizer = tokenizer_of("gemma")
    messages = (user("Hello"), assistant("Yes"), user("No"), assistant("42"))
    seq = render_example(tokenizer, Example(ORIGIN, messages=messages))
    assert "model\nYes<end_of_turn>" in tokenizer.decode(seq.ids) and "model\n42<end_of_turn>" in tokenizer.decode(
        seq.ids
    )
