"""Where vLLM is not there, or cannot work."""

import pytest

from posttrain.errors import MissingExtraError
from posttrain.rollout.vllm import options
from posttrain.rollout.vllm.options import require_vllm, torchvision_misfit


def test_without_vllm_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"rollout.engine: vllm needs vLLM; pip install 'posttrain\[vllm\]'"):
        require_vllm()


@pytest.mark.parametrize(
    ("torch", "vision", "fits"),
    [
        ("2.13.0+cpu", "0.28.0", False),
        ("2.13.0+cpu", "0.28.0+cu130", False),
        ("2.13.0+cpu", "0.28.0+cpu", True),
        ("2.13.0+cpu", None, True),
        ("2.13.0", "0.28.0", True),
        ("2.13.0+cu130", "0.28.0", True),
    ],
)
def test_a_torchvision_of_another_build_is_named_in_one_line(torch, vision, fits, monkeypatch):
    monkeypatch.setattr(options, "installed_version", {"torch": torch, "torchvision": vision}.get)
    line = torchvision_misfit()
    assert (line == "") == fits
    assert "\n" not in line
