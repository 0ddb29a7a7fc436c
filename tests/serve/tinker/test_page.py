"""The script of docs/tinker.md trains, samples and saves as the page says, against the command that it names."""

import re
from pathlib import Path

import pytest

from posttrain.objectives.tinker import TINKER_LOSSES

PAGE = Path(__file__).parents[3] / "docs" / "tinker.md"


def test_the_script_of_the_page_learns_its_answers(running, bases, tmp_path, monkeypatch, capsys):
    [script] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    with running(bases, tmp_path) as serving:
        monkeypatch.setenv("TINKER_BASE_URL", serving.address)
        monkeypatch.setenv("TINKER_API_KEY", "tml-local")
        exec(compile(script, "docs/tinker.md", "exec"), {})
        *losses, answer, path = capsys.readouterr().out.splitlines()
        assert len(losses) == 20
        assert float(losses[-1].split()[1]) < float(losses[0].split()[1]) / 4
        assert answer.startswith(" The answer is")
        folder = serving.service.shelf.resolve(path)[2]
        assert {"model", "adapter", "adapter_total", "result.json"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("name", TINKER_LOSSES)
def test_the_page_names_every_loss(name):
    assert f"`{name}`" in PAGE.read_text(encoding="utf-8")
