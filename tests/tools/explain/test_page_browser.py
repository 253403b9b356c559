"""The page in headless Chromium, opened from disk: what a reader sees and can do.

Red when: another sentence than the needle's is the darkest, or the first of what the answer's number was read from; a set or a
mass is unpacked as another one; keys do not work, text is wider than a phone, an element has no name; the page says something
to the console, asks for anything beside its file, or text of the document became markup; a large page is slow or heavy.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sglang_clusterkv.tools.explain.packed import Trace, share_of_weight, sums
from sglang_clusterkv.tools.explain.page import facts_of, write_page
from tests.support.browser import Watched, browser, require_browser
from tests.support.made_trace import ANSWER, MARKUP, NEEDLE, made_trace, needle_span, number_tokens

WIDE, PHONE = (1280, 900), (400, 800)
LARGEST_BYTES, LONGEST_S = 10_000_000, 2.0

Opened = Callable[..., Watched]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    require_browser()
    with browser() as running:
        yield running


@pytest.fixture(scope="module")
def trace() -> dict[str, Any]:
    return made_trace(compare=True)


@pytest.fixture(scope="module")
def opened(chromium: Any, trace: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Opens a trace's page; at the end of the file none of them may have said or asked for anything."""
    pages: list[tuple[Watched, Path]] = []

    def open_page(of: dict[str, Any] = trace, size: tuple[int, int] = WIDE, scheme: str = "light") -> Watched:
        file = write_page(of, tmp_path_factory.mktemp("page") / "page #1 & more.html")
        watched = Watched(chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme))
        watched.open(file)
        pages.append((watched, file))
        return watched

    yield open_page
    for watched, file in pages:
        assert watched.said == []
        assert watched.asked == [file.as_uri()]


@pytest.fixture(scope="module")
def shared(opened: Opened) -> Watched:
    return opened()


@pytest.fixture
def page(shared: Watched) -> Any:
    """A wide page as it opens: nothing chosen, everything shown, words as a whole."""
    for control, value in (("layers", "all"), ("heads", "-1"), ("cluster-layer", "0"), ("cluster-head", "0")):
        shared.page.select_option(f"#{control}", value)
    for control in ("window", "counted", "above"):
        shared.page.uncheck(f"#{control}")
    shared.page.check("#word")
    for text in ("prompt", "answer"):
        shared.page.focus(f"#{text}")
        shared.page.keyboard.press("Escape")
    settle(shared.page)
    return shared.page


def settle(page: Any) -> None:
    """Wait until nothing is drawn any more."""
    page.wait_for_function("() => document.body.dataset.drawn === String(drawing)")


def choose(page: Any, token: int, word: bool = False) -> None:
    """Choose a token of the answer, or its whole word."""
    page.set_checked("#word", word)
    page.click(f"#token-{token}")
    settle(page)


def passage(trace: dict[str, Any], token: int) -> int:
    begins = facts_of(trace)["passages"]
    return int(np.searchsorted(begins, token, "right")) - 1


def darkness(page: Any) -> list[float]:
    """Mean opacity of each passage's tokens, as painted."""
    return page.evaluate(
        """() => [...document.querySelectorAll('#prompt .passage')].map((passage) => {
            const painted = [...passage.children].map((token) => getComputedStyle(token).backgroundColor);
            const alphas = painted.map((colour) => Number(colour.match(/[\\d.]+/g)[3] ?? 1));
            return alphas.reduce((sum, alpha) => sum + alpha, 0) / alphas.length;
        })"""
    )


def test_the_needles_sentence_is_the_darkest(page: Any, trace: dict[str, Any], shared: Watched) -> None:
    shades = darkness(page)
    needle = passage(trace, needle_span(trace["pieces"]).start)
    others = [shade for at, shade in enumerate(shades) if at != needle]
    assert shades[needle] > 0.7 and max(others) < shades[needle] / 2
    assert page.inner_text(f"#prompt .passage:nth-child({needle + 1})") == NEEDLE
    shared.keep_picture("explain-whole-answer")


