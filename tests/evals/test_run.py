import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.errors import EvalError
from posttrain.evals.run import Evaluator, pass_at_k, pass_at_ks
from posttrain.evals.suite import load_suite
from posttrain.evidence import EvalReport, ItemRecord
from posttrain.models.load import load_policy
from posttrain.recipes.measure.evaluate import OwnScorers, TokenizerCodec, evaluate
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import request_seed


@pytest.fixture
def suite(tmp_path):
    def write(rows, name="s", **keys):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_suite(name, path), SuiteKeys(path=str(path), **{"max_tokens": 5, **keys})

    return write


@pytest.fixture(scope="module")
def evaluator(model_dir):
    policy = load_policy(ModelKeys(base_model=str(model_dir("qwen3"))), trainable=False)
    return Evaluator(EmbeddedEngine(policy, stop_token_ids=(2,)), TokenizerCodec(policy.tokenizer), "m", request_seed)


def items(**changes):
    return [
        {"id": f"i{n}", "messages": [{"role": "user", "content": f"What is {n}?"}], "target": "x", **changes}
        for n in range(4)
    ]


def test_every_item_is_answered_and_kept(evaluator, suite):
    made, keys = suite(items(cluster="c"), num_samples=3, temperature=1.0)
    report = evaluator.run(made, keys, "gate")
    assert [item.id for item in report.items] == ["i0", "i1", "i2", "i3"]
    for item in report.items:
        assert len(item.scores) == len(item.completions) == len(item.finishes) == len(item.num_tokens) == 3
        assert item.cluster == "c"
        assert item.error is None
    assert len({text for item in report.items for text in item.completions}) > 4
    assert report.decoding == {"num_samples": 3, "temperature": 1.0, "max_tokens": 5, "seed": 0}
    assert evaluator.run(made, keys, "gate").digest == report.digest
    assert evaluator.run(made, keys.model_copy(update={"seed": 1}), "gate").digest != report.digest


def test_scores_are_those_of_the_scorer(evaluator, suite):
    made, keys = suite(items())
    answers = {item.id: item.completions[0] for item in evaluator.run(made, keys, "gate").items}
    right = [
        {**row, "target": answers[row["id"]] if row["id"] in ("i0", "i2") else "no such answer"} for row in items()
    ]
    report = evaluator.run(*suite(right, name="r"), "gate")
    assert [item.score for item in report.items] == [1.0, 0.0, 1.0, 0.0]
    assert report.mean == 0.5


def test_answers_of_a_model_do_not_depend_on_the_other_items(evaluator, suite):
    whole = evaluator.run(*suite(items(), temperature=1.0), "gate")
    part = evaluator.run(*suite(items()[2:3], temperature=1.0), "gate")
    assert part.items[0] == whole.items[2]


def test_progress_is_told(evaluator, suite):
    seen = []
    told = Evaluator(evaluator.engine, evaluator.codec, "m", request_seed, lambda *args: seen.append(args))
    told.run(*suite(items()), "gate")
    assert seen[-1] == ("s", 4, 4)


def test_choices_are_ranked_by_the_likelihood_of_the_whole_answer(evaluator, suite, model_dir, tokenizer):
    options = [" one", " two and more", " 3"]
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)

    def logp(prompt, answer):
        prompt, answer = tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(logits.gather(-1, torch.tensor(answer)[:, None]).sum())

    prompts = [f"{n} times two is" for n in range(5)]
    best = [max(options, key=lambda answer, prompt=prompt: logp(prompt, answer)) for prompt in prompts]
    rows = [{"id": str(n), "prompt": p, "choices": options, "target": options[n % 3]} for n, p in enumerate(prompts)]
    report = evaluator.run(*suite(rows), "gate")
    assert [item.completions[0] for item in report.items] == best
    assert [item.scores for item in report.items] == [(float(options[n % 3] == b),) for n, b in enumerate(best)]


def test_acc_and_acc_norm_are_those_of_lm_eval(evaluator, suite, model_dir, tokenizer):
    """acc: the largest sum of log-probs; acc_norm: of that divided by the characters of the choice, its leading space aside."""
    options = [" one", " two and rather more than that", " 3"]
    model = AutoModelForCausalLM.from_pretrained(model_dir("qwen3"), dtype=torch.float32)

    def logp(prompt, answer):
        whole, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, start - 1 : -1].log_softmax(-1)
        return float(logits.gather(-1, torch.tensor(whole[start:])[:, None]).sum())

    prompts, found = [f"{n} times two is" for n in range(6)], {}
    for scorer, length in (
        ("acc", lambda answer: 1),
        ("choices", lambda answer: 1),
        ("acc_norm", lambda answer: len(answer) - 1),
    ):
        best = [max(range(3), key=lambda i, p=p, of=length: logp(p, options[i]) / of(options[i])) for p in prompts]
        rows = [
            {"id": str(n), "prompt": p, "choices": options, "target": n % 3, "scorer": scorer}
            for n, p in enumerate(prompts)
        ]
        report = evaluator.run(*suite(rows, name=scorer), "gate")
        assert [item.completions[0] for item in report.items] == [options[i] for i in best]
        assert [item.scores for item in report.items] == [(float(n % 3 == i),) for n, i in enumerate(best)]
        found[scorer] = best
    assert found["acc"] == found["choices"] != found["acc_norm"]


