"""Four long chats at once, of which the device tier has room for a sixth, are answered as with everything on the device.

The demo model over real text. Red when: a page is read from the wrong tier or place, or a chat's pages are lost between turns.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.quality.documents import read_text
from benchmarks.servers import Server, serve
from sglang_clusterkv.tools.demo_model import default_out

pytestmark = [pytest.mark.server, pytest.mark.long]

CHATS, TURNS, DOCUMENT, ANSWER = 4, 3, 7000, 24
RATIO, DEVICE = 10, 4096
ARGUMENTS = ["--max-total-tokens", str(RATIO * DEVICE), "--chunked-prefill-size", "512"]
ARGUMENTS += ["--max-running-requests", str(CHATS), "--random-seed", "1"]
CONFIG = {"budget_tokens": 512}
QUESTIONS = ("\n\nIn short, this text says that", "\n\nThe most important name in it is", "\n\nWhat follows from it is")


def chats(server: Server) -> list[list[list[int]]]:
    """The answers of all chats, by chat and turn; each turn sees what came before it."""
    tokenizer = AutoTokenizer.from_pretrained(default_out())
    text = tokenizer(read_text()[1])["input_ids"]

    def chat(number: int) -> list[list[int]]:
        ids, answers = text[number * DOCUMENT : (number + 1) * DOCUMENT], []
        assert len(ids) == DOCUMENT
        for question in QUESTIONS[:TURNS]:
            ids = ids + tokenizer(question)["input_ids"]
            answers.append(server.generate(ids, ANSWER)["output_ids"])
            ids = ids + answers[-1]
        return answers

    with ThreadPoolExecutor(CHATS) as pool:
        return list(pool.map(chat, range(CHATS)))


def test_long_chats_at_once_say_the_same(tmp_path: Path) -> None:
    model = default_out()
    with serve(model, tmp_path / "device.log", *ARGUMENTS, config=CONFIG) as server:
        expected = chats(server)
    with serve(model, tmp_path / "tier.log", *ARGUMENTS, config=CONFIG | {"host_ratio": RATIO}) as server:
        said = chats(server)
        info = server.counts()["host_tier"]
    assert said == expected
    assert info["device_pages"] * 16 == DEVICE and info["pages_on_host_only"] * 16 > 2 * CHATS * DOCUMENT / 3
    assert info["recalled_rows_host"] > info["recalled_rows_device"] / 4, "the tier was hardly needed"
