"""Each rule fires on the fault it is for and stays silent on sound data; thresholds refuse; cleaning takes rows out."""

import json

import pytest

from posttrain.config.datasets import DatasetKeys
from posttrain.config.preference import DPOKeys
from posttrain.config.stages import SFTKeys
from posttrain.data.dataset import sequences
from posttrain.data.lint import RuleLimit, limits_of, lint, lint_stage, write_clean
from posttrain.data.lint_input import LintInput
from posttrain.data.lint_rules import RULES
from posttrain.data.load import load_preference, load_sft
from posttrain.data.parse import unpair
from posttrain.data.render import draft_example, draft_labelled, draft_pair, tokenize
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, LabelledCompletion, Origin, PreferencePair, Prompt, TokenSeq

NAMES = ["Paris", "Rome", "Oslo", "Bern", "Riga", "Lima", "Cairo", "Quito", "Tunis", "Accra"]


def render_example(tokenizer, example, train_on="assistant"):
    return tokenize(tokenizer, draft_example(tokenizer, example, train_on)).seqs[0]


def render_labelled(tokenizer, row):
    return tokenize(tokenizer, draft_labelled(tokenizer, row)).seqs[0]


def render_pair(tokenizer, pair):
    return tuple(tokenize(tokenizer, draft_pair(tokenizer, pair)).seqs)


def at(line):
    return Origin("train.jsonl", line)


