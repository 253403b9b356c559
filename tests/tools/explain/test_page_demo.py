"""The page of the demo model's own answer about the demo's document: of `make explain`, in Chromium.

Red when: another sentence than that with the number is the darkest, or leads the list for the answer's number, whichever of its
digits is chosen.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.servers import serve
from sglang_clusterkv.tools import cli
from sglang_clusterkv.tools.haystack import FACTS
from tests.support.browser import Watched, browser, require_browser

pytestmark = [pytest.mark.server, pytest.mark.long]

DARKNESS = """() => [...document.querySelectorAll('#prompt .passage')].map((passage) => {
    const shades = [...passage.children].map((token) => Number(token.style.getPropertyValue('--shade')));
    return [shades.reduce((sum, shade) => sum + shade, 0) / shades.length, passage.textContent.trim()];
})"""


def test_the_sentence_that_has_the_number_is_the_darkest_and_leads_its_list(model: Path, tmp_path: Path) -> None:
    require_browser()
    fact = FACTS[1]
    page_file = tmp_path / "page.html"
    with serve(model, tmp_path / "server.log", "--max-total-tokens", "8192", config={"trace": True}) as server:
        asked = ["explain", "--base-url", server.url, "--question", fact.question, "--out", str(page_file)]
        assert cli.main(asked) == 0
    with browser() as chromium:
        watched = Watched(chromium.new_page())
        watched.open(page_file)
        page = watched.page
        shade, sentence = max(page.evaluate(DARKNESS))
        assert sentence == fact.sentence and shade > 0.3
        pieces = page.evaluate("facts.pieces")
        begin = page.evaluate("promptTokens")
        digits = [at for at in range(begin, len(pieces)) if pieces[at].isdigit()]
        assert "".join(pieces[at] for at in digits) == fact.answer
        for token in digits:
            page.click(f"#token-{token}")
            page.wait_for_function("() => document.body.dataset.drawn === String(drawing)")
            assert page.inner_text("#chosen-title").endswith(f"“{fact.answer}”")
            assert page.locator("#passages button").first.inner_text().endswith(fact.sentence)
        assert watched.said == []
