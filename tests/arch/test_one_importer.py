"""`torch.distributed` is imported by the package `distributed` alone. Import contracts see other people's packages whole, not this part of torch."""

import ast
from collections.abc import Iterator
from pathlib import Path

import posttrain

SOURCE = Path(posttrain.__file__).parent


def _is_it(module: str) -> bool:
    return module == "torch.distributed" or module.startswith("torch.distributed.")


def uses(source: str) -> Iterator[int]:
    """Lines that import `torch.distributed`, or reach it through `torch`."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names) if any(_is_it(name.name) for name in names):
                yield node.lineno
            case ast.ImportFrom(module=str(module), names=names) if any(
                _is_it(module) or _is_it(f"{module}.{name.name}") for name in names
            ):
                yield node.lineno
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno
            case _:
                pass


def test_torch_distributed_has_one_importer():
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] != "distributed"
        for line in uses(path.read_text())
    ]
    assert found == []


def test_the_rule_sees_what_it_forbids():
    forbidden = [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.fsdp import fully_shard",
        "torch.distributed.barrier()",
    ]
    assert [list(uses(text)) for text in forbidden] == [[1]] * 4
    assert list(uses("import torch\nfrom torch import nn\ntorch.distributions.Normal(0, 1)\nrun.distributed")) == []
