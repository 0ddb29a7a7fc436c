"""`posttrain ui` as a command: the address that it prints lets in, and a signal ends it."""

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from http.cookiejar import CookieJar
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "uvicorn", "httpx", "llguidance", "prometheus_client")),
    reason="the pages need posttrain[ui]",
)
START = "from posttrain.cli.app import main; main()"


def test_the_printed_address_lets_in_without_acts_and_a_signal_ends_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", START, "ui", str(tmp_path), "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        lines = [process.stderr.readline() for _ in range(2)]
        assert lines[0].strip().endswith("read-only")
        address = re.search(r"open (http://127\.0\.0\.1:\d+/\?token=[\w-]{40,})\n", lines[1])[1]
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        assert "No run here yet" in browser.open(address, timeout=30).read().decode()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(address.partition("?")[0], timeout=30)
        assert caught.value.code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.wait()


def test_a_registry_outside_of_the_folder_is_refused(tmp_path, capsys):
    from posttrain.cli.app import main

    (tmp_path / "served").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["ui", str(tmp_path / "served"), "--registry", "../registry"])
    assert caught.value.code == 64 and "leads out of the folder" in capsys.readouterr().err
