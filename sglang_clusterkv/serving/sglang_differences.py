"""In what the installed SGLang differs from the table of symbols that the plugin relies on (`sglang_symbols`).

The plugin refuses to serve when something differs, and `sglang-clusterkv check` runs the comparison alone. Nothing of SGLang
is imported before `check()` is called.
"""

import ast
import inspect
import pkgutil
import textwrap
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from packaging.version import Version

from sglang_clusterkv.serving.sglang_symbols import SYMBOLS
from sglang_clusterkv.serving.symbol import Symbol

_SRT = "sglang.srt."


@dataclass(frozen=True)
class Difference:
    """One expectation that the installed SGLang does not meet."""

    symbol: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.symbol}: expected {self.expected}, found {self.found}"


def check(symbols: Iterable[Symbol] = SYMBOLS) -> list[Difference]:
    """Compare the installed SGLang with the table; an empty list means that nothing differs."""
    return [difference for symbol in of_release(symbols) for difference in _differences(symbol)]


def of_release(symbols: Iterable[Symbol], release: str | None = None) -> list[Symbol]:
    """Those that are expected of a release, by default of the installed one."""
    version = Version(release or metadata.version("sglang"))
    return [
        symbol
        for symbol in symbols
        if (not symbol.since or version >= Version(symbol.since))
        and (not symbol.before or version < Version(symbol.before))
    ]


def report() -> dict[str, Any]:
    """What `sglang-clusterkv check` prints, JSON-able: versions, how many symbols, and every difference."""
    differences = check()
    return {
        "ok": not differences,
        "sglang": metadata.version("sglang"),
        "symbols": len(of_release(SYMBOLS)),
        "differences": [{"symbol": d.symbol, "expected": d.expected, "found": d.found} for d in differences],
    }


def _differences(symbol: Symbol) -> list[Difference]:
    name = _SRT + symbol.path
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        return [Difference(name, "to exist", f"{type(error).__name__}: {error}")]
    differences = []
    if symbol.parameters is not None:
        expected, actual = f"({symbol.parameters})", f"({_parameters(found)})"
        if actual != expected:
            differences.append(Difference(name, expected, actual))
    missing = set(symbol.attributes.split()) - (_attributes(found) if symbol.attributes else set())
    if missing:
        differences.append(
            Difference(name, f"attributes {symbol.attributes}", f"none named {' '.join(sorted(missing))}")
        )
    source = _source(found) if symbol.mentions else ""
    differences += [
        Difference(name, f"the text {text!r} in its source", "none") for text in symbol.mentions if text not in source
    ]
    return differences


def _parameters(function: Any) -> str:
    try:
        return " ".join(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return f"no signature: {function!r}"


# Several launches in one process ask again.
@cache
def _source(found: Any) -> str:
    return inspect.getsource(found)


@cache
def _classes(file: str) -> dict[str, ast.ClassDef]:
    """The classes of a file by their qualified names. inspect would parse the file anew for each of them."""
    found: dict[str, ast.ClassDef] = {}

    def visit(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found.setdefault(outer + child.name, child)
                visit(child, f"{outer}{child.name}.")
            elif isinstance(child, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
                visit(child, outer)

    with tokenize.open(file) as text:
        visit(ast.parse(text.read()), "")
    return found


@cache
def _assigned(cls: type) -> frozenset[str]:
    file = inspect.getsourcefile(cls)
    tree: ast.AST | None = _classes(file).get(cls.__qualname__) if file else None
    tree = tree or ast.parse(textwrap.dedent(_source(cls)))  # one that a function makes
    return frozenset(
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


def _attributes(found: Any) -> set[str]:
    """Names of fields, methods and, for a class, of everything that it or a base of it assigns to self."""
    names = set(dir(found))
    for base in found.__mro__ if isinstance(found, type) else ():
        names.update(vars(base), getattr(base, "__annotations__", ()))  # dir() of an enum leaves its methods out
        if base.__module__.startswith("sglang."):
            names.update(_assigned(base))
    return names
