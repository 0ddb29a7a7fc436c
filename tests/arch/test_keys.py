"""A key has one default, in the schema: nothing reads it with a second one."""

import ast
from collections.abc import Iterator
from pathlib import Path

import posttrain

SOURCE = Path(posttrain.__file__).parent
HOLDERS = frozenset({"keys", "spec", "stage", "suite", "gate", "row"})
"""Names under which configuration travels; `self` is one of them inside a group of keys."""


def silent_defaults(source: str, *, of_keys: bool = False) -> Iterator[int]:
    """Lines with `getattr(keys, name, default)`, or with `hasattr(keys, name)`, which is the same in two steps."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            asked = node.args[0]
            name = asked.id if isinstance(asked, ast.Name) else asked.attr if isinstance(asked, ast.Attribute) else ""
            holds_keys = name in HOLDERS or name.endswith("_keys") or (of_keys and name == "self")
            silent = len(node.args) == 3 if node.func.id == "getattr" else node.func.id == "hasattr" and name != "row"
            if holds_keys and silent:
                yield node.lineno


def test_no_key_is_read_with_a_default_of_its_own():
    allowed = {"objectives/terms.py"}  # where a spec is made: a missing key is refused there, by name
    found = [
        f"{path.relative_to(SOURCE)}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).as_posix() not in allowed
        for line in silent_defaults(path.read_text(), of_keys="config" in path.parts)
    ]
    assert found == []


def test_the_rule_sees_what_it_forbids():
    forbidden = ["getattr(keys, 'beta', 0.0)", "getattr(self.keys, name, None)", "hasattr(stage.keys, 'beta')"]
    assert [list(silent_defaults(text)) for text in forbidden] == [[1]] * 3
    assert (
        list(silent_defaults("getattr(keys, name)\ngetattr(tokenizer, 'chat_template', None)\nhasattr(x, 'y')")) == []
    )
    assert list(silent_defaults("getattr(self, 'beta', 0.0)", of_keys=True)) == [1]
