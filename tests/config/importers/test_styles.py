"""Axolotl's prompt styles of SFT rows: a row is written as Axolotl writes it, or refused by the style's name."""

import pytest

from posttrain.config import load_stage
from posttrain.config.datasets import DatasetKeys
from posttrain.config.importers.axolotl_styles import REFUSED
from posttrain.config.importers.convert import import_file
from posttrain.config.importers.read import read_foreign
from posttrain.data.prompt_format import write_prompts
from posttrain.errors import DataError
from posttrain.types import Origin

BASE = "base_model: a/b\nmicro_batch_size: 2\nlearning_rate: 2e-4\nsequence_len: 512\nmax_steps: 9\n"
PAIRED = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request."
ALONE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
TASK = {"instruction": "Add.", "input": "1 2", "output": "3"}


@pytest.fixture
def file(tmp_path):
    def write(style):
        (tmp_path / "theirs.yaml").write_text(BASE + f"datasets: [{{path: c/d, type: {style}}}]\n")
        return tmp_path / "theirs.yaml"

    return write


@pytest.fixture
def written(file):
    """The prompt of a row, and the column of its answer, by way of the YAML that is written."""

    def run(style, row):
        theirs = file(style)
        ours = theirs.with_name("ours.yaml")
        source = load_stage(import_file(theirs, ours).kind, ours).keys.datasets[0]
        [(_, row)] = write_prompts([(Origin("c/d", 1), dict(row))], source)
        return row["prompt"], source.columns["completion"]

    return run


@pytest.fixture
def preferred(tmp_path):
    def read(rl, style):
        text = BASE + f"rl: {rl}\ndatasets: [{{path: c/d, type: {style}}}]\n"
        (tmp_path / "theirs.yaml").write_text(text)
        return read_foreign(tmp_path / "theirs.yaml").convert()

    return read


