"""Acts from a page: the command line is shown, then that one runs, as it would in a terminal."""

import time

import pytest

from posttrain.registry import Registry


def post(client, where, **fields):
    return client.post(where, data={"form_token": client.site.form_token, **fields})


def ended(client, number=0):
    """The act of that place, when it has ended."""
    for _ in range(600):
        entry = client.site.acts.entries()[number]
        if entry.act.code is not None:
            return entry.act
        time.sleep(0.1)
    raise AssertionError("the act has not ended")


def test_an_act_is_shown_then_run_and_its_end_is_on_the_page(make_client, page_of, folder):
    client = make_client(allow_acts=True)
    shown = page_of(
        post(client, "/acts/show", act="promote", ref="words@1", alias="champion", registry="registry").text
    )
    assert "posttrain registry promote --alias=champion --registry=registry -- words@1" in shown.text
    assert client.site.acts.entries() == [] and not Registry(folder / "registry").find("words@1").aliases
    answer = client.post("/acts/do", data=shown.form("/acts/do"), follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/acts")
    assert ended(client).code == 0
    assert list(Registry(folder / "registry").find("words@1").aliases) == ["champion"]
    text = page_of(client.get("/acts").text).text
    assert "registry promote" in text and "done, or PASS" in text


def test_a_refused_act_shows_the_line_of_the_terminal(make_client, page_of):
    client = make_client(allow_acts=True)
    shown = page_of(post(client, "/acts/show", act="rollback", name="words", reason="<wrong>", alias="champion").text)
    client.post("/acts/do", data=shown.form("/acts/do"))
    act = ended(client)
    assert act.is_refused and act.output.startswith("error: ")
    assert "what the user must fix" in page_of(client.get("/acts").text).text


def test_a_decision_is_one_of_the_terminal(make_client, page_of):
    client = make_client(allow_acts=True)
    fields = {"act": "gate_decide", "run": "runs/waiting", "decision": "accept", "reason": "it reads well", "by": "me"}
    shown = page_of(post(client, "/acts/show", **fields).text)
    assert "posttrain gate decide --accept --by=me '--reason=it reads well' -- runs/waiting" in shown.text
    client.post("/acts/do", data=shown.form("/acts/do"))
    assert ended(client).code == 0
    assert (
        "ACCEPTED" in client.get("/run?run=runs/waiting").text
        or "approved by me" in client.get("/run?run=runs/waiting").text
    )


def test_without_allow_acts_a_command_is_shown_and_none_runs(make_client, page_of):
    client = make_client(allow_acts=False)
    fields = {"act": "promote", "ref": "words@1", "alias": "champion", "registry": "registry"}
    shown = page_of(post(client, "/acts/show", **fields).text)
    assert "registry promote" in shown.text and not shown.form("/acts/do")
    answer = post(
        client,
        "/acts/do",
        **fields,
        command="posttrain registry promote --alias=champion --registry=registry -- words@1",
    )
    assert answer.status_code == 403 and "--allow-acts" in answer.text and client.site.acts.entries() == []
    for path in ("/registry", "/version?ref=words@1", "/run?run=runs/waiting", "/start"):
        assert '<form method="post"' not in client.get(path).text


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"act": "run", "config": "../outside/run/config.yaml"}, "leads out of the folder"),
        ({"act": "run", "config": "/etc/passwd"}, "leads out of the folder"),
        ({"act": "run", "config": "link.yaml"}, "leads out of the folder"),
        ({"act": "run", "config": "ok.yaml", "overrides": "output_dir=/tmp/x"}, "leads out of the folder"),
        ({"act": "gate_decide", "run": "../outside/run", "decision": "accept", "reason": "x", "by": "me"}, "leads out"),
        ({"act": "promote", "ref": "words@1", "registry": "/etc"}, "leads out of the folder"),
        ({"act": "gate_decide", "run": "runs/waiting", "decision": "maybe", "reason": "x", "by": "me"}, "decision"),
        ({"act": "gate_decide", "run": "runs/waiting", "decision": "accept", "reason": "", "by": ""}, "reason"),
        ({"act": "delete"}, "got no act"),
        ({"act": "run", "config": "ok.yaml", "wait_s": "-1"}, "wait_s"),
    ],
)  # fmt: skip
def test_what_a_form_may_not_ask_for_is_refused(make_client, page_of, folder, fields, said):
    (folder / "ok.yaml").write_text("base_model: nowhere\nstages: []\n")
    (folder / "link.yaml").symlink_to(folder.parent / "outside" / "run" / "config.yaml")
    client = make_client(allow_acts=True)
    for where in ("/acts/show", "/acts/do"):
        answer = post(client, where, **fields)
        assert answer.status_code == 400 and said in page_of(answer.text).text
    assert client.site.acts.entries() == []


def test_only_the_command_that_was_shown_runs(make_client, page_of, folder):
    (folder / "job.yaml").write_text("base_model: nowhere\nstages: []\n")
    client = make_client(allow_acts=True)
    shown = page_of(post(client, "/acts/show", act="run", config="job.yaml", on_change="refuse").text).form("/acts/do")
    (folder / "job.yaml").write_text("base_model: nowhere\nloss_type: ipo\nbeta: 0.1\ndatasets: [{path: x}]\n")
    answer = client.post("/acts/do", data=shown)
    assert answer.status_code == 400 and "not the command that was shown" in page_of(answer.text).text


def test_a_command_that_cannot_be_started_has_ended(make_client, page_of, folder):
    client = make_client(allow_acts=True)
    fields = {
        "act": "rollback",
        "name": "words",
        "reason": "a" * 200_000,
        "alias": "champion",
    }  # more than a word may hold
    for number in range(2):
        client.post("/acts/do", data=page_of(post(client, "/acts/show", **fields).text).form("/acts/do"))
        assert len(client.site.acts.entries()) == number + 1
        assert ended(client).is_refused and "cannot be started" in ended(client).output
    assert "what the user must fix" in page_of(client.get("/acts").text).text


def test_a_command_whose_output_has_no_place_has_ended(make_client, page_of, tmp_path, monkeypatch):
    client = make_client(allow_acts=True)
    fields = {"act": "rollback", "name": "words", "reason": "x", "alias": "champion"}
    shown = page_of(post(client, "/acts/show", **fields).text).form("/acts/do")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    client.post("/acts/do", data=shown)
    assert ended(client).is_refused and "cannot be started" in ended(client).output


def test_no_letter_turns_the_command_that_is_shown_around(make_client, page_of):
    client = make_client(allow_acts=True)
    fields = {"act": "rollback", "name": "words", "reason": "\u202eon\u2066 \u05d0", "alias": "champion"}
    text = page_of(post(client, "/acts/show", **fields).text).text
    assert "--reason=\\u202eon\\u2066 \u05d0" in text and "\u202e" not in text


def test_words_that_look_like_options_stay_words(make_client, page_of):
    client = make_client(allow_acts=True)
    shown = page_of(post(client, "/acts/show", act="promote", ref="--registry=/etc", registry="registry").text)
    assert "-- --registry=/etc" in shown.text
