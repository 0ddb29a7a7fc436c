"""Our engine as a model of lm-eval, beside lm-eval's own `hf` model, item by item."""

import json
from contextlib import closing
from importlib.util import find_spec

import pytest

from posttrain.config.pipeline import SuiteKeys
from posttrain.config.stages import ModelKeys
from posttrain.errors import EvalError
from posttrain.evals.suite import load_suite
from posttrain.models.load import load_config, load_tokenizer
from posttrain.recipes.experience.engines import EngineSource, make_engine
from posttrain.recipes.measure.evaluate import evaluate

if find_spec("lm_eval") is None:
    pytest.skip("needs lm-eval: posttrain[eval]", allow_module_level=True)

import lm_eval
from lm_eval.tasks import TaskManager

from posttrain.recipes.measure.harness import EngineLM

CHOICES = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 2
fewshot_split: train
metric_list:
  - metric: acc
  - metric: acc_norm
"""
ANSWERS = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["b", "\\n"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
    ignore_case: true
"""
CONTINUED = """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[answer]}}"
metric_list:
  - metric: perplexity
  - metric: acc
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{long}}"
metric_list:
  - metric: word_perplexity
"""
TASKS = {"choices": CHOICES, "answers": ANSWERS, "continued": CONTINUED, "rolling": ROLLING}


def docs(count, start=0):
    words = ["red", "a blue one", "green as grass", "no colour"]
    return [
        {"question": f"What is {n} plus {n + 1}?", "choices": words[: 2 + n % 3], "answer": n % 2, "long": f"a b {n} " * 200}
        for n in range(start, start + count)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("test", docs(12)), ("train", docs(6, 50))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = json.dumps({name: str(folder / f"{name}.jsonl") for name in ("test", "train")})
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {files}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


@pytest.fixture(scope="module")
def model(model_dir):
    return ModelKeys(base_model=str(model_dir("qwen3")))


@pytest.fixture(scope="module")
def engine(model):
    with closing(make_engine(EngineSource(model))) as made:
        yield made


@pytest.fixture(scope="module")
def ours(model, engine):
    return EngineLM(engine, load_tokenizer(model), load_config(model).max_position_embeddings)


@pytest.fixture(scope="module")
def theirs(model):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model.base_model, dtype="float32", device="cpu", batch_size=4)


def asked(lm, tasks, name, **options):
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(
        task_manager=manager,
        model=lm,
        tasks=[str(tasks / f"{name}.yaml")],
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True}], ids=["plain", "chat"])
@pytest.mark.parametrize("name", TASKS)
def test_numbers_are_those_of_lm_evals_own_model_item_by_item(ours, theirs, tasks, name, options):
    pairs = list(zip(asked(ours, tasks, name, **options), asked(theirs, tasks, name, **options), strict=True))
    assert len(pairs) == 12
    for mine, other in pairs:
        assert [mine[key] for key in ("prompt_hash", "arguments", "metrics")] == [
            other[key] for key in ("prompt_hash", "arguments", "metrics")
        ]
        if name == "answers":
            assert mine["resps"] == other["resps"] and mine["exact_match"] == other["exact_match"]
            continue
        for (one,), (two,) in zip(mine["resps"], other["resps"], strict=True):
            if name == "rolling":
                assert one == pytest.approx(two, abs=2e-3)  # of 1,400 tokens
            else:
                assert one[0] == pytest.approx(two[0], abs=1e-4) and one[1] == two[1]
        for metric in set(mine["metrics"]) & {"acc", "acc_norm"}:
            assert mine[metric] == other[metric]


def test_a_choice_that_the_model_would_say_itself_is_greedy(ours, tasks):
    [prompt] = ["What is 1 plus 2?"]
    [said] = ours._sampled({tuple(ours.tok_encode(prompt)): 3}).values()
    text = ours.tokenizer.decode(said)
    if ours._encode_pair(prompt, text)[1] == said:
        instance = lm_eval.api.instance.Instance("loglikelihood", {}, (prompt, text), 0)
        [(_, is_greedy)] = ours.loglikelihood([instance])
        assert is_greedy


@pytest.mark.parametrize(
    ("name", "metric"), [("choices", "acc"), ("choices?metric=acc_norm", "acc_norm"), ("answers", "exact_match")]
)
def test_a_task_is_a_suite_whose_items_have_lm_evals_scores(model, theirs, tasks, tmp_path, name, metric):
    file, _, query = name.partition("?")
    path = f"lm-eval:{tasks / file}.yaml" + (f"?{query}" if query else "")
    suite = load_suite("mine", path)
    report = evaluate(model, [(suite, SuiteKeys(path=path))], "gate", tmp_path)["mine"]
    samples = asked(theirs, tasks, file)
    assert [item.scores for item in report.items] == [(float(sample[metric]),) for sample in samples]
    if file == "answers":
        assert [list(item.completions) for item in report.items] == [sample["resps"][0] for sample in samples]
        assert all(item.finishes and item.num_tokens for item in report.items)
    again = evaluate(model, [(load_suite("mine", path), SuiteKeys(path=path))], "gate", tmp_path)["mine"]
    assert again.wall_s == report.wall_s, "it was measured already"


def test_what_the_task_decides_is_refused_as_a_key(model, tasks, tmp_path):
    path = f"lm-eval:{tasks / 'answers.yaml'}"
    with pytest.raises(EvalError, match="num_samples: a task of lm-eval says itself"):
        evaluate(model, [(load_suite("mine", path), SuiteKeys(path=path, num_samples=2))], "gate", tmp_path)