def test_a_choice_is_cut_from_the_whole_text_as_lm_eval_does(evaluator, tokenizer):
    for prompt, choice in (("2 times two is", " four"), ("2 times two is ", "four"), ("Answer:", " B"), ("x", "y")):
        ids, start = evaluator.codec.encode_choice(prompt, choice)
        assert list(ids) == tokenizer(prompt + choice)["input_ids"]
        assert start == min(len(tokenizer(prompt.rstrip())["input_ids"]), len(ids) - 1)


TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "looks up", "parameters": {}}}]


@pytest.mark.parametrize("more", [{}, {"choices": ["y", "z"], "target": 0}])
def test_the_tools_of_an_item_are_rendered_or_the_item_is_named(more, evaluator, suite):
    made, keys = suite(items(tools=TOOLS, **more))
    with pytest.raises(EvalError, match=r"suite item i0: .* does not write the tool `lookup`"):
        evaluator.run(made, keys, "gate")


def test_tools_reach_the_prompt_of_a_template_that_writes_them(evaluator):
    tokenizer = copy.deepcopy(evaluator.codec.tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tokenizer.chat_template
    codec, messages = TokenizerCodec(tokenizer), ({"role": "user", "content": "Hi"},)
    assert "looks up" in codec.decode(codec.encode_prompt(messages, TOOLS))
    assert "looks up" in codec.decode(codec.encode_choice(messages, "x", TOOLS)[0])


@pytest.fixture
def bare(tmp_path, make_model_in):
    """A model without a chat template."""
    folder = make_model_in(tmp_path / "bare", "qwen3")
    (folder / "chat_template.jinja").unlink()
    return ModelKeys(base_model=str(folder))


def test_chats_without_a_template_lose_their_roles_aloud_and_tools_are_refused(bare, suite, tmp_path, caplog):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1?"}]
    made = suite([{"id": "a", "messages": chat, "target": "x"}])
    plain = suite([{"id": "a", "prompt": "Be brief.\nWhat is 1?", "target": "x"}], name="plain")
    with caplog.at_level("WARNING", "posttrain"):
        found = evaluate(bare, [made, plain], "gate", tmp_path)
    assert found["s"].items[0].completions == found["plain"].items[0].completions
    (said,) = [m for m in caplog.messages if "without their roles" in m]
    assert "the messages of suite s (1 items)" in said
    for row in ({"messages": chat, "tools": TOOLS}, {"messages": [*chat, {"role": "assistant", "tool_calls": CALLS}]}):
        with pytest.raises(EvalError, match=r"suite item t: .*no chat template, and tools cannot be written"):
            evaluate(bare, [suite([{"id": "t", "target": "x", **row}], name="tools")], "gate", tmp_path)


CALLS = [{"id": "1", "type": "function", "function": {"name": "lookup", "arguments": {}}}]
OWN = """
import time

def length(prompts, completions, target, bonus, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [len(text) + float(target[i]) + bonus[i] for i, text in enumerate(texts)]

def paid(prompts, completions, answer, label):
    return [float(one) + 10 * float(other) for one, other in zip(answer, label)]

def fails(completions, target, **columns):
    if "2" in target: raise KeyError("no")
    return [1.0 for _ in completions]

def silent(completions, **columns):
    return [None for _ in completions]
"""


def test_a_scorer_of_ones_own_is_a_function_with_the_signature_of_a_reward(evaluator, suite, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    ours = replace(evaluator, score_own=OwnScorers())
    rows = [row | {"scorer": "own.py:length", "target": n, "bonus": 100} for n, row in enumerate(items())]
    rows[0] = {"id": "i0", "prompt": "What is 0?", "scorer": "own.py:length", "target": 0, "bonus": 100}
    report = ours.run(*suite(rows, num_samples=2, temperature=1.0), "gate")
    for n, item in enumerate(report.items):
        assert item.scores == tuple(len(text) + n + 100.0 for text in item.completions)
    assert report.scorer == "own.py:length"
    failed = ours.run(*suite([row | {"scorer": "own.py:fails"} for row in rows], name="f"), "gate")
    assert [item.scores for item in failed.items] == [(1.0,), (1.0,), (0.0,), (1.0,)]
    assert [bool(item.error) for item in failed.items] == [False, False, True, False]
    assert "KeyError" in failed.items[2].error
    with pytest.raises(EvalError, match=r"suite item i0: scorer 'own\.py:silent' could not score it"):
        ours.run(*suite([row | {"scorer": "own.py:silent"} for row in rows], name="n"), "gate")
    with pytest.raises(EvalError, match="no process to run it in"):
        evaluator.run(*suite(rows, name="w"), "gate")


def test_what_paid_in_training_finds_the_target_under_the_name_that_it_asks_for(evaluator, suite, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = [row | {"scorer": "own.py:paid", "target": str(n), "label": 7} for n, row in enumerate(items())]
    report = replace(evaluator, score_own=OwnScorers()).run(*suite(rows), "gate")
    assert [item.scores for item in report.items] == [(n + 70.0,) for n in range(len(rows))]


def test_an_item_that_cannot_be_scored_is_named_before_anything_is_asked(suite):
    rows = [
        {**row, "target": target, "scorer": "number"}
        for row, target in zip(items(), ["1", "2", None, "4"], strict=True)
    ]
    with pytest.raises(EvalError, match=r"s\.jsonl:3: scorer 'number' could never score it: it needs a `target`"):
        suite(rows)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (4, 0, 2), (4, 4, 4), (6, 1, 5)])
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer(n, c, k):
    subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 2), (1, 1, 2), (0, 0, 1), (3, 2, 5), (3, 1, 0), (3, 4, 1)])