def test_the_answers_number_was_read_from_the_needle(page: Any, trace: dict[str, Any], shared: Watched) -> None:
    needle = passage(trace, needle_span(trace["pieces"]).start)
    for token in number_tokens(trace["pieces"], trace["request"]["prompt_tokens"]):
        choose(page, token)
        first = page.locator("#passages button").first
        assert first.get_attribute("data-passage") == str(needle) and NEEDLE.strip() in first.inner_text()
        assert page.locator("#passages button").count() == 10
        shades = darkness(page)
        assert max(range(len(shades)), key=shades.__getitem__) == needle
    shared.keep_picture("explain-number")
    first.click()
    shown = page.evaluate("document.querySelector('.passage.here').getBoundingClientRect().top")
    assert 0 <= shown <= WIDE[1]
    assert page.inner_text(".passage.here") == NEEDLE


def test_a_numbers_digits_are_looked_at_together(page: Any, trace: dict[str, Any]) -> None:
    """Whichever of them is chosen: mass and shares are means over their steps, bytes are sums."""
    checked, prompt = Trace(trace), trace["request"]["prompt_tokens"]
    digits = number_tokens(trace["pieces"], prompt)
    sparse = [step for step in trace["steps"] if step["dense"] is None]
    numbers = [at for at, step in enumerate(sparse) if step["token"] + 1 in digits]
    assert len(numbers) == len(digits) == 5
    mass = sums(checked, [checked.layer(index) for index in range(len(checked.layers))]).mass[numbers].mean(0)
    shares = np.mean([checked.masses(index)[numbers] for index in range(len(checked.layers))], axis=(0, 1, 2))
    needle = needle_span(trace["pieces"])
    for token in (digits[0], digits[-1]):
        choose(page, token, word=True)
        assert page.get_attribute("#answer", "aria-activedescendant") == f"token-{token}"
        said = page.inner_text("#chosen-title")
        assert said == f"Tokens {digits[0] - prompt + 1} to {digits[-1] - prompt + 1}: “48213”"
        first = page.locator("#passages button").first.inner_text()
        assert first.endswith(NEEDLE.strip())
        assert float(first.split(" %")[0]) == pytest.approx(100 * mass[needle.start : needle.stop].sum(), rel=0.1)
        text = page.inner_text("#shares")
        assert f"Read exactly: {100 * (shares[0] + shares[1]):.0f} %" in text
        read = sum(sparse[at]["bytes_read"] for at in numbers)
        assert f"Bytes read: {read:,} of" in text
    page.uncheck("#word")
    settle(page)
    assert page.inner_text("#chosen-title").startswith(f"Token {digits[-1] - prompt + 1}:")
    page.check("#word")
    page.click(f"#token-{prompt + 1}")  # its step was dense
    settle(page)
    assert "A dense step (short)" in page.inner_text("#shares")


def test_every_set_and_mass_is_the_traces(page: Any, trace: dict[str, Any]) -> None:
    """Layer by layer and head by head, in the page's own unpacking; and sums over heads and layers, from levels."""
    checked = Trace(trace)
    for index in range(len(checked.layers)):
        layer = checked.layer(index)
        sets = page.evaluate(
            "async (i) => { const {positions, begins, masses} = await layerSets(i);"
            "return {positions: [...positions.subarray(0, begins.at(-1))], begins: [...begins], masses: [...masses]}; }",
            index,
        )
        assert sets["positions"] == layer.positions.tolist()
        assert np.diff(sets["begins"]).tolist() == layer.counts.reshape(-1).tolist()
        true = share_of_weight(layer.weights)
        for begin, end in zip(sets["begins"], sets["begins"][1:], strict=False):
            assert sum(sets["masses"][begin:end]) == pytest.approx(true[begin:end].sum(), rel=0.05)
        for head in range(checked.heads):
            of_head = np.repeat(np.arange(layer.counts.size) % checked.heads, layer.counts.reshape(-1)) == head
            expected = np.bincount(layer.positions[of_head], minlength=checked.tokens)
            view = {"members": [index], "head": head}
            assert page.evaluate("async (view) => [...await countsOf(view)]", view) == expected.tolist()
            shares = page.evaluate("(view) => sharesOf(view, [3])", view)
            assert shares == pytest.approx(checked.masses(index)[3, head], abs=1e-4)
        clusters = page.evaluate("async (i) => [...(await layerClusters(i)).of(1)]", index)
        assert clusters == checked.clusters(index)[1].tolist()
        spreads = page.evaluate("async (i) => (await layerClusters(i)).spreads[1]", index)
        assert spreads == checked.spreads(index)[1].astype(float).tolist()


