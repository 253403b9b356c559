"""What the page carries is the trace's, and nobody's text becomes markup or script.

Red when: a recalled position, a count, a share or a cluster is packed as another one; a mass moves further than its level's
rounding; a passage ends elsewhere than at a sentence, a line or the prompt's end; a trace whose arrays do not have its lengths
is shown; text of a document ends an element; a file that the page is made of is not installed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tomllib
import zlib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_clusterkv.tools.explain import packed
from sglang_clusterkv.tools.explain.packed import Layer, Trace
from sglang_clusterkv.tools.explain.page import blobs_of, facts_of, page_of, passages, words, write_page
from tests.support.made_trace import MARKUP, NEEDLE, encoded, made_trace, needle_span

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())


def inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def unplaned(data: bytes, width: int) -> np.ndarray:
    columns = np.frombuffer(data, np.uint8).reshape(width, -1).astype(np.int64)
    return sum(column << (8 * byte) for byte, column in enumerate(columns))


def unpacked(texts: list[str], steps: int, heads: int) -> tuple[list[list[int]], list[list[float]]]:
    """Sets and their members' masses, read one number at a time as `pack_layer` documents them."""
    gone, came, levels = (inflated(text) for text in texts)
    numbers, value, shift = [], 0, 0
    for byte in came:
        value, shift = value | (byte & 127) << shift, shift + 7
        if byte < 128:
            numbers.append(value)
            value = shift = 0
    numbers.reverse()
    last: list[list[int]] = [[] for _ in range(heads)]
    sets, masses, gone_at, member = [], [], 0, 0
    for number in range(steps * heads):
        before = last[number % heads]
        stayed = [p for at, p in enumerate(before) if not gone[gone_at + at // 8] >> at % 8 & 1]
        gone_at += -(-len(before) // 8)
        position, new = -1, []
        for _ in range(numbers.pop()):
            position += 1 + numbers.pop()
            new.append(position)
        last[number % heads] = sorted(stayed + new)
        sets.append(last[number % heads])
        masses.append([])
        for _ in sets[-1]:
            level = levels[4 * steps * heads + member // 4] >> 2 * (member % 4) & 3
            code = levels[4 * number + level]
            masses[-1].append(2 ** ((code - 255) / 8) if code else 0.0)
            member += 1
    assert not numbers and gone_at == len(gone)
    return sets, masses


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, int]:
    tokens = draw(st.integers(1, 600))
    steps, heads = draw(st.integers(0, 4)), draw(st.integers(1, 3))
    sets = [
        sorted(draw(st.sets(st.integers(0, tokens - 1), max_size=40 if draw(st.booleans()) else 3)))
        for _ in range(steps * heads)
    ]
    size = sum(map(len, sets))
    weights = draw(st.lists(st.integers(0, 255), min_size=size, max_size=size))
    counts = np.array([len(one) for one in sets], np.int64).reshape(steps, heads)
    return Layer(counts, np.array(sum(sets, []), np.int64), np.array(weights, np.uint8)), tokens


@given(layers())
def test_sets_come_back_and_masses_within_their_level(drawn: tuple[Layer, int]) -> None:
    layer, tokens = drawn
    sets, masses = unpacked(packed.pack_layer(layer, tokens), *layer.counts.shape)
    assert [p for one in sets for p in one] == layer.positions.tolist()
    assert [len(one) for one in sets] == layer.counts.reshape(-1).tolist()
    ends = np.cumsum(layer.counts)
    for end, one in zip(ends, masses, strict=True):
        true = packed.share_of_weight(layer.weights[end - len(one) : end])
        got = np.array(one)
        np.testing.assert_allclose(got.sum(), true.sum(), rtol=0.05, atol=2e-8)  # 1 is the least code
        near = true >= true.max(initial=0) / 60  # above the lowest level, which has no lower end
        np.testing.assert_array_less(np.abs(np.log2(np.maximum(got[near], 1e-12) / np.maximum(true[near], 1e-12))), 2.1)


@given(st.lists(st.integers(0, 2**35 - 1)))
def test_varints_are_the_shortest(numbers: list[int]) -> None:
    expected = bytearray()
    for value in numbers:
        while value > 127:
            expected.append(value & 127 | 128)
            value >>= 7
        expected.append(value)
    assert packed.varints(np.array(numbers, np.int64)) == bytes(expected)


def test_sums_and_shares_are_the_traces() -> None:
    trace = made_trace()
    checked, blobs = Trace(trace), blobs_of(trace)
    steps, heads, tokens = checked.sparse_steps, checked.heads, checked.tokens
    counts = unplaned(inflated(blobs["counts"]), 4).reshape(len(checked.layers), tokens)
    mass = np.zeros((steps, tokens))
    for index in range(len(checked.layers)):
        layer, at = checked.layer(index), 0
        expected = np.zeros(tokens, int)
        for step in range(steps):
            for head in range(heads):
                for _ in range(layer.counts[step, head]):
                    expected[layer.positions[at]] += 1
                    mass[step, layer.positions[at]] += packed.share_of_weight(layer.weights[at])
                    at += 1
        assert counts[index].tolist() == expected.tolist()
    mass /= len(checked.layers) * heads
    codes = np.frombuffer(inflated(blobs["map"]), np.uint8).reshape(steps, tokens)
    assert ((codes == 0) == (mass == 0)).all()
    shown = np.where(codes == 0, 0, 2 ** ((codes.astype(float) - 255) / 4))
    np.testing.assert_allclose(shown, mass, rtol=2**0.126 - 1)
    shares = unplaned(inflated(blobs["mass"]), 2).reshape(len(checked.layers), steps, heads, 3) / 65535
    np.testing.assert_allclose(shares, [checked.masses(index) for index in range(len(checked.layers))], atol=1e-5)


def test_clusters_and_spreads_come_back() -> None:
    trace = made_trace()
    blobs, checked = blobs_of(trace), Trace(trace)
    for index in range(len(checked.layers)):
        numbers, spreads = map(inflated, blobs[f"clusters-{index}"].split("\n"))
        assert (unplaned(numbers, 4).reshape(checked.heads, -1) - 1 == checked.clusters(index)).all()
        halves = unplaned(spreads, 2).astype(np.uint16).tolist()
        for head in checked.spreads(index):
            count, halves = halves[0] + 65536 * halves[1], halves[2:]
            assert halves[:count] == head.view(np.uint16).tolist()
            halves = halves[count:]
        assert not halves


def test_passages_are_sentences_lines_and_never_both_texts() -> None:
    pieces = [
        "One",
        " is",
        " 3.",
        "14",
        " here",
        ".",
        " Two",
        " is",
        " a",
        " line",
        "\n",
        "And",
        " no",
        " end",
        " of it",
        "The",
    ]
    begins = passages(pieces, 15)
    text = ["".join(pieces[begin:end]) for begin, end in zip(begins, [*begins[1:], 16], strict=True)]
    assert text == ["One is 3.14 here.", " Two is a line\n", "And no end of it", "The"]
    lines = ["To", " be", " done", ".", "\n", "\n", "It", " was", " not", ".\n", "So", "."]
    assert passages(lines, 12) == [0, 6, 10]
    assert passages([" a"] * 130, 130) == [0, 60, 120]
    assert passages([], 0) == []


def test_words_are_those_of_the_answer_with_all_their_tokens() -> None:
    pieces = ["A", " prompt", "s", "Lim", "a", "'", "s", " is", " ", "2", "9", "7", ".", "日", "本", "", "", "é", "!"]
    begins = words(pieces, 3)
    text = ["".join(pieces[begin:end]) for begin, end in zip(begins, [*begins[1:], len(pieces)], strict=True)]
    assert text == ["Lima", "'", "s", " is", " ", "297", ".", "日", "本", "é", "!"]
    assert words([" a", *["b"] * 40], 0) == [0, 16, 32]
    assert words(["a"], 1) == [] and words([], 0) == []


def test_the_needle_is_a_passage_of_the_made_text() -> None:
    trace = made_trace()
    facts, span = facts_of(trace), needle_span(trace["pieces"])
    assert span.start in facts["passages"] and span.stop in facts["passages"]
    assert "".join(trace["pieces"][span.start : span.stop]) == NEEDLE


def test_groups_are_those_of_the_metrics_without_layers_that_do_not_recall() -> None:
    groups = facts_of(made_trace(layers=9))["groups"]
    assert [group["label"] for group in groups] == ["0-2", "3-5", "6-8"]
    assert groups[0]["members"] == [0, 1]  # layers 1 and 2 of the model


def test_a_models_folder_is_not_told() -> None:
    trace = made_trace(compare=True)
    trace["server"]["model"] = trace["compare"]["model"] = "/home/ada.l/models/SmolLM2"
    page = page_of(trace)
    assert "ada.l" not in page and "<title>What was recalled: SmolLM2</title>" in page
    trace["server"]["model"] = "org/name"
    assert "<title>What was recalled: org/name</title>" in page_of(trace)


class Elements(HTMLParser):
    """Names of a page's elements, and what its script elements have inside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inside = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = attributes, text + data


@pytest.mark.parametrize("text", [MARKUP, "<!--<script>", "]]></style>", "\u2028 \ud800 \x00", "{{ 7 * 7 }}"])
def test_text_of_a_document_stays_text(text: str) -> None:
    trace = made_trace(compare=True)
    plain = Elements(page_of(trace))
    trace["pieces"][20] = trace["pieces"][-1] = trace["compare"]["pieces"][0] = text
    trace["server"]["model"] = trace["compare"]["model"] = text.replace("\ud800", "")
    page = page_of(trace)
    found = Elements(page)
    assert [name for name in found.names if name != "script"] == [name for name in plain.names if name != "script"]
    assert [attributes for attributes, _ in found.scripts] == [attributes for attributes, _ in plain.scripts]
    (facts,) = (json.loads(inside) for attributes, inside in found.scripts if attributes.get("id") == "facts")
    assert facts["pieces"] == trace["pieces"]


def test_the_policy_allows_the_pages_own_script_and_nothing_else() -> None:
    page = page_of(made_trace())
    ((_, script),) = [entry for entry in Elements(page).scripts if not entry[0]]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'"
    assert f'content="{policy.format(digest)}"' in page
    assert "</script" not in script.lower() and "innerHTML" not in script


def drop_last(trace: dict[str, Any], name: str) -> None:
    trace[name][1] = base64.b64encode(base64.b64decode(trace[name][1])[:-2]).decode()


WRONG: dict[str, tuple[Any, str]] = {
    "version": (lambda trace: trace.update(version=2), "'clusterkv-trace', version 2 instead of"),
    "format": (lambda trace: trace.update(format="other"), "'other', version 1 instead of"),
    "pieces": (lambda trace: trace["pieces"].pop(), "623 pieces of text for 624 tokens"),
    "recalled": (
        lambda trace: drop_last(trace, "recalled"),
        "layer 2: its recalled positions are not those of 42 sets",
    ),
    "weights": (lambda trace: drop_last(trace, "weights"), "layer 2: .* weights for .* positions"),
    "mass": (lambda trace: drop_last(trace, "mass"), "layer 2: 125 numbers of mass instead of 126"),
    "clusters": (
        lambda trace: trace["clusters"].__setitem__(1, encoded([1], "<i4")),
        "layer 2: 1 numbers of clusters instead of 1200",
    ),
    "position": (
        lambda trace: trace["recalled"].__setitem__(0, encoded([1, 700] + [0] * 41, "<u2")),
        "layer 1: it recalled position 700 of 624 tokens",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_trace_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    trace = made_trace()
    spoil, message = WRONG[name]
    spoil(trace)
    with pytest.raises(ValueError, match=message):
        write_page(trace, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_positions_beyond_16_bits_are_read_as_32() -> None:
    trace = made_trace()
    trace["position_bytes"] = 4
    plain = Trace(made_trace()).layer(0)
    trace["recalled"] = [
        encoded(np.frombuffer(base64.b64decode(text), "<u2").astype("<u4"), "<u4") for text in trace["recalled"]
    ]
    assert Trace(trace).layer(0).positions.tolist() == plain.positions.tolist()


def test_a_page_is_written_without_any_sparse_step(tmp_path: Path) -> None:
    trace = made_trace(answer_tokens=3)
    assert all(step["dense"] for step in trace["steps"])
    assert write_page(trace, tmp_path / "page.html") == tmp_path / "page.html"
    trace["server"]["recalling_layers"] = []
    for name in ("recalled", "mass", "weights", "clusters", "cluster_spread"):
        trace[name] = []
    assert "What was recalled" in write_page(trace, tmp_path / "page.html").read_text()


def test_all_that_the_page_is_made_of_is_installed() -> None:
    package = ROOT / "sglang_clusterkv"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][package.name]
    others = [path.relative_to(package) for path in package.rglob("*") if path.is_file() and path.suffix != ".py"]
    data = [str(path) for path in others if path.suffix in (".js", ".css", ".jinja")]
    assert len(data) == 5
    assert [name for name in data if not any(fnmatch(name, pattern) for pattern in patterns)] == []
