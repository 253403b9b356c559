"""One HTML file that shows what a request recalled, from its trace.

It needs no network and no server: text, styles, script and the trace's arrays (packed.py) are in it. The document and the
answer are somebody's text. They reach the page as JSON in which no character can end an element, and the script puts them
in as text, never as markup; the page's policy allows this one script, by its digest, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from sglang_clusterkv.memory.recalled_mass import layer_groups
from sglang_clusterkv.tools.explain.packed import (
    MAP_PER_OCTAVE,
    Trace,
    pack_layer,
    pack_quest,
    planes,
    sums,
    text_of,
    weight_of_share,
)

SCRIPTS = ("page_data.js", "page_text.js", "page.js")
LONGEST_PASSAGE, SHORTEST_PASSAGE = 60, 4
LONGEST_WORD = 16  # tokens; a script without spaces has no words here
SENTENCE_ENDS, WIDE_SENTENCE_ENDS = (".", "!", "?", ":", ";"), ("。", "！", "？")


def write_page(trace: dict[str, Any], out: Path) -> Path:
    """Write the page.

    Args:
        trace: of one request, with `pieces` (docs/explain.md).
        out: the file; one that is there is replaced.

    Returns:
        `out`.

    Raises:
        ValueError: the trace is of another version, or its arrays do not have the lengths that they must have.
    """
    out.write_text(page_of(trace), encoding="utf-8")
    return out


def page_of(trace: dict[str, Any]) -> str:
    """The page's HTML; arguments and errors are those of `write_page`."""
    environment = Environment(
        loader=PackageLoader("sglang_clusterkv.tools.explain", ""), autoescape=True, undefined=StrictUndefined
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    folder = Path(__file__).parent
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        model=model_name(trace["server"]["model"]),
        facts=facts_of(trace),
        blobs=blobs_of(trace),
        script=script,
        digest=digest,
        style=(folder / "page.css").read_text(encoding="utf-8"),
    )


def facts_of(trace: dict[str, Any]) -> dict[str, Any]:
    """What the script needs beside the arrays."""
    checked = Trace(trace)
    server, layers, compare = trace["server"], checked.layers, trace.get("compare")
    groups = [
        {"label": label, "members": [layers.index(layer) for layer in range(part.start, part.stop) if layer in layers]}
        for label, part in layer_groups(server["layers"]).items()
    ]
    return {
        "server": server | {"model": model_name(server["model"])},
        "request": trace["request"],
        "pieces": trace["pieces"],
        "passages": passages(trace["pieces"], checked.prompt_tokens),
        "words": words(trace["pieces"], checked.prompt_tokens),
        "groups": [group for group in groups if group["members"]],
        "steps": trace["steps"],
        "sparse_steps": checked.sparse_steps,
        "quest": checked.has_quest and bool(layers),
        "compare": compare and compare | {"model": model_name(compare["model"])},
    }


def model_name(model: str) -> str:
    """A model's name without the folder that it lies in: a page may be handed on."""
    return Path(model).name if Path(model).is_absolute() else model


def passages(pieces: list[str], prompt_tokens: int) -> list[int]:
    """Where a text's passages begin, as token numbers: about a sentence or a line each, and none across prompt and answer."""
    begins = [0] if pieces else []
    for token in range(1, len(pieces)):
        before, after, length = pieces[token - 1], pieces[token], token - begins[-1]
        line = "\n" in before
        sentence = before.rstrip().endswith(SENTENCE_ENDS) and (after[:1].isspace() or before[-1:].isspace())
        wide = before.endswith(WIDE_SENTENCE_ENDS)
        ends = length >= SHORTEST_PASSAGE and (line or sentence or wide) and not after.isspace()
        ends = ends or length >= LONGEST_PASSAGE
        if ends or token == prompt_tokens:
            begins.append(token)
    return begins


def words(pieces: list[str], prompt_tokens: int) -> list[int]:
    """Where the answer's words begin, as token numbers: runs of letters and digits, such as a number of several tokens.

    Ideographs stand alone. A character of several tokens, of which the last has the text, is not parted.
    """
    begins: list[int] = []
    for token in range(prompt_tokens, len(pieces)):
        before, piece = pieces[token - 1] if begins else " ", pieces[token]
        goes_on = not before or _in_word(before[-1]) and _in_word(piece[:1])
        if not goes_on or token - begins[-1] >= LONGEST_WORD:
            begins.append(token)
    return begins


def _in_word(character: str) -> bool:
    """Whether words go on behind it."""
    return character.isalnum() and unicodedata.east_asian_width(character) not in "WF"


def blobs_of(trace: dict[str, Any]) -> dict[str, str]:
    """The arrays by their elements' ids. Numbers are planes of bytes (`packed.planes`).

    - counts: 4 bytes [recalling layers, tokens].
    - map: [sparse steps, tokens] each token's share of the step's mass over all layers and heads, on a log scale: 255 is 1,
      each step down a factor of 2^(1/4), 0 is nothing.
    - mass: 2 bytes [recalling layers, sparse steps, heads, 3], in units of 1 / 65535.
    - recalled-I: the three texts of `packed.pack_layer` for the I-th recalling layer, one a line.
    - quest-I, where the trace has it: `packed.pack_quest` for the I-th recalling layer.
    - clusters-I: two texts: 4 bytes [heads, prompt tokens], the cluster's number and 1, 0 for none; then 2 bytes, for each
      head the float16 of each cluster's spread, after two 2-byte halves (low, high) of how many there are.
    """
    checked = Trace(trace)
    layers = [checked.layer(index) for index in range(len(checked.layers))]
    masses = np.array([checked.masses(index) for index in range(len(layers))], np.float64)
    blobs = {"mass": text_of(planes(np.rint(np.clip(masses, 0, 1) * 65535).astype(np.int64), 2))}
    if layers:
        total = sums(checked, layers)
        blobs["counts"] = text_of(planes(total.counts, 4))
        blobs["map"] = text_of(weight_of_share(total.mass, MAP_PER_OCTAVE).tobytes())
    for index, layer in enumerate(layers):
        blobs[f"recalled-{index}"] = "\n".join(pack_layer(layer, checked.tokens))
        if checked.has_quest:
            blobs[f"quest-{index}"] = pack_quest(*checked.quest(index))
        spreads = checked.spreads(index)
        numbers = [[len(head) & 65535, len(head) >> 16, *head.view(np.uint16).tolist()] for head in spreads]
        flat = np.array(sum(numbers, []), np.int64)
        blobs[f"clusters-{index}"] = f"{text_of(planes(checked.clusters(index) + 1, 4))}\n{text_of(planes(flat, 2))}"
    return blobs