def test_all_the_layers_one_by_one_are_the_whole(page: Any, trace: dict[str, Any]) -> None:
    """What comes from levels, summed by hand, is near what was summed before it was rounded to levels."""
    checked = Trace(trace)
    members = list(range(len(checked.layers)))
    for sparse in (0, 5, checked.sparse_steps - 1):
        whole = page.evaluate("async (s) => [...await massOf({members: layers.map((_, i) => i), head: -1}, s)]", sparse)
        parts = [
            page.evaluate("async ([v, s]) => [...await massOf(v, s)]", [{"members": [i], "head": head}, sparse])
            for i in members
            for head in range(checked.heads)
        ]
        assert sum(whole) == pytest.approx(np.mean(parts, axis=0).sum(), rel=0.1)
        needle = needle_span(trace["pieces"])
        assert (np.array(whole)[needle] > 0).all()


def test_a_view_of_a_layer_and_a_head_can_be_shaded_by_its_counts(page: Any, trace: dict[str, Any]) -> None:
    checked = Trace(trace)
    layer = checked.layer(1)
    page.check("#counted")
    page.select_option("#layers", "1")
    page.select_option("#heads", "1")
    page.wait_for_timeout(50)
    settle(page)
    of_head = np.repeat(np.arange(layer.counts.size) % checked.heads, layer.counts.reshape(-1)) == 1
    expected = np.bincount(layer.positions[of_head], minlength=checked.tokens)
    assert f"the darkest {100 * expected.max() / checked.sparse_steps:.0f} %" in page.inner_text("#legend")
    shades = page.evaluate("spans.map((span) => Number(span.style.getPropertyValue('--shade')))")
    np.testing.assert_allclose(shades, 0.9 * expected / expected.max(), atol=6e-4)
    assert (page.input_value("#cluster-layer"), page.input_value("#cluster-head")) == ("1", "1")
    page.select_option("#layers", "g1")
    settle(page)


def test_keys_choose_in_both_texts(page: Any, trace: dict[str, Any]) -> None:
    prompt = trace["request"]["prompt_tokens"]
    page.focus("#answer")
    for key, at in (("ArrowRight", 0), ("ArrowRight", 1), ("End", 23), ("ArrowLeft", 22), ("ArrowUp", 12), ("Home", 0)):
        page.keyboard.press(key)
        settle(page)
        assert page.get_attribute("#answer", "aria-activedescendant") == f"token-{prompt + at}"
        assert page.inner_text("#chosen-title").startswith(f"Token {at + 1}:")
    assert "The prefill predicted it" in page.inner_text("#shares")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert "dense step (short)" in page.inner_text("#shares")
    page.keyboard.press("Escape")
    settle(page)
    assert page.inner_text("#chosen-title") == "The whole answer"
    page.focus("#prompt")
    begins = facts_of(trace)["passages"]
    for key, token in (("ArrowDown", begins[0]), ("ArrowDown", begins[1]), ("ArrowRight", begins[1] + 1)):
        page.keyboard.press(key)
        assert page.get_attribute("#prompt", "aria-activedescendant") == f"token-{token}"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "window"


def test_a_chosen_tokens_shares_and_bytes_are_the_steps(page: Any, trace: dict[str, Any]) -> None:
    checked, token = Trace(trace), number_tokens(trace["pieces"], trace["request"]["prompt_tokens"])[0]
    choose(page, token)
    sparse = [step for step in trace["steps"] if step["dense"] is None]
    number = next(at for at, step in enumerate(sparse) if step["token"] == token - 1)
    shares = np.mean([checked.masses(index)[number] for index in range(len(checked.layers))], axis=(0, 1))
    text = page.inner_text("#shares")
    assert f"recalled {100 * shares[1]:.0f} %" in text
    assert f"Read exactly: {100 * (shares[0] + shares[1]):.0f} %" in text
    assert f"{sparse[number]['bytes_read']:,} of {sparse[number]['bytes_dense']:,}" in text