def test_pass_at_k_of_fewer_samples_than_k_is_refused_and_never_one(n, c, k):
    with pytest.raises(EvalError, match=f"pass@{k} .*at least k samples"):
        pass_at_k(n, c, k)


def test_pass_at_ks_goes_up_to_the_number_of_samples():
    report = EvalReport(
        "s", "gate", "d", "m", "exact", (ItemRecord("a", "p", (1.0, 0.0, 0.0, 0.0)), ItemRecord("b", "p", (0.0,) * 4))
    )
    assert pass_at_ks(report) == {1: 0.125, 2: 0.25, 4: 0.5}


def test_what_was_measured_is_not_measured_again(suite, model_dir, tmp_path, monkeypatch):
    from posttrain.recipes.experience import engines as module

    keys, made = ModelKeys(base_model=str(model_dir("qwen3"))), suite(items())
    loads, original = [], module.load_policy
    monkeypatch.setattr(module, "load_policy", lambda *a, **k: loads.append(1) or original(*a, **k))
    first = evaluate(keys, [made], "gate", tmp_path / "out")
    again = evaluate(keys, [made], "gate", tmp_path / "out")
    assert again["s"].digest == first["s"].digest
    assert len(loads) == 1
    changed = suite(items(target="y"))
    assert evaluate(keys, [changed], "gate", tmp_path / "out")["s"].suite_digest != first["s"].suite_digest
    assert len(loads) == 2
    path = tmp_path / "out/s-gate/items.jsonl"
    path.write_text(path.read_text().replace('"scores":[0.0]', '"scores":[1.0]', 1))
    repaired = evaluate(keys, [changed], "gate", tmp_path / "out")
    assert len(loads) == 3
    assert repaired["s"].mean == 0.0


def test_another_order_asks_the_same_and_what_is_known_is_not_asked_again(evaluator, suite):
    made, keys = suite(items(), num_samples=2, temperature=1.0)
    report = evaluator.run(made, keys, "gate")
    assert evaluator.run(made, keys, "gate", order=3).digest == report.digest
    told = ItemRecord("i2", report.items[2].prompt_digest, (1.0, 1.0))
    again = evaluator.run(made, keys, "gate", known={"i2": told, "elsewhere": told})
    assert again.items == (*report.items[:2], told, report.items[3])


def test_two_splits_are_one_report_and_the_first_is_taken_over(suite, model_dir, tmp_path):
    keys = ModelKeys(base_model=str(model_dir("qwen3")))
    rows = [row | {"split": "gate" if n < 3 else "reserve"} for n, row in enumerate(items())]
    made = suite(rows)
    first = evaluate(keys, [made], "gate", tmp_path)["s"]
    both = evaluate(keys, [made], "gate+reserve", tmp_path)["s"]
    assert both.items[:3] == first.items
    assert [item.id for item in both.items] == ["i0", "i1", "i2", "i3"]
    assert both.suite_digest not in (first.suite_digest, evaluate(keys, [made], "reserve", tmp_path)["s"].suite_digest)
    told = [item.completions for item in both.items]
    fresh = evaluate(keys, [made], "gate+reserve", tmp_path / "fresh", order=1)["s"]
    assert [item.completions for item in fresh.items] == told
