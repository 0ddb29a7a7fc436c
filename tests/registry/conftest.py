from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from posttrain.evidence import GateVerdict, TestResult, Verdict
from posttrain.files import digest_bytes, digest_tree
from posttrain.registry import Manifest, Registry

BASE = digest_bytes(b"base weights")


@pytest.fixture
def base() -> str:
    return BASE


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    book = Registry(tmp_path / "registry")
    yield book
    book.close()


@pytest.fixture
def model(tmp_path) -> Callable[[str], Path]:
    """A model folder whose weights are the given text."""

    def write(weights: str) -> Path:
        folder = tmp_path / f"model-{weights}"
        (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text(weights * 1000)
        (folder / "tokenizer" / "vocab.json").write_text('{"a": 0}')
        return folder

    return write


def lineage(folder: Path, stages: tuple[str, ...] = ("sft",), **inputs: str) -> list[Manifest]:
    """A chain from BASE over `stages` to the model in `folder`."""
    chain: list[Manifest] = []
    for place, stage in enumerate(stages):
        start = chain[-1].outputs["model"] if chain else BASE
        made = digest_tree(folder) if place == len(stages) - 1 else digest_bytes(f"{folder}{place}".encode())
        extra = {**inputs, "data": digest_bytes(stage.encode())}
        parent = chain[-1].digest if chain else None
        chain.append(Manifest(stage, {"model": start, **extra}, {"model": made}, parent, {"learning_rate": 1e-3}))
    return chain


@pytest.fixture(name="lineage")
def lineage_fixture() -> Callable[..., list[Manifest]]:
    return lineage


def passing(candidate: str, baseline: str, verdict: Verdict = Verdict.PASS) -> GateVerdict:
    test = TestResult(
        "primary", "heldout", "exact", 1000, 1000, 0.4, 0.5, 0.1, 0.07, 0.13, 0.075, 0.05, 0.001, verdict, "as measured",
        (150, 50),
    )  # fmt: skip
    return GateVerdict(verdict, "as measured", candidate, baseline, digest_bytes(b"spec"), 0.05, (test,))


@pytest.fixture(name="passing")
def passing_fixture() -> Callable[..., GateVerdict]:
    return passing