def test_a_window_of_the_same_size_leaves_out_what_is_older(page: Any, trace: dict[str, Any]) -> None:
    token = number_tokens(trace["pieces"], trace["request"]["prompt_tokens"])[0]
    choose(page, token)
    page.check("#window")
    settle(page)
    step = next(step for step in trace["steps"] if step["token"] == token - 1)
    (_, sinks), (window, _) = step["base"]
    beyond = page.evaluate(
        "[...document.querySelectorAll('[role=option].beyond')].map((span) => Number(span.id.slice(6)))"
    )
    assert beyond == list(range(sinks, window - trace["server"]["clusterkv"]["budget_tokens"]))


def test_what_exceeds_the_answers_mean_can_be_had_alone(page: Any, trace: dict[str, Any]) -> None:
    checked, token = Trace(trace), number_tokens(trace["pieces"], trace["request"]["prompt_tokens"])[0]
    choose(page, token)
    page.check("#above")
    settle(page)
    mass = sums(checked, [checked.layer(index) for index in range(len(checked.layers))]).mass
    sparse = [step["token"] for step in trace["steps"] if step["dense"] is None].index(token - 1)
    begin, end = needle_span(trace["pieces"]).start, needle_span(trace["pieces"]).stop
    beyond = np.maximum(0, mass[sparse] - mass.mean(0))[begin:end].sum()
    first = page.locator("#passages button").first.inner_text()
    assert first.endswith(NEEDLE.strip()) and float(first.split(" %")[0]) == pytest.approx(100 * beyond, rel=0.1)