# The texts are worked by hand from Axolotl's prompters.
@pytest.mark.parametrize(
    ("style", "row", "prompt", "answer"),
    [
        ("alpaca_instruct", TASK, f"{PAIRED}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "output"),
        ("alpaca_chat", TASK, f"SYSTEM: {PAIRED}\nUSER: Add.\n1 2\nASSISTANT:", "output"),
        ("alpaca_chat", {**TASK, "input": ""}, f"SYSTEM: {ALONE}\nUSER: Add.\nASSISTANT:", "output"),
        ("alpaca_chat.load_qa", {"question": "Why?"}, f"SYSTEM: {ALONE}\nUSER: Why?\nASSISTANT:", "answer"),
        ("alpaca_w_system", {**TASK, "system": "Be brief."}, "SYSTEM: Be brief.\nUSER: Add.\n1 2\nASSISTANT:", "output"),
        ("alpaca_w_system", {**TASK, "system": ""}, "USER: Add.\n1 2\nASSISTANT:", "output"),
        ("alpaca_w_system.load_chat", {"instruction": "Hi", "system": "S"}, "SYSTEM: S\nUSER: Hi\nASSISTANT:", "output"),
        ("alpaca_w_system.load_instruct", {"instruction": "Hi", "system": "S"}, "S\n\n### Instruction:\nHi\n\n### Response:\n", "output"),
        ("alpaca_w_system.load_open_orca", {"question": "Q", "system_prompt": "S"}, "### System:\nS\n### Human:\nQ\n### Assistant:\n", "response"),
        ("alpaca_w_system.load_open_orca_chatml", {"question": "Q", "system_prompt": ""}, "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "response"),
        ("context_qa", {"article": "A", "question": "Q"}, "SYSTEM: Use the following contextual information to concisely answer the question.\n\nUSER: A\n===\nQ\nASSISTANT:", "answer"),
        ("gpteacher", TASK, f"{PAIRED}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n", "response"),
        ("oasst", {"INSTRUCTION": "Hi"}, f"{ALONE}\n\n### Instruction:\nHi\n\n### Response:\n", "RESPONSE"),
        ("{format: '[{instruction}|{input}] {{x}}', field_input: more, no_input_format: '[{instruction}]'}", {"instruction": "Hi", "more": "there"}, "[Hi|there] {x}", "output"),
        ("{format: '[{instruction}|{input}]', field_input: more, no_input_format: '[{instruction}]', field_output: a}", {"instruction": "Hi"}, "[Hi]", "a"),
        ("{format: '[{instruction}|{input}]', no_input_format: '[{instruction}]'}", TASK, "[Add.|1 2]", "output"),
        ("{format: '[{instruction}|{input}]'}", {"instruction": "Hi"}, "Hi ", "output"),
        ("{field_instruction: q}", {"q": "Hi", "input": "there"}, "Hi there ", "output"),
        ("{format: '[{instruction}]', no_input_format: '[{instruction}]', system_prompt: 'Be {brief}.', system_format: '<{system}>'}", {"instruction": "Hi"}, "<Be {brief}.>[Hi]", "output"),
        ("{format: '[{instruction}]', no_input_format: '[{instruction}]', system_prompt: S, system_format: '<{system}>'}", {"instruction": "Hi", "system": "T"}, "<T>[Hi]", "output"),
        ("{format: '[{instruction}]', no_input_format: '[{instruction}]', field_system: s, system_format: '<{system}>'}", {"instruction": "Hi", "s": "Be brief."}, "<Be brief.>[Hi]", "output"),
        ("{format: '[{instruction}]', no_input_format: '[{instruction}]', field_system: s, system_format: '<{system}>'}", {"instruction": "Hi", "s": ""}, "[Hi]", "output"),
    ],
)  # fmt: skip
def test_a_prompt_is_written_as_axolotl_writes_it(written, style, row, prompt, answer):
    assert written(style, row) == (prompt, answer)


def test_a_row_without_the_columns_of_its_style_is_named(written):
    with pytest.raises(DataError, match="no prompt_format fits: expected text in question"):
        written("alpaca_chat.load_qa", {"instruction": "Hi"})


@pytest.mark.parametrize("style", REFUSED)
def test_a_style_that_cannot_be_had_is_refused_by_its_name(file, style):
    why, todo = REFUSED[style]
    assert [str(refusal) for refusal in read_foreign(file(style)).convert().refusals] == [f"datasets.1.type: {style}: {why}; {todo}"]  # fmt: skip


def test_a_key_of_a_style_that_is_not_known_is_refused(file):
    [refusal] = read_foreign(file("{format: '{instruction} {input}', field: text}")).convert().refusals
    assert str(refusal).startswith("datasets.1.type.field: text: no key of a prompt style that is known here; take it")


def test_what_is_known_is_told_with_a_style_that_is_not(file):
    [refusal] = read_foreign(file("own_style.load")).convert().refusals
    assert "chat_template, completion, alpaca, alpaca_instruct" in str(refusal)


@pytest.mark.parametrize(
    ("style", "refusal"),
    [
        ("{format: '[{instruction}|{input}] {x}'}", "type.format: [{instruction}|{input}] {x}: {x} names nothing there; write {instruction}, {input} where"),
        ("{format: '{input}', no_input_format: '{input}:'}", "type.no_input_format: {input}:: {input} names nothing there; write {instruction} where"),
        ("{format: '{input!r}'}", "type.format: {input!r}: {input} names nothing there"),
        ("{format: '{input} }'}", "type.format: {input} }: Single '}' encountered in format string; write"),
        ("{format: '[{instruction}]'}", "type.format: [{instruction}]: without {input}, and a row without one is written as '{instruction} ' there"),
        ("{system_format: '{text}'}", "type.system_format: {text}: {text} names nothing there"),
    ],
)  # fmt: skip
def test_a_format_that_axolotl_could_not_write_is_refused(file, style, refusal):
    assert [str(one) for one in read_foreign(file(style)).convert().refusals if refusal in str(one)]


@pytest.mark.parametrize(
    ("rl", "style", "row", "prompt"),
    [
        ("dpo", "{prompt_format: '{{a}} {prompt}:'}", {"prompt": "Hi"}, "{a} Hi:"),
        ("dpo", "{prompt_format: '<{system}> {prompt}', field_system: s, field_prompt: q}", {"q": "Hi", "s": "S"}, "<S> Hi"),
        ("dpo", "{prompt_format: '<{system}> {prompt}', field_system: s, field_prompt: system}", {"system": "Hi", "s": ""}, "<> Hi"),
        ("kto", "{prompt_format: '{{}}{prompt}', field_label: good}", {"prompt": "Hi", "good": True}, "{}Hi"),
    ],
)  # fmt: skip
def test_a_pairs_prompt_is_written_as_axolotl_writes_it(preferred, rl, style, row, prompt):
    [(_, row)] = write_prompts([(Origin("c/d", 1), dict(row))], DatasetKeys(**preferred(rl, style).keys["datasets"][0]))
    assert row["prompt"] == prompt


def test_a_name_or_key_that_a_style_of_pairs_has_not_is_refused(preferred):
    refusals = [str(one) for one in preferred("dpo", "{prompt_format: '{question}', field_question: q}").refusals]
    assert "datasets.1.type.prompt_format: {question}: {question} names nothing there" in refusals[1]
    assert "datasets.1.type.field_question: q: no key of a prompt style" in refusals[0]
