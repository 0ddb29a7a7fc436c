"""The server as other programs ask it: lm-eval's API models, whose numbers are those of its own `hf` model, and curl."""

import json
import shutil
import subprocess
from importlib.util import find_spec

import pytest

TASKS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["yes", "no way", "blue"]
doc_to_target: answer
num_fewshot: 0
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{long}}"
metric_list: [{metric: word_perplexity}]
""",
    "answers": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "yes"
num_fewshot: 0
generation_kwargs: {until: ["b", "\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}
needs_lm_eval = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("lm_eval", "aiohttp", "tenacity")), reason="needs lm_eval[api]"
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is {n} plus {n + 1}?", "answer": n % 3, "long": f"a b {n} " * 60} for n in range(6)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = json.dumps({"test": str(folder / "test.jsonl")})
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + text)
    return folder


@pytest.fixture(scope="module")
def hf(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def api(serving, folder):
    """`api("completions")`: lm-eval's model that asks the server."""
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

    def make(kind, **options):
        url, options = f"{serving.address}/v1/{kind}", {"model": "tiny", "max_length": 512, "max_retries": 1, **options}
        if kind == "chat/completions":
            return LocalChatCompletion(base_url=url, eos_string="<eos>", **options)
        return LocalCompletionsAPI(
            base_url=url, tokenizer_backend="huggingface", tokenizer=str(folder), add_bos_token=True, **options
        )

    return make


def samples(lm, tasks, name, **options):
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=lm, tasks=[str(tasks / f"{name}.yaml")], bootstrap_iters=0, log_samples=True,
        task_manager=TaskManager(include_defaults=False), **options,
    )  # fmt: skip
    ordered = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(ordered) == 6
    return ordered


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "options"),
    [("choices", {"batch_size": 3}), ("choices", {"num_concurrent": 8}), ("rolling", {"num_concurrent": 8})],
)
def test_scores_through_local_completions_are_those_of_hf_item_by_item(api, hf, tasks, name, options):
    pairs = zip(samples(api("completions", **options), tasks, name), samples(hf, tasks, name), strict=True)
    for served, own in pairs:
        for [one], [two] in zip(served["resps"], own["resps"], strict=True):
            if name == "rolling":
                assert one == pytest.approx(two, abs=2e-3)  # of 400 tokens
            else:
                assert one[0] == pytest.approx(two[0], abs=1e-4) and one[1] == two[1]
        for metric in {"acc", "acc_norm"} & set(own):
            assert served[metric] == own[metric]


@needs_lm_eval
@pytest.mark.parametrize(("kind", "options"), [("completions", {"num_concurrent": 8}), ("chat/completions", {})])
def test_answers_through_both_endpoints_are_those_of_hf_item_by_item(api, hf, tasks, kind, options):
    chat = {"apply_chat_template": kind == "chat/completions"}
    served, own = (samples(lm, tasks, "answers", **chat) for lm in (api(kind, **options), hf))
    assert [one["resps"] for one in served] == [one["resps"] for one in own]
    assert [one["exact_match"] for one in served] == [one["exact_match"] for one in own]
    assert any(one["resps"][0][0] for one in own)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("stream", [False, True])
def test_curl_has_the_answer_of_the_openai_client(serving, client, stream):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "What is 1 plus 2?"}],
        "seed": 3,
        "max_tokens": 8,
    }
    head = ["-H", "Content-Type: application/json", "-d", json.dumps({**asked, "stream": stream})]
    found = subprocess.run(
        ["curl", "-sSN", "--fail-with-body", "-m", "60", f"{serving.address}/v1/chat/completions", *head],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    expected = client.chat.completions.create(**asked).choices[0].message.content
    if not stream:
        assert json.loads(found)["choices"][0]["message"]["content"] == expected
        return
    events = [line.removeprefix("data: ") for line in found.splitlines() if line]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(e)["choices"][0]["delta"].get("content") or "" for e in events[:-1]) == expected