def test_what_quest_would_not_have_read_is_struck(opened: Opened, page: Any) -> None:
    assert not page.is_visible("#quest")
    trace = made_trace(quest=True)
    checked, token = Trace(trace), number_tokens(trace["pieces"], 600)[1]
    quest = opened(trace).page
    assert quest.inner_text("#quest-summary") == ""
    quest.check("#quest")
    choose(quest, token)
    sparse = [step["token"] for step in trace["steps"] if step["dense"] is None].index(token - 1)
    mass, missed = np.zeros(checked.tokens), np.zeros(checked.tokens)
    for index in range(len(checked.layers)):
        layer, (counts, pages) = checked.layer(index), checked.quest(index)
        share, ends = share_of_weight(layer.weights), np.cumsum(layer.counts.reshape(-1))
        for at in range(sparse * checked.heads, (sparse + 1) * checked.heads):
            recalled = slice(ends[at] - layer.counts.reshape(-1)[at], ends[at])
            read = pages[counts[:at].sum() : counts[: at + 1].sum()]
            beside = ~np.isin(layer.positions[recalled] // 16, read)
            np.add.at(mass, layer.positions[recalled], share[recalled])
            np.add.at(missed, layer.positions[recalled][beside], share[recalled][beside])
    said = float(quest.inner_text("#quest-summary").split("missed ")[1].split(" %")[0])
    assert said == pytest.approx(100 * missed.sum() / mass.sum(), rel=0.1)
    struck = quest.evaluate(
        "[...document.querySelectorAll('[role=option].unread')].map((span) => Number(span.id.slice(6)))"
    )
    share = missed / np.maximum(mass, 1e-12)  # within a factor of two on the page, where levels are rounded
    assert set(np.flatnonzero(share > 0.8)) <= set(struck) <= set(np.flatnonzero(share > 0.2))
    assert set(struck) & set(needle_span(trace["pieces"])) == set()
    quest.keyboard.press("Escape")
    settle(quest)
    assert "Quest, with pages of 16" in quest.inner_text("#quest-summary")
    quest.uncheck("#quest")
    settle(quest)
    assert quest.locator(".unread").count() == 0


def test_the_whole_answer_is_shaded_by_mass(page: Any, trace: dict[str, Any]) -> None:
    checked = Trace(trace)
    mean = sums(checked, [checked.layer(index) for index in range(len(checked.layers))]).mass.mean(0)
    needle = needle_span(trace["pieces"])
    first = page.locator("#passages button").first.inner_text()
    assert first.endswith(NEEDLE.strip())
    assert float(first.split(" %")[0]) == pytest.approx(100 * mean[needle.start : needle.stop].sum(), rel=0.1)
    assert "mean over the answer" in page.inner_text("#legend")


def test_a_prompt_tokens_cluster_is_shown_in_context(page: Any, trace: dict[str, Any]) -> None:
    checked = Trace(trace)
    page.select_option("#cluster-layer", "2")
    page.select_option("#cluster-head", "1")
    token = needle_span(trace["pieces"]).start + 3
    page.click(f"#token-{token}")
    page.wait_for_selector("#members li")
    clusters = checked.clusters(2)[1]
    members = np.flatnonzero(clusters == clusters[token]).tolist()
    marked = page.evaluate(
        "[...document.querySelectorAll('[role=option].member')].map((span) => Number(span.id.slice(6)))"
    )
    assert marked == members
    shown = page.evaluate("[...document.querySelectorAll('#members b')].map((b) => b.textContent)")
    assert shown == [trace["pieces"][member] for member in members]
    summary = page.inner_text("#cluster-summary")
    assert f"has {len(members)} token" in summary
    assert f"spread {checked.spreads(2)[1][clusters[token]]:.2f}".rstrip("0") in summary
    page.click("#token-0")
    page.wait_for_function("() => document.querySelectorAll('#members li').length === 0")
    assert "in no cluster" in page.inner_text("#cluster-summary")


def test_the_strip_has_a_column_for_each_token_and_names_dense_steps(page: Any, trace: dict[str, Any]) -> None:
    columns = page.locator("#strip [data-token]")
    assert columns.count() == trace["request"]["answer_tokens"]
    titles = page.evaluate("[...document.querySelectorAll('#strip title')].map((title) => title.textContent)")
    assert "prefill" in titles[0] and "dense: short" in titles[1] and "dense: dirty" in titles[2]
    assert "1 for “short”, 1 for “dirty”" in page.inner_text("#strip-summary")
    columns.nth(8).locator("rect").last.click()
    settle(page)
    assert page.inner_text("#chosen-title") == "Tokens 8 to 12: “48213”"
    assert page.get_attribute("#answer", "aria-activedescendant") == f"token-{trace['request']['prompt_tokens'] + 8}"
    assert page.locator("#answer .active").count() == 1


def test_where_two_answers_part_is_marked(page: Any, trace: dict[str, Any]) -> None:
    at = trace["compare"]["first_difference"]
    assert f"part at token {at + 1}, where the KL is 0.40" in page.inner_text("#compare-summary")
    marks = page.evaluate("[...document.querySelectorAll('#compare mark')].map((mark) => mark.textContent)")
    answer = trace["pieces"][trace["request"]["prompt_tokens"] :]
    assert marks == ["".join(answer[at:]), " another ending."]
    assert page.locator("#strip .parting").count() == 1


def test_text_of_the_document_is_shown_as_it_is(page: Any, trace: dict[str, Any]) -> None:
    prompt = trace["request"]["prompt_tokens"]
    assert page.evaluate("document.getElementById('prompt').textContent") == "".join(trace["pieces"][:prompt])
    assert page.evaluate("document.getElementById('answer').textContent").startswith(ANSWER)
    assert MARKUP in page.evaluate("document.getElementById('prompt').textContent")
    inside = page.evaluate("[...new Set([...document.querySelectorAll('#prompt *')].map((one) => one.localName))]")
    assert inside == ["span"]


def test_everything_that_can_be_chosen_has_a_name(page: Any) -> None:
    choose(page, int(page.locator("#answer .token").nth(8).get_attribute("id").removeprefix("token-")))
    tree = page.locator("main").aria_snapshot()
    for role in ("button", "combobox", "checkbox", "listbox", "img"):
        lines = [line.strip() for line in tree.splitlines() if line.strip().startswith(f"- {role}")]
        assert lines and all('"' in line for line in lines), (role, lines)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(opened: Opened, trace: dict[str, Any], scheme: str) -> None:
    watched = opened(size=PHONE, scheme=scheme)
    page = watched.page
    choose(page, number_tokens(trace["pieces"], trace["request"]["prompt_tokens"])[0])
    page.click(f"#token-{needle_span(trace['pieces']).start}")
    page.wait_for_selector("#members li")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    watched.keep_picture(f"explain-phone-{scheme}")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(back) > 240) == (scheme == "light") and (max(back) < 40) == (scheme == "dark")
    assert contrast(page, back) >= 4.5


