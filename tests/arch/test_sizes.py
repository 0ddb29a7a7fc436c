"""A file is read in one sitting and a function on one screen."""

import ast
from collections.abc import Iterator
from pathlib import Path

import posttrain

SOURCE = Path(posttrain.__file__).parent
FILE_P90, FILE_MAX = 300, 450
FUNCTION_P99, FUNCTION_MAX = 40, 80


def function_lines(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of each function, from its first decorator to its last line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, (node.end_lineno or first) - first + 1


def quantile(sizes: dict[str, int], share: float) -> int:
    """The smallest size that at least this share does not exceed."""
    ordered = sorted(sizes.values())
    return next(size for rank, size in enumerate(ordered, 1) if rank >= share * len(ordered))


def above(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Those that are larger than the limit."""
    return {name: size for name, size in sizes.items() if size > limit}


def _sources() -> dict[str, str]:
    return {path.relative_to(SOURCE).as_posix(): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}


def test_a_file_is_read_in_one_sitting():
    sizes = {name: len(text.splitlines()) for name, text in _sources().items()}
    assert above(sizes, FILE_MAX) == {}
    assert quantile(sizes, 0.90) <= FILE_P90


def test_a_function_fits_on_a_screen():
    sizes = {
        f"{place}:{name}:{number}": lines
        for place, text in _sources().items()
        for number, (name, lines) in enumerate(function_lines(text))
    }
    assert above(sizes, FUNCTION_MAX) == {}
    assert quantile(sizes, 0.99) <= FUNCTION_P99, above(sizes, FUNCTION_P99)


def test_the_rule_sees_what_it_forbids():
    long = "@cached\ndef long():\n" + "    x = 1\n" * 79
    assert dict(function_lines(f"{long}class A:\n    async def short(self): ...\n")) == {"long": 81, "short": 1}
    assert above({"a": 80, "b": 81}, FUNCTION_MAX) == {"b": 81}
    assert quantile({str(size): size for size in range(1, 101)}, 0.90) == 90
