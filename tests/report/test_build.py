"""The page: self-contained, complete, safe with hostile text, and there also when parts of the run are missing."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from posttrain.errors import DataError
from posttrain.evidence import EvalReport, Verdict
from posttrain.report.build import build_report
from posttrain.report.forecast import forecast_stages
from posttrain.report.records import read_run
from posttrain.report.summary import summary_of
from posttrain.report.tables import before_after, paired_samples

_VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects tags, text and attributes, and insists that tags nest."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.urls, self.images, self.open = [], [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.urls += [value for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag == "img":
            self.images.append(attributes)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def _page(run):
    html = build_report(run).read_text()
    page = Page(html)
    return page, re.sub(r"\s+", " ", " ".join(page.text)), html


@pytest.fixture(scope="module")
def finished(finished_run):
    return _page(finished_run)


def test_nothing_is_loaded_from_elsewhere(finished):
    page, _, html = finished
    assert page.urls and all(url.startswith(("data:image/svg+xml;base64,", "#")) for url in page.urls)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html and "url(" not in html
    assert "default-src 'none'" in html


def test_every_section_is_there(finished):
    _, text, _ = finished
    for heading in (
        "Before and after", "The gate", "What each stage cost", "Health", "Reward certificate", "Learning curves",
        "The same questions, before and after", "Answers while training", "What was trained on", "Where it comes from", "To make it again",
    ):  # fmt: skip
        assert heading in text, heading


def test_the_headline_says_the_verdict_with_its_interval_in_words(finished):
    _, text, _ = finished
    assert (
        "PASS. The model passed its gate. On “heldout” the score rose from 12.0 % to 62.0 %, a change of +50.0 points; "
        "with 95 % confidence the true change lies between +45.0 and +55.0 points. "
        "It is registered as “word-problems” version 1, alias “champion”."
    ) in text


def test_numbers_of_the_records_are_shown(finished):
    _, text, _ = finished
    assert "1.7 min" in text and "410 000" in text  # stage 1's time and tokens
    assert "31 % of the answers hit the length limit" in text and "50–55 (2×)" in text
    assert "environment.torch" in text and "2.13.0" in text
    assert "two slots" in text


def test_the_data_of_each_stage_and_what_lint_found(finished):
    _, text, _ = finished
    assert "data/sft.jsonl chat 2 000 2 017 123 456 65 432 17 longer than sequence_len" in text.replace("\u202f", " ")
    assert "near_duplicate almost the same row again 31 (3.1 %) only said sft.jsonl:7: 91% like sft.jsonl:3" in text


def test_data_without_a_finding_and_data_that_was_refused(own_run):
    path = own_run / "stages" / "01-sft" / "lint.json"
    record = json.loads(path.read_text())
    bad = record["findings"][0] | {"action": "refuse", "limit": 0.01, "refuses": True}
    path.write_text(json.dumps(record | {"findings": [bad]}))
    assert "refused near_duplicate" in _page(own_run)[1] and "refused above 1 %" in _page(own_run)[1]
    path.write_text(json.dumps(record | {"findings": []}))
    assert "The data lint found nothing" in _page(own_run)[1]


def test_what_a_task_of_lm_eval_asked_is_that_of_the_split_that_is_shown(own_run):
    """Items of every split and of every suite may have the same ids."""
    (own_run / "config.yaml").write_text("name: word-problems\nevals:\n  heldout: lm-eval:gsm8k\nstages: []\n")
    for name in ("heldout-dev", "heldout-gate", "heldout-a-gate"):
        folder = own_run / "evals" / "base" / name
        folder.mkdir(exist_ok=True)
        rows = [{"id": f"q{n}", "prompt": f"{name}: question {n}?"} for n in range(400)]
        (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    prompts = [sample.prompt for sample in paired_samples(read_run(own_run))]
    assert prompts and all(prompt.startswith("heldout-gate: question ") for prompt in prompts)


def test_the_certificate_in_words(finished):
    _, text, html = finished
    assert "Reward certificate: 03-grpo pass" in text
    assert "Tried on 50 prompts and 200 answers of the starting model." in text
    for line in (
        "right answers that earn the full reward 99.5 % at least 98.0 %",
        "wrong answers dressed up that gain reward (false passes) 1 of 42 texts, 2 kinds 0",
        "right told from wrong (area under the curve) 0.999 at least 0.99",
        "best answer that does not read the question 0.06 (modal answer) low",
        "time for one answer, ms (median / p99 / longest) 0.4 / 2.7 / 3",
        "a reward that hangs is killed after 1.7 s",
        "forecast: prompts that teach nothing, all answers alike 28%",
        "one warning",
    ):
        assert line in text, line
    assert "1 for &#39;&lt;b&gt;&#39;" in html


def test_a_certificate_that_failed_lists_why(own_run):
    path = own_run / "stages" / "03-grpo" / "certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"verdict": "fail", "failures": ["empty: 3 of 3 texts"]}))
    _, text, _ = _page(own_run)
    assert "03-grpo fail" in text and "The rewards did not pass. Tried on" in text and "empty: 3 of 3 texts" in text


def test_looks_actions_and_the_total(finished):
    _, text, _ = finished
    assert (
        "A model that does not truly clear the lines passes with a probability of at most 5 %. This was look 2 at these questions."
        in text
    )
    assert "What was changed while 03-grpo ran Step 56: kl_drift: beta 0.1" in text
    assert "together 5.4 min 1 756 000 220 and 20 s of evaluation" in text.replace("\u202f", " ")


def test_contents_link_to_every_section_and_every_table_has_a_caption(finished):
    page, _, html = finished
    targets = re.findall(r'<a href="#([^"]+)"', html)
    assert len(targets) >= 10 and set(targets) == set(re.findall(r'<h2 id="([^"]+)"', html))
    assert page.tags.count("table") == page.tags.count("caption")


def test_limits_are_a_list_beside_the_table_of_tests(own_run):
    path = own_run / "gates" / "03" / "verdict.json"
    verdict = json.loads(path.read_text())
    limit = verdict["tests"][0] | {
        "role": "limit",
        "baseline_mean": 12.0,
        "reason": "answers have 12.0 tokens on average",
    }
    path.write_text(json.dumps(verdict | {"tests": [*verdict["tests"], limit]}))
    _, text, _ = _page(own_run)
    assert "limit on format: answers have 12.0 tokens on average" in text and "1200.0 %" not in text


def test_the_page_is_small_enough_to_send(finished):
    assert len(finished[2].encode()) < 300_000


def test_images_and_the_page_can_be_read_without_eyes(finished):
    page, _, html = finished
    assert '<html lang="en">' in html and 'name="viewport"' in html
    assert len(page.images) >= 10
    assert all(image["alt"] for image in page.images)
    assert "Paired differences with 95 % intervals: format +96.0 (+91.0 to +101.0), line −2.0" in page.images[0]["alt"]
    assert any("loss: 2.1" in image["alt"] and "at step 120" in image["alt"] for image in page.images)


def test_samples_pair_the_base_with_the_last_model_and_show_what_got_worse(own_run):
    _, text, html = _page(own_run)
    assert "better Question number" in text and "still wrong Question number" in text and "tag worse" not in html
    _worsen(own_run, number=7)
    assert " worse Question number 7?" in _page(own_run)[1]


def _worsen(run, number):
    for model, score in (("base", 1.0), ("03-grpo", 0.0)):
        folder = run / "evals" / model / "heldout-gate"
        report = EvalReport.load(folder)
        items = tuple(replace(item, scores=(score,)) if item.id == f"q{number}" else item for item in report.items)
        replace(report, items=items).save(folder)


def test_hostile_text_stays_text(own_run):
    sample = {
        "step": 1,
        "prompt": "</pre><script>alert(1)</script>",
        "completion": '"><img src=http://x/>',
        "reward": 0,
    }
    (own_run / "stages" / "03-grpo" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page, text, html = _page(own_run)
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert '"><img src=http://x/>' in text
    assert all(url.startswith(("data:", "#")) for url in page.urls)


def test_a_held_promotion_is_said(own_run):
    path = own_run / "stages" / "03-grpo" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"held": ["kl_drift", "truncation_spiral"]}))
    assert "Promotion is held after 03-grpo because of: kl_drift, truncation_spiral." in _page(own_run)[1]


def test_the_loss_mask_is_marked(finished):
    _, _, html = finished
    assert "user: 12+30=\nassistant: <mark>\\boxed{42}&lt;eos&gt;</mark>" in html


def test_the_same_run_gives_the_same_page(finished_run, finished):
    assert build_report(finished_run).read_text() == finished[2]


@pytest.mark.parametrize(("verdict", "sentence"), [
    (Verdict.FAIL, "FAIL. The model did not pass its gate and was not promoted."),
    (Verdict.INCONCLUSIVE, "INCONCLUSIVE. The model was neither accepted nor rejected: the evidence is too thin, which is not a pass."),
])  # fmt: skip
def test_other_verdicts(tmp_path, verdict, sentence, run_writer):
    _, text, _ = _page(run_writer(tmp_path / "run", verdict=verdict))
    assert sentence in text and "It is registered" not in text


@pytest.mark.parametrize(
    "part",
    [
        "evals",
        "gates",
        "stages/03-grpo/certificate.json",
        "config.yaml",
        "stages/02-dpo",
        "stages/01-sft/metrics.jsonl",
        "stages/01-sft/result.json",
        "pipeline.json",
    ],
)
def test_any_part_may_be_missing(own_run, part):
    path = own_run / part
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, text, _ = _page(own_run)
    assert "could not be read" not in text and "Where it comes from" in text


@pytest.mark.parametrize(
    "part",
    [
        "pipeline.json",
        "config.yaml",
        "stages/03-grpo/certificate.json",
        "gates/03/verdict.json",
        "evals/base/heldout-gate/items.jsonl",
        "stages/01-sft/summary.json",
    ],
)
def test_a_broken_part_is_named_and_the_rest_is_shown(own_run, part):
    (own_run / part).write_text('{"half: [')
    _, text, _ = _page(own_run)
    assert f"{part.rsplit('/', 1)[-1]} in" in text or "items.jsonl does not match" in text or "report.json in" in text
    assert "could not be read" in text and "Learning curves" in text


def test_a_single_stage_run_that_is_still_running(own_run):
    for part in ("evals", "gates", "stages/02-dpo", "stages/03-grpo"):
        shutil.rmtree(own_run / part)
    (own_run / "pipeline.json").unlink()
    (own_run / "stages" / "01-sft" / "result.json").unlink()
    with (own_run / "stages" / "01-sft" / "metrics.jsonl").open("a") as handle:
        handle.write('{"step": 121, "lo')
    _, text, _ = _page(own_run)
    assert "No model was compared with another" in text
    assert "unfinished" in text and "none fired." in text and "Loss" in text


@pytest.mark.parametrize("line", ['{"loss": 1}', '{"step": "4", "loss": 1}', '{"step": null, "loss": 1}', '{"step": true}'])  # fmt: skip
def test_a_line_of_metrics_that_is_no_step_is_named_and_left_out(own_run, line):
    """Also where a forecast reads the run, which ended in a traceback."""
    path = own_run / "stages" / "03-grpo" / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    _, text, _ = _page(own_run)
    assert "metrics.jsonl:1 in 03-grpo/ is no logged step and is left out" in text
    assert forecast_stages(read_run(own_run), "loss", 10_000, 0.01)


def test_running_and_failed_runs_say_so(own_run):
    pipeline = json.loads((own_run / "pipeline.json").read_text())
    for status, sentence in (("running", "The run has not finished"), ("error", "The run stopped with an error")):
        (own_run / "pipeline.json").write_text(json.dumps(pipeline | {"status": status}))
        assert sentence in _page(own_run)[1]


def second_generation(run):
    """The run as one that was judged against the champion of an earlier one; only the gate's suite was measured on it."""
    champion = EvalReport.load(run / "evals" / "02-dpo" / "heldout-gate")
    replace(champion, model_digest="sha256:champion").save(run / "evals" / "word-problems-v1" / "heldout-gate")
    path = run / "gates" / "03" / "verdict.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"baseline_digest": "sha256:champion"}))


