"""Who comes in, and what no page of another site can do."""

import pytest

from posttrain.serve.options import ServeOptions

TOKEN = "the-token-of-the-page"


def test_the_first_address_lets_in_and_the_token_leaves_it(make_client):
    client = make_client(let_in=False)
    assert client.get("/").status_code == 401
    answer = client.get(f"/registry?token={TOKEN}", follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/registry")
    cookie = answer.headers["set-cookie"]
    assert "posttrain_ui_8200=" in cookie and "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert client.get("/registry").status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/run?run=runs/first",
        "/api/curves?run=runs/first&stage=01-grpo",
        "/static/ui.js",
        "/?token=wrong",
        "/serve/v1/models",
    ],
)
def test_nobody_reads_without_the_token(make_client, path):
    client = make_client(let_in=False)
    answer = client.get(path)
    assert answer.status_code == 401 and "first" not in answer.text
    client.cookies.set("posttrain_ui_8200", "wrong")
    assert client.get(path).status_code == 401
    assert client.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401


def test_a_bearer_token_reads_for_programs(make_client):
    client = make_client(let_in=False)
    assert client.get("/", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_a_name_of_another_site_for_this_machine_is_refused(make_client):
    client = make_client()
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "127.0.0.1.evil.example:8200"}).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "null"},
        {"origin": "", "sec-fetch-site": "same-site"},
    ],
)
def test_another_page_cannot_post(make_client, headers):
    client = make_client(allow_acts=True)
    form = {"form_token": client.site.form_token, "act": "rollback", "name": "words", "reason": "x"}
    assert client.post("/acts/show", data=form).status_code == 200
    assert client.post("/acts/show", data=form, headers=headers).status_code == 403


def test_a_form_of_fields_without_end_is_refused(make_client):
    client = make_client(allow_acts=True)
    answer = client.post("/acts/show", data={f"field{number}": "1" for number in range(2500)})
    assert answer.status_code == 413 and "2,000 fields" in answer.text


def test_a_form_without_its_token_is_refused(make_client):
    client = make_client(allow_acts=True)
    for form_token in ("", TOKEN, "x" * 64):
        answer = client.post(
            "/acts/do", data={"form_token": form_token, "act": "rollback", "name": "words", "reason": "x"}
        )
        assert answer.status_code == 403 and client.site.acts.entries() == []


def test_every_answer_says_that_nothing_else_may_run_or_frame_it(make_client):
    client = make_client()
    for path in ("/", "/run?run=runs/first", "/nowhere", "/run?run=../outside/run", "/static/ui.js", "/?token=wrong"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "same-origin"


def test_a_body_that_is_too_large_is_refused_by_the_servers_guard(make_client):
    client = make_client(max_body_bytes=1000)
    assert client.post("/configure", data={"form_token": "x" * 2000}).status_code == 413


def test_a_page_for_other_machines_needs_a_token_of_the_users(tmp_path, capsys, monkeypatch):
    from posttrain.cli.app import main

    monkeypatch.delenv("POSTTRAIN_SERVE_TOKEN", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["ui", str(tmp_path), "--host", "0.0.0.0"])
    assert caught.value.code == 64 and "reachable from other machines" in capsys.readouterr().err


def test_a_token_file_is_the_way_in_on_other_machines_under_their_names(make_client):
    client = make_client(host="0.0.0.0", let_in=False)
    assert client.get(f"/?token={TOKEN}", headers={"host": "box.lan:8200"}, follow_redirects=False).status_code == 303
    assert ServeOptions(host="0.0.0.0").is_local is False
