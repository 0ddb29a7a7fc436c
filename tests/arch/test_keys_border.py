"""Keys cross one package border, not two: a package that is given them hands on values, or a spec of its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import posttrain

SOURCE = Path(posttrain.__file__).parent
OWNERS = frozenset({"config", "recipes", "synthesis", "cli", "pipeline", "api"})
"""Packages that may hand keys to any other: where they are made, and where the parts are put together."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _words(annotation: ast.expr | None) -> Iterator[str]:
    """Names in an annotation, quoted ones too."""
    return iter(re.findall(r"\w+", ast.unparse(annotation)) if annotation else ())


def _is_keys(name: str) -> bool:
    return name == "keys" or name.endswith("_keys")


def imported_from(tree: ast.Module) -> dict[str, str]:
    """Package (or top module) of ours that each imported name comes from."""
    packages = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "posttrain":
            parts = (node.module or "").split(".")
            packages |= {name.asname or name.name: [*parts, name.name][1] for name in node.names}
    return packages


def _arguments(function: Function) -> list[ast.arg]:
    return [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]


def _holds(value: ast.expr, held: set[str]) -> bool:
    """Whether the expression is a keys object, and not a value read from one."""
    match value:
        case ast.Name(id=name):
            return name in held or _is_keys(name)
        case ast.Attribute(attr=name):
            return _is_keys(name)
        case ast.Starred(value=inner):
            return _holds(inner, held)
        case _:
            return False


def _root(called: ast.expr) -> str:
    while isinstance(called, ast.Attribute):
        called = called.value
    return called.id if isinstance(called, ast.Name) else ""


def hand_overs(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Lines in which a function hands keys to another package than its own and config, with that package's name."""
    tree = ast.parse(source)
    packages = imported_from(tree)
    for function in ast.walk(tree):
        if not isinstance(function, Function):
            continue
        arguments = _arguments(function)
        held = {a.arg for a in arguments if any(word.endswith("Keys") for word in _words(a.annotation))}
        # A method of a parameter belongs to the package that the parameter's type comes from.
        of_types = {a.arg: packages[word] for a in arguments for word in _words(a.annotation) if word in packages}
        for call in ast.walk(function):
            if isinstance(call, ast.Call):
                given = [*call.args, *(keyword.value for keyword in call.keywords)]
                called = call.args[0] if _root(call.func) == "partial" and call.args else call.func
                to = (packages | of_types).get(_root(called), package)
                if to not in {package, "config"} and any(_holds(value, held) for value in given):
                    yield call.lineno, to


def test_a_package_that_is_given_keys_does_not_hand_them_on():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE)
        package = place.parts[0].removesuffix(".py")
        if package not in OWNERS:
            found += [f"{place}:{line} hands keys to {to}" for line, to in hand_overs(path.read_text(), package)]
    assert found == []


HEAD = """from functools import partial
from posttrain.config.model import ModelKeys
from posttrain.models.load import load_policy
from posttrain.models.policy import Policy
from posttrain.models import export
from posttrain.data.render import Renderer
"""


def test_the_rule_sees_what_it_forbids():
    forbidden = [
        "def f(keys: ModelKeys): load_policy(keys)",
        "def f(model: 'ModelKeys | None'): load_policy(config=model)",
        "def f(keys: ModelKeys): export.save_policy(1, keys)",
        "def f(keys: ModelKeys, policy: Policy): policy.grow(keys)",
        "def f(keys: ModelKeys): return partial(load_policy, keys)",
        "class A:\n    def f(self): load_policy(self.keys)",
    ]
    assert [[to for _, to in hand_overs(HEAD + text, "rollout")] for text in forbidden] == [["models"]] * 6


def test_the_rule_lets_pass_what_it_allows():
    allowed = [
        "def f(keys: ModelKeys): load_policy(keys.base_model, keys.lora.r)",
        "def f(keys: ModelKeys): own(keys)",
        "def f(keys: ModelKeys): ModelKeys.of(keys)",
        "def f(model: str): load_policy(model)",
        "def f(keys: ModelKeys): load_policy(len(keys.datasets))",
    ]
    assert [list(hand_overs(HEAD + text, "rollout")) for text in allowed] == [[]] * 5
    assert list(hand_overs(HEAD + "def f(keys: ModelKeys): load_policy(keys)", "models")) == []