def contrast(page: Any, back: list[int]) -> float:
    """Of text on the darkest shade, as WCAG measures it."""
    front, heat = page.evaluate(
        "[getComputedStyle(document.body).color.match(/\\d+/g).map(Number),"
        " getComputedStyle(document.body).getPropertyValue('--heat').trim().split(' ').map(Number)]"
    )
    painted = 0.9 * np.array(heat) + 0.1 * np.array(back)

    def luminance(colour: Any) -> float:
        share = np.array(colour) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    darker, lighter = sorted((luminance(front), luminance(painted)))
    return (lighter + 0.05) / (darker + 0.05)


def test_a_trace_without_sparse_steps_says_so(opened: Opened) -> None:
    trace = made_trace(answer_tokens=3)
    trace["server"]["recalling_layers"] = []
    for name in ("recalled", "mass", "weights", "clusters", "cluster_spread"):
        trace[name] = []
    trace["pieces"][601] = ""
    page = opened(trace).page
    assert "No step was sparse." in page.inner_text("#strip-summary")
    choose(page, 602)
    assert "dense step (dirty)" in page.inner_text("#shares")
    assert page.locator("#passages li").count() == 0
    page.focus("#answer")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.inner_text("#chosen-title") == "Token 2: “part of a character”"
    page.click("#token-30")
    assert "in no cluster" in page.inner_text("#cluster-summary")


@pytest.mark.parametrize("required", [True, False])
def test_without_a_browser_tests_are_skipped_but_not_in_ci(required: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CLUSTERKV_BROWSER_TESTS", "required" if required else "")
    outcome = pytest.fail.Exception if required else pytest.skip.Exception
    with pytest.raises(outcome, match="there is no chromium on the path: `make browser` installs Debian's"):
        require_browser()


def test_dropped_steps_are_said(opened: Opened) -> None:
    trace = made_trace()
    trace["steps"] = trace["steps"][2:]
    trace["request"]["dropped_steps"] = 2
    page = opened(trace).page
    assert "2 steps are not in the trace" in page.inner_text("#strip-summary")
    choose(page, 601)
    assert "oldest were dropped" in page.inner_text("#shares")


def test_the_picture_of_the_documents_is_made(chromium: Any, trace: dict[str, Any], tmp_path: Path) -> None:
    file, out = tmp_path / "trace.json", tmp_path / "images" / "page.png"
    file.write_text(json.dumps(trace))
    arguments = [str(file), "--answer", "9", "--layers", "2", "--prompt", "300", "--above", "--dark", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.explain_picture", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: {out.stat().st_size:,} bytes\n"
    assert out.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_large_trace_opens_fast_and_is_light(chromium: Any, tmp_path: Path) -> None:
    """8,000 tokens of prompt, 200 of answer, 30 layers that recall, 3 heads, 512 recalled each; the best of three openings."""
    trace = made_trace(8000, 200, 31, 3, 512)
    begin = time.monotonic()
    file = write_page(trace, tmp_path / "large.html")
    wrote_s, size = time.monotonic() - begin, file.stat().st_size
    opened_s, chose_s = [], []
    for _ in range(3):
        watched = Watched(chromium.new_page())
        begin = time.monotonic()
        watched.open(file)
        opened_s.append(time.monotonic() - begin)
        begin = time.monotonic()
        choose(watched.page, number_tokens(trace["pieces"], 8000)[0])
        chose_s.append(time.monotonic() - begin)
        assert NEEDLE.strip() in watched.page.locator("#passages button").first.inner_text()
        assert watched.said == []
        watched.page.close()
    print(f"{size:,} bytes, written in {wrote_s:.1f} s; opens in {min(opened_s):.2f} s, a choice {min(chose_s):.2f} s")
    assert size < LARGEST_BYTES and min(opened_s) < LONGEST_S