def chat(line, question, answer):
    return Example(at(line), messages=({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def pair(line, prompt, chosen, rejected):
    return PreferencePair(at(line), prompt, chosen, rejected)


def sound_chats(count=10):
    return [
        chat(i, f"What is the capital number {i} please?", f"The answer is {NAMES[i % 10]}{i}.")
        for i in range(1, count + 1)
    ]


def sound_pairs(count=24):
    return [pair(i, f"Question {i}?", f" good {'x' * (i % 3)}", f" bad {'y' * (i % 4)}") for i in range(1, count + 1)]


def sound_prompts(count=10):
    return [Prompt(at(i), f"What is {i} + {i}?", {"answer": str(2 * i)}) for i in range(1, count + 1)]


def sft_input(tokenizer, nouns, **more):
    rendered = more.pop("rendered", None) or [(render_example(tokenizer, noun),) for noun in nouns]
    return LintInput("examples", nouns, rendered, tokenizer, more.pop("sequence_len", 512), **more)


def fired(given, rule):
    return [origin.line for origin, _ in RULES[rule].check(given)]


@pytest.fixture
def tokenizer(tokenizer_of):
    return tokenizer_of("chatml")


def test_sound_data_of_every_stage_has_no_findings(tokenizer):
    chats, pairs, prompts = sound_chats(), sound_pairs(), sound_prompts()
    labelled = [row for noun in pairs for row in unpair(noun)]
    suites = {"heldout": ["What is the capital of Peru, which city is it, and how large is it today?"]}
    inputs = [
        sft_input(tokenizer, chats, suites=suites, eval_nouns=[chat(1, "Who are you?", "me")]),
        LintInput("pairs", pairs, [render_pair(tokenizer, p) for p in pairs], tokenizer, 512, suites=suites),
        LintInput("labels", labelled, [(render_labelled(tokenizer, r),) for r in labelled], tokenizer, 512),
        LintInput("prompts", prompts, [], tokenizer, 512, check_golds=lambda asked: [None] * len(asked)),
    ]
    for given in inputs:
        report = lint(given)
        assert report.findings == () and not report.refused
        report.raise_if_refused()


def test_duplicate_and_near_duplicate(tokenizer):
    long = "The quick brown fox jumps over the lazy dog while the cat sleeps near the warm stove in the old kitchen"
    nouns = [
        *sound_chats(),
        chat(11, "What is the capital  number 1 please?", "The answer is Rome1."),
        chat(12, long, long),
        chat(13, long, long + " now"),
    ]
    given = sft_input(tokenizer, nouns)
    assert fired(given, "duplicate") == [11]
    assert fired(given, "near_duplicate") == [13]


def test_eval_overlap_and_contamination(tokenizer):
    nouns = sound_chats()
    given = sft_input(
        tokenizer,
        nouns,
        eval_nouns=[chat(1, "What is the capital number 3 please?", "other")],
        suites={"heldout": ["what is the capital number 7 please?"]},
    )
    assert fired(given, "eval_overlap") == [3]
    assert fired(given, "contamination") == [7]


def test_round_trip_finds_text_the_tokenizer_cannot_hold(tokenizer_of):
    gemma = tokenizer_of("gemma")
    given = sft_input(gemma, [chat(1, "Hello", "thank you"), chat(2, "日本", "Yes")])
    assert fired(given, "template_round_trip") == [2]


def test_drift_from_the_tokenizers_template(tokenizer):
    own = tokenizer.chat_template
    nouns = sound_chats(3)
    assert fired(sft_input(tokenizer, nouns, own_template=own), "template_drift") == []
    assert fired(sft_input(tokenizer, nouns, own_template=own.replace("user", "human") + " "), "template_drift") == [
        1,
        2,
        3,
    ]
    assert fired(sft_input(tokenizer, nouns, own_template="{{ raise_exception('no') }}"), "template_drift") == [1, 2, 3]


def test_control_tokens_in_a_message(tokenizer):
    nouns = [*sound_chats(2), chat(3, "ignore this<|im_end|>", "Yes")]
    assert fired(sft_input(tokenizer, nouns), "control_tokens") == [3]


def masked(tokenizer, noun, mask):
    seq = render_example(tokenizer, noun)
    return (TokenSeq(seq.ids, tuple(mask(i, len(seq.ids), on) for i, on in enumerate(seq.loss_mask)), seq.origin),)


def test_masks_that_train_nothing_or_the_prompt(tokenizer):
    nouns = sound_chats(2)
    nothing = [masked(tokenizer, nouns[0], lambda i, n, on: False), (render_example(tokenizer, nouns[1]),)]
    assert fired(sft_input(tokenizer, nouns, rendered=nothing), "nothing_trained") == [1]
    everything = [masked(tokenizer, nouns[0], lambda i, n, on: True), (render_example(tokenizer, nouns[1]),)]
    given = sft_input(tokenizer, nouns, rendered=everything)
    assert fired(given, "prompt_trained") == [1]
    assert fired(sft_input(tokenizer, nouns, rendered=everything, train_on="all"), "prompt_trained") == []
    echo = [chat(1, "Say the words: good morning", "Say the words: good morning")]
    assert fired(sft_input(tokenizer, echo), "prompt_trained") == []


def test_missing_end_and_truncated_answers(tokenizer, tokenizer_of):
    plain = tokenizer_of("plain")
    assert fired(sft_input(plain, sound_chats(2)), "no_end") == [1, 2]
    nouns = sound_chats(2)
    seqs = [render_example(tokenizer, noun) for noun in nouns]
    cut = len(seqs[0].ids) - 4
    rendered = [(TokenSeq(seqs[0].ids[:cut], seqs[0].loss_mask[:cut], at(1)),), (seqs[1],)]
    given = sft_input(tokenizer, nouns, rendered=rendered, sequence_len=cut)
    assert fired(given, "truncated") == [1]
    assert fired(given, "no_end") == []
    exact = sft_input(tokenizer, nouns[:1], rendered=[(seqs[0],)], sequence_len=len(seqs[0].ids))
    assert fired(exact, "truncated") == []


def test_length_outliers(tokenizer):
    nouns = [*sound_chats(30), chat(31, "Hello", "Yes " * 300)]
    assert fired(sft_input(tokenizer, nouns), "length_outlier") == [31]


def dpo_input(tokenizer, nouns):
    return LintInput("pairs", nouns, [render_pair(tokenizer, noun) for noun in nouns], tokenizer, 512)


def test_pairs_alike_contradictory_and_biased(tokenizer):
    nouns = [*sound_pairs(), pair(25, "Q?", " Yes.", " yes ."), pair(26, "Question 4?", " bad ", " good x")]
    given = dpo_input(tokenizer, nouns)
    assert fired(given, "pair_alike") == [25]
    assert fired(given, "contradiction") == [26]
    assert fired(given, "length_bias") == []
    longer = [pair(i, f"Q{i}?", " a long answer", " short") for i in range(1, 25)]
    assert fired(dpo_input(tokenizer, longer), "length_bias") == list(range(1, 25))
    labels = [LabelledCompletion(at(1), "Q?", " Yes", True), LabelledCompletion(at(2), "Q?", " yes", False)]
    rendered = [(render_labelled(tokenizer, row),) for row in labels]
    assert fired(LintInput("labels", labels, rendered, tokenizer, 512), "contradiction") == [2]


def test_golds_that_are_missing_or_unreadable(tokenizer):
    nouns = [*sound_prompts(3), Prompt(at(4), "What?", {"answer": " "}), Prompt(at(5), "Why?", {})]
    given = LintInput(
        "prompts",
        nouns,
        [],
        tokenizer,
        512,
        check_golds=lambda asked: ["scores 0" if p.origin.line == 2 else None for p in asked],
    )
    assert fired(given, "gold_missing") == [4, 5]
    assert fired(given, "gold_unreadable") == [2]
    assert fired(LintInput("prompts", [Prompt(at(1), "Write a poem", {})], [], tokenizer, 512), "gold_missing") == []
    zero = [Prompt(at(1), "1-1?", {"answer": 0}), Prompt(at(2), "is it?", {"answer": False})]
    assert fired(LintInput("prompts", zero, [], tokenizer, 512), "gold_missing") == []


def test_thresholds_refuse_and_can_be_changed(tokenizer):
    nouns = sound_chats()
    given = sft_input(tokenizer, nouns, suites={"heldout": ["what is the capital number 7 please?"]})
    report = lint(given)
    (finding,) = report.findings
    assert (finding.rule, finding.count, finding.share, finding.refuses) == ("contamination", 1, 0.1, True)
    refused = (
        r"the data is refused: contamination: 1 rows \(10\.0%, refused above 1%\).*train\.jsonl:7 .*--write-clean DIR"
    )
    with pytest.raises(DataError, match=refused):
        report.raise_if_refused()
    assert not lint(given, {"contamination": {"limit": 0.1}}).refused
    assert lint(given, {"contamination": {"limit": 0.09}}).refused
    assert [f.action for f in lint(given, {"contamination": {"action": "warn"}}).findings] == ["warn"]
    assert lint(given, {"contamination": {"action": "warn", "limit": 0.1}}).findings == ()
    assert lint(given, {"contamination": {"action": "off"}}).findings == ()
    assert json.loads(json.dumps(report.to_json()))["findings"][0]["first"] == [
        "train.jsonl:7: holds a prompt of suite heldout"
    ]


def test_a_limit_alone_refuses_where_the_rule_only_warns(tokenizer):
    given = dpo_input(tokenizer, [pair(i, f"Q{i}?", " a long answer", " short") for i in range(1, 25)])
    assert not lint(given).refused
    assert lint(given, {"length_bias": {"limit": 0.5}}).refused
    assert not lint(given, {"length_bias": {"limit": 0.5, "action": "warn"}}).refused


@pytest.mark.parametrize(("changes", "message"), [
    ({"near_duplicates": {}}, r"lint\.near_duplicates: no such rule; did you mean near_duplicate\?"),
    ({"no_end": {"threshold": 0.1}}, r"lint\.no_end\.threshold: no such key; expected one of limit, action"),
    ({"no_end": {"limits": 0.1}}, r"lint\.no_end\.limits: no such key; did you mean limit\?"),
    ({"no_end": {"action": "stop"}}, r"lint\.no_end\.action: got 'stop', expected warn, refuse or off"),
    ({"no_end": {"limit": 5}}, r"lint\.no_end\.limit: got 5, expected a share of the rows from 0 to 1"),
    ({"no_end": {"limit": True}}, r"lint\.no_end\.limit: got True"),
])  # fmt: skip
def test_what_the_key_lint_may_not_say(changes, message):
    with pytest.raises(ConfigError, match=message):
        limits_of(changes)


def test_limits_are_those_of_the_table_unless_changed():
    assert limits_of({})["contamination"] == RuleLimit("refuse", 0.01)
    assert limits_of({"near_duplicate": {"limit": 0.2}})["near_duplicate"] == RuleLimit("refuse", 0.2)
    assert limits_of({"near_duplicate": {"action": "warn", "limit": 0.2}})["near_duplicate"] == RuleLimit("warn", 0.2)
    assert "no_end" not in limits_of({"no_end": {"action": "off"}})


def test_a_share_is_of_the_rows_that_were_looked_at(tokenizer_of):
    gemma = tokenizer_of("gemma")
    nouns = [chat(i, f"Hello {i}", "日本") for i in range(1, 601)]
    rows = [(render_example(gemma, nouns[0]),)]
    (finding,) = [f for f in lint(sft_input(gemma, nouns, rendered=rows)).findings if f.rule == "template_round_trip"]
    assert (finding.count, finding.share, finding.refuses) == (500, 1.0, True)


def test_rows_that_loading_left_out_are_counted(tokenizer, write_jsonl):
    chats = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": "Yes " * n}]}
             for i, n in enumerate([1, 1, 90, 1])]  # fmt: skip
    chats.append({"messages": [{"role": "user", "content": "Who?"}]})
    keys = SFTKeys(base_model="x", datasets=[{"path": str(write_jsonl(chats))}], sequence_len=64)
    for _ in ("first", "from the cache"):
        data = load_sft(keys, tokenizer)
        found = {
            f.rule: [str(o).rsplit("/", 1)[-1] for o, _ in f.offences]
            for f in lint_stage(keys, tokenizer, data).findings
        }
        assert found == {"too_long": ["train.jsonl:3"], "nothing_trained": ["train.jsonl:5"]}
    assert "lines" not in json.dumps(data.summary.to_json())


def test_answers_that_were_cut_before_they_came_here(tokenizer):
    open_ones = ["```python\nx = 1", "<think>first", r"so \boxed{4", "<answer>4", r"\begin{align} x"]
    nouns = [chat(i, f"Question {i}", answer) for i, answer in enumerate(open_ones, 1)]
    closed = [
        "```python\nx = 1\n```",
        "<think>a</think> b",
        r"so \boxed{4}",
        "prose without an end",
        r"\boxed{\frac{1}{2}}",
    ]
    nouns += [chat(i, f"Question {i}", answer) for i, answer in enumerate(closed, 6)]
    assert fired(sft_input(tokenizer, nouns), "unfinished") == [1, 2, 3, 4, 5]
    pairs = [pair(1, "Q?", " yes", " ```"), pair(2, "Q?", " ```", " no")]
    assert fired(dpo_input(tokenizer, pairs), "unfinished") == [2]
    labelled = [LabelledCompletion(at(1), "Q?", "<think>", False), LabelledCompletion(at(2), "Q?", "<think>", True)]
    rendered = [(render_labelled(tokenizer, row),) for row in labelled]
    assert fired(LintInput("labels", labelled, rendered, tokenizer, 512), "unfinished") == [2]


def test_every_rule_is_tested():
    source = open(__file__).read()  # noqa: SIM115
    assert [name for name in RULES if source.count(f'"{name}"') == 0] == []


def raw(question, answer):
    return {"turns": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "id": question}


def test_write_clean_keeps_the_rest_as_it_was(write_jsonl, tokenizer, tmp_path):
    rows = [raw("What is two and two?", "4"), raw("Who are you, my friend?", "me"), raw("What is two and two?", "4")]
    path = write_jsonl(rows)
    keys = SFTKeys(base_model="x", datasets=[{"path": str(path), "columns": {"messages": "turns"}}])
    data = load_sft(keys, tokenizer)
    report = lint_stage(keys, tokenizer, data, suites={"heldout": ["Who are you, my friend?"]})
    assert {f.rule: f.count for f in report.findings} == {"duplicate": 1, "contamination": 1}
    (cleaned,) = write_clean(report, keys.datasets, tmp_path / "clean")
    assert (cleaned.num_kept, cleaned.num_removed) == (1, 2)
    assert [json.loads(line) for line in cleaned.path.read_text().splitlines()] == rows[:1]
    removed = json.loads((tmp_path / "clean" / "removed.json").read_text())["removed"]
    assert [(key.rsplit("/", 1)[-1], why[0].split(":")[0]) for key, why in removed.items()] == [
        ("train.jsonl:2", "contamination"),
        ("train.jsonl:3", "duplicate"),
    ]
    again = keys.model_copy(update={"datasets": [keys.datasets[0].model_copy(update={"path": str(cleaned.path)})]})
    assert lint_stage(again, tokenizer, load_sft(again, tokenizer)).findings == ()


def test_write_clean_keeps_two_files_of_one_name_apart_and_refuses_to_write_nothing(write_jsonl, tokenizer, tmp_path):
    (tmp_path / "other").mkdir()
    one, two = write_jsonl([raw("a b c", "d")]), write_jsonl([raw("e f g", "h")], "other/train.jsonl")
    sources = [DatasetKeys(path=str(path), columns={"messages": "turns"}) for path in (one, two)]
    keys = SFTKeys(base_model="x", datasets=sources)
    report = lint_stage(keys, tokenizer, load_sft(keys, tokenizer))
    assert [c.path.name for c in write_clean(report, sources, tmp_path / "clean")] == ["train.jsonl", "train-2.jsonl"]
    bad = lint_stage(keys, tokenizer, load_sft(keys, tokenizer), suites={"s": ["a b c d"]})
    with pytest.raises(DataError, match=r"train\.jsonl: lint would take out all 1 rows"):
        write_clean(bad, sources[:1], tmp_path / "clean")


def test_rows_of_loaded_pairs_are_linted(write_jsonl, tokenizer):
    path = write_jsonl(
        [{"prompt": "Q", "chosen": " Yes", "rejected": " yes"}, {"prompt": "P", "chosen": " a", "rejected": " b"}]
    )
    keys = DPOKeys(base_model="x", datasets=[{"path": str(path)}])
    data = load_preference(keys, tokenizer)
    assert [len(sequences(row)) for row in data] == [2, 2]
    (finding,) = lint_stage(keys, tokenizer, data).findings
    assert (finding.rule, finding.offences[0][0].line) == ("pair_alike", 1)
