"""Instructions that a kernel executes, from its machine code and its source.

    python -m benchmarks.instructions    # counts the pieces of a step's launches, for sm_90, into kernels/instruction_counts.py

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.compiled import collect
from benchmarks.machine_code import listing_of

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "sglang_clusterkv" / "kernels" / "instruction_counts.py"
TARGET = 90

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


class Piece(NamedTuple):
    """A part of a kernel that runs as often as a step's lists say: what it executes beyond `without`.

    Attributes:
        case: name of the compile case that it is counted in.
        runs: how often loops and branches run; loops that are not named do not.
        without: likewise, of what is not part of it; None: nothing.
    """

    case: str
    runs: Mapping[str, float]
    without: Mapping[str, float] | None = None


def _added(case: str, base: Mapping[str, float], **more: float) -> Piece:
    """What the loops `more` add to `base`, once each."""
    loops = {_LOOPS[name]: times for name, times in more.items()}
    return Piece(case, {**base, **loops}, base)


_LOOPS = {
    "requests": "for range(0, batch, BLOCK)",
    "tiles": "while at < tiles",
    "segments": "while s <= last_segment",
    "token_tiles": "for range(part, ",
    "lses": "for range(0, tiles, AT_ONCE)",
    "masses": "for range(begin, end, BLOCK)",
    "firsts": "for range(0, clusters, BLOCK) @ count = _list_firsts(",
    "halvings": "while (high - low > 1) & (from_low - above > 1) @ low, high, room, between = bracket(",
    "own_list": "for range(0, clusters, BLOCK) @ low, high, last = list_most(",
    "short_list": "for range(0, clusters, BLOCK) @ list_most(",
    "base_rows": "for range(begin_tile, ",
    "recalled_rows": "for range(tl.maximum(begin_tile, base_tiles), ",
    "own_tiles": "for range(begin, end, BLOCK) @ own_part(",
    "rest_tiles": "for range(begin, end, BLOCK)",
    "rest_segments": "for range(tl.load(segment_of_page",
}
_SCORE, _MERGE = "score int4 D=128 G=4", "merge D=128"
_JOINED = "attend and estimate int4 D=128 G=4 C=4,096"
_SHORT_CHOICE = "refine recall K=2048 O=512 R=512 C=131,072"
_CLUSTERS = {"if part < base_programs": 0, _LOOPS["requests"]: 1}
_TOKENS = {"else part < base_programs": 0, "if ROTATE and part < 0": 0}
_ROTATION = {"else part < base_programs": 0, "if part >= 0": 0, "for range(0, CHANNELS, BLOCK)": 4}
_HELD = {"if clusters == 0": 0, "if clusters <= FEW": 0, "if clusters <= SOME": 1, "else clusters <= SOME": 0}
_MANY_HELD = {
    "if clusters == 0": 0, "if clusters <= FEW": 0, "if clusters <= SOME": 0, "if clusters <= MANY": 1,
    "else clusters <= MANY": 0, "else LARGE": 0,
}  # fmt: skip
_NO_CODES = {"if CODES": 0}
_FEW_HELD = {"if clusters == 0": 0, "if clusters <= FEW": 1, "else clusters <= FEW": 0}
_NO_TIES = {"if between > room": 0}
_CHOICE, _SHORTLIST = {"if shortens": 0, "if between > 1": 0}, {"else shortens": 0} | _NO_TIES
_MASSES = {"if clusters == 0": 0}
_ATTENDED = {"if part < parts": 0}
_OWN = {"else part < parts": 0, "else part < own_parts": 0}
_REST = {"else part < parts": 0, "if part < own_parts": 0}

PIECES = {
    "score, a program of clusters": Piece(_SCORE, _CLUSTERS),
    "score, a tile of clusters": _added(_SCORE, _CLUSTERS, tiles=1),
    "score, a segment of a tile": Piece(
        _SCORE, _CLUSTERS | {_LOOPS["tiles"]: 1, _LOOPS["segments"]: 1}, _CLUSTERS | {_LOOPS["tiles"]: 1}
    ),
    "score, a program of tokens": Piece(_SCORE, _TOKENS),
    "score, a tile of tokens": _added(_SCORE, _TOKENS, token_tiles=1),
    "score, a rotation": Piece(_SCORE, _ROTATION),
    **{
        f"{name}{text}": piece
        for text, masses, case, held in (
            ("", "select masses C=4096 G=4", "select C=4096 K=2048 short", _HELD),
            (", large", "select masses C=131072 G=4", "select C=131072 K=2048 short", _MANY_HELD),
        )
        for name, piece in {
            "masses, a program": Piece(masses, _MASSES),
            "masses, tiles of log-sum-exps": _added(masses, _MASSES, lses=1),
            "masses, a block": _added(masses, _MASSES, masses=1),
            "select, a program": Piece(case, held | _CHOICE),
            "select, a halving": _added(case, held | _CHOICE, halvings=1),
            "select, a block of the list": _added(case, held | _CHOICE, firsts=1),
            "shortlist, a program": Piece(case, held | _SHORTLIST),
            "shortlist, a halving": _added(case, held | _SHORTLIST, halvings=1),
            "shortlist, a block": _added(case, held | _SHORTLIST, short_list=1),
        }.items()
    },
    **{
        name: piece
        for tile in (64, 256)
        for name, piece in {
            f"values, {tile}": Piece(f"refine values 2 bits D=128 G=4 x{tile}", _NO_CODES),
            f"values, {tile}, codes": Piece(f"refine values 2 bits D=128 G=4 x{tile}", {}, _NO_CODES),
        }.items()
    },
    **{
        f"{name}{text}": piece
        for text, case, held in (
            (", few", "refine recall K=2048 O=512 R=512 C=1,024", _FEW_HELD | _NO_TIES),
            ("", "refine recall K=2048 O=512 R=512 C=1,024", _HELD | _NO_TIES),
            (", large", "refine recall K=2048 O=4,096 R=512 C=131,072", _MANY_HELD | _NO_TIES),
        )
        for name, piece in {
            "choice, a program": Piece(case, held | _NO_CODES),
            "choice, a halving of each": _added(case, held, halvings=1),
            "choice, a block of the list": _added(case, held, own_list=1),
            "choice, codes": Piece(case, held | {"for range(GROUP)": 4}, held | _NO_CODES),
        }.items()
    },
    "choice, a program, short": Piece(_SHORT_CHOICE, _NO_TIES | _NO_CODES),
    "choice, a halving of each, short": _added(_SHORT_CHOICE, _NO_TIES, halvings=1),
    "choice, codes, short": Piece(_SHORT_CHOICE, _NO_TIES | {"for range(GROUP)": 4}, _NO_TIES | _NO_CODES),
    "attend and estimate, a program of tokens": Piece(_JOINED, _ATTENDED),
    "attend and estimate, a tile of the base": _added(_JOINED, _ATTENDED, base_rows=1),
    "attend and estimate, a tile of recalled tokens": _added(_JOINED, _ATTENDED, recalled_rows=1),
    "attend and estimate, a program of own values": Piece(_JOINED, _OWN),
    "attend and estimate, a tile of own values": _added(_JOINED, _OWN, own_tiles=1),
    "attend and estimate, a program of the rest": Piece(_JOINED, _REST),
    "attend and estimate, a tile of the rest": _added(_JOINED, _REST, rest_tiles=1, rest_segments=1),
    "merge, a program": Piece(_MERGE, {"for range(0, parts, ": 1}),  # all parts at once
}


def counted_pieces(sass_of: Callable[[str], str]) -> dict[str, int]:
    """Instructions of a warp, of each of PIECES; sass_of: the listing of a compile case by its name."""
    counted = {case: terms(sass_of(case)) for case in dict.fromkeys(piece.case for piece in PIECES.values())}
    result = {}
    for name, piece in PIECES.items():
        whole = executed(counted[piece.case], piece.runs, 0.0)
        result[name] = round(
            whole - (executed(counted[piece.case], piece.without, 0.0) if piece.without is not None else 0.0)
        )
    return result


def kept_text(counted: Mapping[str, int]) -> str:
    """The module that keeps them."""
    lines = "".join(f'    "{name}": {count},\n' for name, count in counted.items())
    return (
        '"""Instructions of one warp of the pieces of a step\'s kernels: head_dim 128, 4 query heads to a kv head, sm_90.\n\n'
        'Made by `python -m benchmarks.instructions`.\n"""\n\n'
        f"PIECES = {{\n{lines}}}\n"
    )


def main() -> None:
    """Count them, and keep them where the step model reads them."""
    cases = collect(())
    counted = counted_pieces(lambda name: listing_of(cases[name], TARGET))
    KEPT.write_text(kept_text(counted))
    for name, count in counted.items():
        print(f"{name:36} {count:>6,}")


if __name__ == "__main__":
    main()
