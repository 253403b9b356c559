"""Instructions that the pieces of a step's launches execute, from machine code (`executed.py`).

`python -m benchmarks.instructions` counts them for sm_90, into kernels/instruction_counts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from benchmarks.compiled import MODEL_TARGET, collect
from benchmarks.executed import ROOT, executed, terms
from benchmarks.machine_code import listing_of

KEPT = ROOT / "sglang_clusterkv" / "kernels" / "instruction_counts.py"


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
    "runs": "for range(0, number, RUNS)",
    "codes": "for range(0, tl.max(behind - at, 0), TOGETHER)",
    "base_rows": "for range(begin_tile, ",
    "recalled_rows": "for range(tl.maximum(begin_tile, base_tiles), ",
    "own_tiles": "for range(begin, end, BLOCK) @ own_part(",
    "rest_tiles": "for range(begin, end, BLOCK)",
    "rest_segments": "for range(begin_segment, ",
    "moving_segments": "for range(first, last + 1, TOGETHER)",
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
_CODES_ALONE = {"if tl.program_id(2) == 0": 0}
_FEW_HELD = {"if clusters == 0": 0, "if clusters <= FEW": 1, "else clusters <= FEW": 0}
_NO_TIES = {"if between > room": 0}
_CHOICE, _SHORTLIST = {"if shortens": 0, "if between > 1": 0}, {"else shortens": 0} | _NO_TIES
_MASSES = {"if clusters == 0": 0}
_ATTENDED = {"if part < parts": 0}
_OWN = {"else part < parts": 0, "else part < own_parts": 0}
_REST = {"else part < parts": 0, "if part < own_parts": 0}


def _codes(case: str, held: Mapping[str, float]) -> dict[str, Piece]:
    """What a choice executes for codes, and what a program does that is there for them alone."""
    block, alone = {**held, _LOOPS["runs"]: 1.0}, {**held, **_CODES_ALONE}
    return {
        "choice, codes": Piece(case, held, {**held, **_NO_CODES}),
        "choice, a block of codes": _added(case, held, runs=1),
        "choice, eight codes of a block": Piece(case, {**block, _LOOPS["codes"]: 1.0}, block),
        "choice, a program of codes": Piece(case, alone),
        "choice, a halving for codes": _added(case, alone, halvings=1),
    }


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
            **_codes(case, held),
        }.items()
    },
    "choice, a program, short": Piece(_SHORT_CHOICE, _NO_TIES | _NO_CODES),
    "choice, a halving of each, short": _added(_SHORT_CHOICE, _NO_TIES, halvings=1),
    **{f"{name}, short": piece for name, piece in _codes(_SHORT_CHOICE, _NO_TIES).items()},
    **{
        f"attend and estimate, {name}{text}": piece
        for text, case, moving in (("", _JOINED, {}), (", moving", f"{_JOINED} moving", {"moving_segments": 1}))
        for name, piece in {
            "a program of tokens": Piece(case, _ATTENDED),
            "a tile of the base": _added(case, _ATTENDED, base_rows=1),
            "a tile of recalled tokens": _added(case, _ATTENDED, recalled_rows=1),
            "a program of own values": Piece(case, _OWN),
            "a tile of own values": _added(case, _OWN, own_tiles=1),
            "a program of the rest": Piece(case, _REST),
            "a tile of the rest": _added(case, _REST, rest_tiles=1, rest_segments=1, **moving),
        }.items()
    },
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
    counted = counted_pieces(lambda name: listing_of(cases[name], MODEL_TARGET))
    KEPT.write_text(kept_text(counted))
    for name, count in counted.items():
        print(f"{name:36} {count:>6,}")


if __name__ == "__main__":
    main()