def test_from_the_second_generation_on_the_table_shows_what_the_gate_compared_champion_first(own_run):
    second_generation(own_run)
    run = read_run(own_run)
    assert run.models == ["word-problems-v1", "base", "01-sft", "02-dpo", "03-grpo"]
    rows = {row.suite: row for row in before_after(run)}
    assert rows["heldout"].compared == ("word-problems-v1", "03-grpo")
    assert rows["heldout"].change.mean == pytest.approx(
        rows["heldout"].scores[-1].mean - rows["heldout"].scores[0].mean
    )
    assert rows["format"].compared == ("base", "03-grpo")
    assert "word-problems-v1 → 03-grpo" in _page(own_run)[1] and "base → 03-grpo" in _page(own_run)[1]
    header, heldout, format_ = summary_of(run).splitlines()[:3]
    assert header.split()[1] == "word-problems-v1" and "word-problems-v1 → 03-grpo (95 % interval)" in header
    assert "(base → 03-grpo)" in format_ and "→" not in heldout


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"is not a run folder .* give the folder that `posttrain run` printed"):
        build_report(tmp_path)


def test_an_engine_that_is_not_the_embedded_one_is_named(own_run, finished):
    assert "answered by" not in finished[1]
    for path in own_run.glob("evals/*/heldout-gate/report.json"):
        report = replace(EvalReport.load(path.parent), engine="vllm 0.32")
        shutil.rmtree(path.parent)
        report.save(path.parent)
    assert "(gate split, answered by vllm 0.32)" in _page(own_run)[1]
