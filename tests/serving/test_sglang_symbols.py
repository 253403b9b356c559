"""The installed SGLang has every symbol that the plugin relies on, with the signature it was written against.

Red when SGLang changed one of them, when the comparison stops noticing a change, or a new row leaves out the older release.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_clusterkv.serving import sglang_differences
from sglang_clusterkv.serving.sglang_symbols import SYMBOLS
from sglang_clusterkv.serving.symbol import Symbol


def _first(symbol: Symbol) -> sglang_differences.Difference:
    differences = sglang_differences.check([symbol])
    assert len(differences) == 1
    return differences[0]


def test_the_installed_sglang_is_as_expected():
    report = sglang_differences.report()
    assert report["differences"] == []
    assert report["ok"] and report["symbols"] == len(sglang_differences.of_release(SYMBOLS)) > 60


@pytest.mark.long
def test_the_older_release_that_is_served_is_as_expected(tmp_path):
    """As `make check SGLANG=0.5.22`; pip fetches its wheel."""
    install = ["pip", "install", "--quiet", "--no-compile", "--no-deps", "--target", str(tmp_path), "sglang==0.5.22"]
    subprocess.run([sys.executable, "-m", *install], check=True)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "sglang_clusterkv.tools.cli", "check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "SGLang 0.5.22" in done.stdout, done.stdout + done.stderr


def test_a_changed_signature_is_reported_by_name(monkeypatch):
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    monkeypatch.setattr(UnifiedRadixCache, "insert", lambda self, key: None)
    differences = sglang_differences.check()
    assert [str(difference) for difference in differences] == [
        "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.insert: expected (self params), found (self key)"
    ]
    assert not sglang_differences.report()["ok"]


@pytest.mark.parametrize(
    ("symbol", "expected", "found"),
    [
        (Symbol("server_args.ServerArgs.no_such_method", "", "self"), "to exist", "no_such_method"),
        (Symbol("no_such_module.thing", "", "self"), "to exist", "no_such_module"),
        (Symbol("mem_cache.base_prefix_cache.InsertResult", "", attributes="prefix_len gone"), "attributes", "gone"),
        (Symbol("mem_cache.memory_pool.ReqToTokenPool", "", mentions=("gone()",)), "the text 'gone()'", "none"),
    ],
)
def test_what_is_missing_is_reported(symbol, expected, found):
    difference = _first(symbol)
    assert difference.symbol == f"sglang.srt.{symbol.path}"
    assert expected in difference.expected and found in difference.found


def test_each_release_is_asked_what_it_has():
    new, old = Symbol("a", "", since="0.5.23"), Symbol("a", "", before="0.5.23")
    always = Symbol("b", "")
    assert sglang_differences.of_release([new, old, always], "0.5.22.post1") == [old, always]
    assert sglang_differences.of_release([new, old, always], "0.5.23") == [new, always]


def test_each_symbol_has_an_expectation_and_a_reason():
    for symbol in SYMBOLS:
        assert symbol.why and (symbol.parameters is not None or symbol.attributes or symbol.mentions), symbol
    assert len({(symbol.path, symbol.why) for symbol in SYMBOLS}) == len(SYMBOLS)
