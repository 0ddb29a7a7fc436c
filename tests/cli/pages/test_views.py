"""Pages as a browser gets them, asked by HTTP and read by a parser."""

import json
import os

import pytest

from posttrain.cli.pages.views import RUNS_PER_PAGE

HOSTILE = "<script>alert(1)</script>"
RUN = "run=runs/first"
PATHS = (
    "/", "/?q=waits", f"/run?{RUN}", "/run?run=runs/waiting", f"/compare?{RUN}&run=runs/waiting", f"/data?{RUN}", "/registry",
    "/version?ref=words@1", "/configure?kind=grpo", "/configure?kind=pipeline", "/start?config=%3Cscript%3E", "/acts", "/chat", "/nowhere", "/run?run=runs/nowhere",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("allow_acts", [False, True])
def test_a_page_is_well_formed_named_and_has_no_script_but_ours(make_client, page_of, path, allow_acts):
    answer = make_client(allow_acts=allow_acts).get(path)
    assert answer.status_code == (400 if "runs/nowhere" in path else 404 if path == "/nowhere" else 200)
    page = page_of(answer.text)
    assert page.faults == []
    assert [one.get("src") for one in page.of("script")] == ["/static/curves.js", "/static/ui.js"]
    assert all(one.get("src", "/").startswith(("/", "data:")) for name, one in page.tags)
    assert not [one for _, one in page.tags if any(name.startswith("on") or name == "style" for name in one)]
    ids = [one["id"] for _, one in page.tags if "id" in one]
    assert len(ids) == len(set(ids))
    assert page.of("html", lang="en") and page.of("main", id="main") and page.of("a", href="#main")
    assert len(page.of("h1")) == 1
    labelled = {one["for"] for one in page.of("label") if "for" in one}
    fields = [one for tag in ("input", "select", "textarea") for one in page.of(tag) if one.get("type") != "hidden"]
    unnamed = [
        one for one in fields if not (one.get("id") in labelled or one.get("aria-label") or one in page.in_labels)
    ]
    assert unnamed == []
    assert answer.text.count("<table") == answer.text.count("<caption")


@pytest.mark.parametrize(
    "path", ["/", f"/run?{RUN}", "/run?run=runs/waiting", f"/data?{RUN}", f"/compare?{RUN}&run=runs/waiting"]
)
def test_text_of_strangers_stays_text(make_client, page_of, path):
    answer = make_client().get(path)
    assert HOSTILE not in answer.text and "<b>3" not in answer.text
    page = page_of(answer.text)
    assert len(page.of("script")) == 2 and ("alert(1)" in page.text or "compare" in path or path == f"/run?{RUN}")


def test_the_list_finds_by_words_and_says_who_waits(make_client, page_of):
    client = make_client()
    page = page_of(client.get("/").text)
    assert {one["value"] for one in page.of("input", name="run")} == {"runs/first", "runs/waiting"}
    assert "waits for a decision" in page.text and "2 of 2 runs" in page.text
    page = page_of(client.get("/?q=PASSED+first").text)
    assert [one["value"] for one in page.of("input", name="run")] == ["runs/first"]


def test_a_run_shows_stages_findings_evidence_samples_and_the_pending_decision(make_client, page_of):
    text = page_of(make_client().get("/run?run=runs/waiting").text).text
    for words in (
        "01-grpo",
        "entropy_collapse",
        "heldout",
        "A verdict waits for a decision",
        "one must approve",
        "gate decide",
        "reward 1.0",
        "Step 30, question",
    ):
        assert words in text, words


def test_samples_are_in_parts_the_last_first(make_client, page_of):
    client = make_client()
    assert "Step 10, question" in page_of(client.get(f"/run?{RUN}&stage=01-grpo&page=2").text).text
    assert "Step 10, question" not in page_of(client.get(f"/run?{RUN}&stage=01-grpo").text).text


def test_curves_answer_points_and_what_was_no_number(make_client):
    said = make_client().get(f"/api/curves?{RUN}&stage=01-grpo&name=reward&name=kl&name=nothing&points=10").json()
    assert said["num_rows"] == 30 and said["steps"] == [1, 30] and said["share_read"] == 1.0
    assert len(said["curves"]["reward"]["points"]) == 10 and said["curves"]["kl"]["num_nonfinite"] == 1
    assert said["absent"] == ["nothing"] and {"memory_peak_mib", "tokens_per_second"} <= set(said["names"])


def test_a_torn_and_a_damaged_line_are_no_fault_of_the_page(make_client, folder):
    path = folder / "runs" / "first" / "stages" / "01-grpo" / "metrics.jsonl"
    with path.open("a") as handle:
        handle.write('{"step": 31, "rew\n{"step": 32')
    client = make_client()
    assert client.get(f"/run?{RUN}").status_code == 200
    said = client.get(f"/api/curves?{RUN}&stage=01-grpo").json()
    assert said["num_rows"] == 30 and said["problems"] == ["metrics.jsonl:31 is no logged step and is left out"]


def test_a_state_that_cannot_be_read_is_a_line_that_says_so(make_client, folder, page_of):
    (folder / "runs" / "first" / "pipeline.json").write_text('{"name": ')
    client = make_client()
    assert "unreadable" in page_of(client.get("/").text).text
    assert "could not be read" in page_of(client.get(f"/run?{RUN}").text).text


@pytest.mark.parametrize("text", ['{"name": "\\ud800", "status": "passed"}', "[" * 100_000, '{"stages": 5, "gates": 5}', '{"stages": [{"attempt": "x"}], "gates": [5]}'])  # fmt: skip
def test_a_damaged_state_hides_no_page(make_client, folder, text):
    (folder / "runs" / "first" / "pipeline.json").write_text(text)
    client = make_client()
    for path in ("/", f"/run?{RUN}", f"/data?{RUN}", f"/compare?{RUN}&run=runs/waiting"):
        answer = client.get(path)
        assert answer.status_code == 200 and "runs/first" in answer.text


def test_one_folder_that_cannot_be_read_leaves_the_others_on_the_list(make_client, folder, page_of):
    (folder / "circle").mkdir()
    (folder / "circle" / "pipeline.json").symlink_to("pipeline.json")
    odd = os.fsencode(folder) + b"/\xff"
    os.mkdir(odd)
    with open(odd + b"/pipeline.json", "w") as state:
        state.write("{}")
    text = page_of(make_client().get("/").text).text
    assert "unreadable: Too many levels" in text and "\\udcff" in text and "runs/first" in text


@pytest.mark.parametrize("name", ["a" * 300, "a/" * 3000, "circle", "circle/x"])
@pytest.mark.parametrize(
    "path", ["/run?run=", "/data?run=", "/registry?registry=", "/api/curves?run=runs/first&stage="]
)
def test_a_path_that_is_none_is_refused(make_client, folder, path, name):
    (folder / "circle").symlink_to("circle")
    (folder / "runs" / "first" / "stages" / "circle").symlink_to("circle")
    answer = make_client().get(path + name)
    assert answer.status_code == 400 and "a defect" not in answer.text


def test_a_long_word_is_read_once(make_client, folder):
    state = folder / "runs" / "first" / "pipeline.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"name": "a" * 1_000_000 + "://me:pw@host"}))
    text = make_client().get("/").text
    assert "pw@" not in text and "a" * 999_000 in text


@pytest.mark.parametrize(
    "path", ["/run?run=../outside/run", "/run?run=/etc", "/run?run=link", "/data?run=link", "/report?run=../outside/run", "/compare?run=link&run=runs/first",
             "/api/curves?run=../outside/run&stage=01-grpo", "/api/curves?run=runs/first&stage=../../../../outside/run/stages/01-grpo", "/registry?registry=../outside",
             "/version?ref=words@1&registry=/etc", "/run?run=%00"]
)  # fmt: skip
def test_no_address_leads_out_of_the_folder(make_client, folder, path):
    (folder / "link").symlink_to(folder.parent / "outside" / "run")
    answer = make_client().get(path)
    assert answer.status_code == 400 and "secret-run" not in answer.text


def test_a_link_out_of_a_run_is_not_followed(make_client, folder):
    secret = folder.parent / "outside" / "run" / "stages" / "01-grpo"
    for name in ("metrics.jsonl", "samples.jsonl"):
        (folder / "runs" / "first" / "stages" / "01-grpo" / name).unlink()
        (folder / "runs" / "first" / "stages" / "01-grpo" / name).symlink_to(secret / name)
    (folder / "runs" / "waiting" / "pipeline.json").unlink()
    (folder / "runs" / "waiting" / "pipeline.json").symlink_to(folder.parent / "outside" / "run" / "pipeline.json")
    client = make_client()
    for path in (f"/run?{RUN}", f"/api/curves?{RUN}&stage=01-grpo"):
        assert client.get(path).status_code == 400
    assert "secret-run" not in client.get("/").text


def test_no_secret_is_shown(make_client, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2-of-the-hub")
    state = folder / "runs" / "first" / "pipeline.json"
    state.write_text(
        json.dumps(json.loads(state.read_text()) | {"name": "hunter2-of-the-hub postgres://me:pw@host/db"})
    )
    client = make_client()
    for path in ("/", f"/run?{RUN}", f"/report?{RUN}"):
        text = client.get(path).text
        assert "hunter2" not in text and "pw@" not in text


def test_half_a_secret_is_not_shown_where_a_sample_is_cut(make_client, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hunter2-of-the-hub")
    sample = {"step": 1, "prompt": "", "completion": "a" * 1190 + " hunter2-of-the-hub" + "b" * 100}
    (folder / "runs" / "first" / "stages" / "01-grpo" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    text = make_client().get(f"/run?{RUN}").text
    assert "a" * 1190 in text and "hunter2" not in text


def test_a_recorded_report_is_shown_without_its_scripts(make_client, folder):
    (folder / "runs" / "first" / "report.html").write_text("<p>recorded</p><script>alert(1)</script>")
    answer = make_client().get(f"/report?{RUN}")
    assert "recorded" in answer.text
    policy = answer.headers["content-security-policy"]
    assert "sandbox" in policy and "script-src" not in policy and "default-src 'none'" in policy
    assert "The gate" in make_client().get("/report?run=runs/waiting").text


def test_a_run_that_changes_is_read_again_and_one_that_goes_is_gone(make_client, folder):
    client = make_client()
    state = folder / "runs" / "first" / "pipeline.json"
    state.write_text(state.read_text().replace('"passed"', '"running"'))
    os.utime(state, ns=(1, 1))
    assert 'data-live="3"' in client.get("/").text
    state.unlink()
    assert "runs/first" not in client.get("/").text


def test_a_long_list_comes_in_parts(make_client, folder, page_of):
    for number in range(RUNS_PER_PAGE + 5):
        run = folder / "runs" / f"many-{number:03}"
        run.mkdir()
        (run / "pipeline.json").write_text(json.dumps({"name": run.name, "status": "passed"}))
    client = make_client()
    found = [
        {one["value"] for one in page_of(client.get(f"/?q=many&page={page}").text).of("input", name="run")}
        for page in (1, 2)
    ]
    assert (len(found[0]), len(found[1])) == (RUNS_PER_PAGE, 5) and not found[0] & found[1]


def test_a_comparison_says_which_keys_differ_and_overlays_the_curves(make_client, page_of):
    page = page_of(make_client().get(f"/compare?{RUN}&run=runs/waiting").text)
    [curves] = page.of("div", **{"class": "curves"})
    assert [one["run"] for one in json.loads(curves["data-series"])] == ["runs/first", "runs/waiting"]
    assert "seed" in page.text


def test_a_registry_shows_where_a_version_comes_from(make_client, page_of):
    client = make_client()
    page = page_of(client.get("/registry").text)
    assert page.of("svg", role="group") and "words@1" in page.text
    assert "heldout" in page_of(client.get("/version?ref=words@1").text).text


def test_an_empty_folder_says_what_a_run_is(tmp_path, page_of):
    from starlette.testclient import TestClient

    from posttrain.cli.agent_folder import ServedFolder
    from posttrain.cli.pages.app import make_pages
    from posttrain.cli.pages.site import Site
    from posttrain.serve.options import ServeOptions

    site = Site(ServedFolder(tmp_path), "t", registry="registry", allow_acts=False)
    client = TestClient(
        make_pages(site, ServeOptions(token="t")), "http://localhost", headers={"authorization": "Bearer t"}
    )
    assert "No run here yet" in page_of(client.get("/").text).text
    assert "No registry" in page_of(client.get("/registry").text).text
