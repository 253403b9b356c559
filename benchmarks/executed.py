"""Instructions of a kernel's machine code, by the loops and branches of its source that they lie in.

The disassembler says of each instruction which source line it is from, through all functions that were inlined. Which loops and
branches of the source enclose a line, the source says. So the instructions of a kernel are a sum of terms, each a number of
instructions and the loops that it lies in (`terms`); how often those run, and which branches are taken, depends on a shape
(`executed`). What the compiler moved out of a loop counts once: of the source's loops an instruction lies in as many, from
the outermost on, as there are loops in the machine code around it.
"""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]

_FRAME = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
_STATIC = ("tl.static_range", "static_range")

Frames = tuple[tuple[str, int], ...]  # (file, line), the innermost first


class _Enclosing(ast.NodeVisitor):
    """Of each line of a file: the loops and branches around it, the outermost first."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines()
        self.around: dict[int, tuple[str, ...]] = {}
        self._stack: list[str] = []
        self.visit(ast.parse(source))

    def _body(self, nodes: list[ast.stmt], what: str | None) -> None:
        if what is not None:
            self._stack.append(what)
        for node in nodes:
            self.visit(node)
        if what is not None:
            self._stack.pop()

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                self.around[line] = tuple(self._stack)
        super().generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._body(node.body, None)

    def _head(self, node: ast.stmt, first: ast.AST, extra: str | None) -> None:
        """The lines of a statement's head; those of a loop's condition run as often as it."""
        around = (*self._stack, extra) if extra else tuple(self._stack)
        for line in range(node.lineno, (getattr(first, "end_lineno", None) or node.lineno) + 1):
            self.around[line] = around

    def visit_For(self, node: ast.For) -> None:
        text = ast.unparse(node.iter)
        loop = None if text.startswith(_STATIC) else f"for {text}"
        self._head(node, node.iter, loop)
        self._body(node.body, loop)

    def visit_While(self, node: ast.While) -> None:
        loop = f"while {ast.unparse(node.test)}"
        self._head(node, node.test, loop)
        self._body(node.body, loop)

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        self._head(node, node.test, None)
        self._body(node.body, f"if {test}")
        self._body(node.orelse, f"else {test}")


@functools.cache
def _enclosing(path: str) -> _Enclosing:
    return _Enclosing(Path(path).read_text())


def _path_of(frames: Frames) -> tuple[str, ...]:
    """Loops and branches around an instruction, the outermost first, each with the line of the call that it was reached by."""
    path: list[str] = []
    for place in reversed(range(len(frames))):
        file, line = frames[place]
        if not file.startswith(str(ROOT)):
            continue
        known = _enclosing(file)
        caller = frames[place + 1] if place + 1 < len(frames) else None
        within = ""
        if caller is not None and caller[0].startswith(str(ROOT)):
            calls = _enclosing(caller[0]).lines[caller[1] - 1 : caller[1]]  # none where the compiler made up a line
            within = "".join(f" @ {call.strip()}" for call in calls)
        path += [what + within for what in known.around.get(line, ())]
    return tuple(path)


def terms(sass: str) -> dict[tuple[str, ...], int]:
    """What encloses them -> how many instructions, of a listing by `nvdisasm -gi`.

    What encloses an instruction: "for HEAD", "while HEAD", "if TEST" and "else TEST" as the source has them, the outermost
    first, each followed by " @ " and the line of the call where it is in a function that was inlined.
    """
    labels: dict[str, int] = {}
    found: list[tuple[str, Frames]] = []
    frames: list[tuple[str, int]] = []
    fresh = True
    for text in sass.splitlines():
        line = text.strip()
        if match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _FRAME.search(line):
            if fresh:
                frames = []
            frames.append((match[1], int(match[2])))
            fresh = False
        elif match := _INSTRUCTION.search(line):
            found.append((match[1], tuple(frames)))
            fresh = True
    loops = []
    for place, (instruction, _) in enumerate(found):
        match = _TARGET.search(instruction)
        if match and match[1] in labels and labels[match[1]] <= place and labels[match[1]] != place:
            loops.append((labels[match[1]], place))
    inner = {begin: max(end for first, end in loops if first == begin) for begin, _ in loops}  # one loop for each head
    counted: Counter[tuple[str, ...]] = Counter()
    for place, (instruction, stack) in enumerate(found):
        if instruction.startswith("NOP"):
            continue
        depth = sum(begin <= place <= end for begin, end in inner.items())
        path = []
        for what in _path_of(stack):
            if what.startswith(("for ", "while ")):
                depth -= 1
                if depth < 0:
                    continue
            path.append(what)
        counted[tuple(path)] += 1
    return dict(counted)


def executed(counted: Mapping[tuple[str, ...], int], runs: Mapping[str, float], unnamed: float | None = None) -> float:
    """Instructions that a warp executes.

    Args:
        counted: as `terms` gives it.
        runs: a loop or branch, or its beginning -> how often it runs. The longest that fits is taken. Branches run once unless
            they are named here.
        unnamed: how often a loop runs that is not named; None: that is an error.
    """
    total = 0.0
    for path, count in counted.items():
        times = 1.0
        for what in path:
            fitting = [name for name in runs if what.startswith(name)]
            if fitting:
                times *= runs[max(fitting, key=len)]
            elif what.startswith(("for ", "while ")):
                if unnamed is None:
                    raise KeyError(f"how often does it run: {what}")
                times *= unnamed
        total += count * times
    return total


# How often loops run, for one number of a kernel as a whole: about as in a step over 32k tokens. Others run UNNAMED times.
USUAL_RUNS = {
    "while (high - low > 1) & (from_low - above > 1)": 13,  # halvings
    "for range(0, batch, BLOCK)": 1,
    "while at < tiles": 2,
    "while s <= last_segment": 2,
    "for range(0, number, RUNS)": 1,
    "for range(0, tl.max(behind - at, 0), TOGETHER)": 3,
}
UNNAMED = 4


def usually_executed(sass: str) -> int:
    """Instructions that a warp executes, loops as often as USUAL_RUNS says, all branches: a number to compare with itself."""
    return round(executed(terms(sass), USUAL_RUNS, UNNAMED))
