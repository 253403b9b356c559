"""The configuration is read, checked and documented in one place, and every mistake is one sentence with its fix.

Red when a default changes unnoticed, a mistake passes or ends in another exception, or docs/configuration.md is stale.
"""

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from sglang_clusterkv.config import (
    FIELD_DOCS,
    LIMITS,
    MAX_PAGE_SIZE,
    ClusterKVConfig,
    ConfigError,
    configuration_markdown,
    fit_defaults,
    load_config,
    parse_config,
    validate,
)

# Short for what the limit's row says.
REASONS = {
    "PLACE": "segment_tokens",
    "ALL": "sink_tokens",
    "PASSES": "kmeans_passes",
    "NORMAL": "choice_spread",
    "CLUSTERS": "host_ratio",
}
DOCS = Path(__file__).parent.parent / "docs" / "configuration.md"


def test_the_defaults_are_those_of_the_design():
    assert msgspec.to_builtins(ClusterKVConfig()) == {
        "budget_tokens": 512,
        "candidate_tokens": 2048,
        "refine": True,
        "code_bits": 2,
        "sink_tokens": 16,
        "window_tokens": 64,
        "segment_tokens": 1024,
        "tokens_per_cluster": 8,
        "kmeans_passes": 3,
        "outlier_share": 0.0625,
        "choice_spread": 0.75,
        "estimate": True,
        "estimate_codes": True,
        "estimate_spread": 0.25,
        "estimate_clusters": 512,
        "moving_values": "auto",
        "centroid_dtype": "int4",
        "dense_layers": 0,
        "dense_below_tokens": 0,
        "dense_below": "auto",
        "recall_extend_tokens": 0,
        "recluster_every": 256,
        "merge_segments": True,
        "reproducible": False,
        "host_ratio": 1.0,
        "host_kv_dtype": "auto",
        "attend_engine": "auto",
        "prefill_backend": "auto",
        "trace": False,
        "trace_tokens": 256,
    }


def test_json_text_and_a_file_give_the_same(tmp_path):
    text = '{"budget_tokens": 256, "centroid_dtype": "int8", "choice_spread": 1}'
    path = tmp_path / "clusterkv.json"
    path.write_text(text)
    expected = ClusterKVConfig(budget_tokens=256, centroid_dtype="int8", choice_spread=1.0)
    assert parse_config(text) == parse_config(f" {text}\n") == parse_config(str(path)) == expected


def test_the_flag_stands_before_the_environment_before_the_defaults():
    env = {"SGLANG_CLUSTERKV_CONFIG": '{"budget_tokens": 100}'}
    assert load_config('{"budget_tokens": 200}', env).budget_tokens == 200
    assert load_config(None, env).budget_tokens == load_config("", env).budget_tokens == 100
    assert load_config(None, {}) == load_config(None, {"SGLANG_CLUSTERKV_CONFIG": ""}) == ClusterKVConfig()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"budget_token": 3}', "unknown key 'budget_token': did you mean budget_tokens?"),
        ('{"budget_tokens": "3"}', 'budget_tokens="3" is not allowed: use an integer'),
        ('{"budget_tokens": true}', "budget_tokens=true is not allowed: use an integer"),
        ('{"refine": 1}', "refine=1 is not allowed: use true or false"),
        ('{"code_bits": 3}', "code_bits=3 is not allowed: use 1 or 2"),
        ('{"centroid_dtype": "fp8"}', 'centroid_dtype="fp8" is not allowed: use "int4", "int8" or "bf16"'),
        ('{"host_kv_dtype": "int4"}', 'host_kv_dtype="int4" is not allowed: use "auto" or "int8"'),
        ('{"host_ratio": "4"}', 'host_ratio="4" is not allowed: use a number'),
        ('{"choice_spread": null}', "choice_spread=null is not allowed: use a number"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_fix(text, sentence):
    with pytest.raises(ConfigError) as error:
        parse_config(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"budget_tokens": 64, "refine": true, "budget_tokens": 64}', "budget_tokens"),
        ('{"refine": true, "kmeans_passes": 111111111111111111, "refine": false}', "refine"),
    ],
)
def test_a_key_given_twice_is_refused(text, key, tmp_path):
    """Red when the last value counts without a word."""
    path = tmp_path / "clusterkv.json"
    path.write_text(text)
    for given in (text, str(path)):
        with pytest.raises(ConfigError) as error:
            parse_config(given)
        assert str(error.value) == f"key {key!r} is given twice: leave one of them"


UNREADABLE = ["{", '{"budget_tokens": }', "no-such-file.json", "[1]", "", '{"zzz": 1}']
UNREADABLE += ['{"budget_tokens": NaN}', '{"choice_spread": 1e400}', '{"budget_tokens": ' + "[" * 10**5 + "}"]


@pytest.mark.parametrize("text", UNREADABLE)
def test_unreadable_configurations_are_one_line(text):
    with pytest.raises(ConfigError) as error:
        parse_config(text)
    assert "\n" not in str(error.value) and ": " in str(error.value)


def test_a_file_without_an_object_is_refused(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[1, 2]")
    with pytest.raises(ConfigError, match="a list where an object is expected"):
        parse_config(str(path))


def test_an_error_names_where_the_configuration_came_from():
    with pytest.raises(ConfigError, match="^--clusterkv-config: unknown key"):
        load_config('{"zzz": 1}', {})
    with pytest.raises(ConfigError, match="^SGLANG_CLUSTERKV_CONFIG: unknown key"):
        load_config(None, {"SGLANG_CLUSTERKV_CONFIG": '{"zzz": 1}'})


@pytest.mark.parametrize(
    ("changes", "page_size", "sentence"),
    [
        ({"tokens_per_cluster": 12}, 16, "page_size=16 is not a multiple of tokens_per_cluster=12: use 4, 8 or 16"),
        ({"sink_tokens": 8}, 16, "sink_tokens=8 is not a multiple of page_size=16: use 16"),
        ({"sink_tokens": 0}, 16, "sink_tokens=0 is less than 1 page of 16 tokens: use 16"),
        ({"window_tokens": 16}, 16, "window_tokens=16 is less than 2 pages of 16 tokens: use 32"),
        ({"window_tokens": 70}, 16, "window_tokens=70 is not a multiple of page_size=16: use 80"),
        ({"segment_tokens": 1000}, 16, "segment_tokens=1000 is not a multiple of page_size=16: use 1008"),
        ({"segment_tokens": 32768}, 16, "segment_tokens=32768 is more than 32752 (PLACE): use 32752 or less"),
        ({"recluster_every": 32}, 16, "recluster_every=32 is less than 4 pages of 16 tokens: use 64"),
        ({"recluster_every": 2048}, 16, "recluster_every=2048 is more than segment_tokens=1024: use 1024 or less"),
        ({"segment_tokens": 2**31}, 16, "segment_tokens=2147483648 is more than 32752 (PLACE): use 32752 or less"),
        ({"budget_tokens": 0}, 16, "budget_tokens=0 is less than 1: use 1 or more"),
        ({"dense_layers": -1}, 16, "dense_layers=-1 is less than 0: use 0 or more"),
        ({"estimate_spread": float("nan")}, 16, "estimate_spread=nan is not a number: use 0 or more"),
        ({"window_tokens": 2**31}, 16, "window_tokens=2147483648 is more than 65536 (ALL): use 65536 or less"),
        ({"sink_tokens": 70000}, 16, "sink_tokens=70000 is more than 65536 (ALL): use 65536 or less"),
        ({"kmeans_passes": 10**9}, 16, "kmeans_passes=1000000000 is more than 64 (PASSES): use 64 or less"),
        ({"choice_spread": 1e30}, 16, "choice_spread=1e+30 is more than 8 (NORMAL): use 8 or less"),
        (
            {"candidate_tokens": 256},
            16,
            "candidate_tokens=256 is less than budget_tokens=512: raise candidate_tokens or set refine to false",
        ),
        ({"host_ratio": 0.5}, 16, "host_ratio=0.5 is less than 1: use 1 or more"),
        ({"host_ratio": 100.0}, 16, "host_ratio=100.0 is more than 64 (CLUSTERS): use 64 or less"),
        (
            {"host_ratio": 4.0, "dense_layers": 1},
            16,
            "host_ratio=4 and dense_layers=1 would read all that is in host memory in every step: "
            "set dense_layers to 0 or host_ratio to 1",
        ),
        ({}, 1, "page_size=1 is too small: use --page-size 16"),
    ],
)
def test_values_that_do_not_go_together_are_named_with_their_fix(changes, page_size, sentence):
    for word, name in REASONS.items():
        sentence = sentence.replace(word, LIMITS[name].why)
    with pytest.raises(ConfigError) as error:
        validate(ClusterKVConfig(**changes), page_size)
    assert str(error.value) == sentence


NUMBERS = {name for name, kind in ClusterKVConfig.__annotations__.items() if kind in (int, float, "int", "float")}


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_number_of_any_size_is_served_or_refused_with_one_that_is_served(name):
    """Whatever the value, doing what the sentence says is enough."""
    for value in (-(10**30), -1, 0, 3, 10**5, 2**31 - 1, 2**31, 10**30, float("inf"), float("nan")):
        if name not in ("outlier_share", "choice_spread", "estimate_spread", "host_ratio"):
            value = int(value) if value == value and abs(value) != float("inf") else 2**63
        config = ClusterKVConfig(**{name: value}, refine=False)
        for page_size in (16, 4096):
            fitted = fit_defaults(config, page_size)
            try:
                validate(fitted, page_size)
            except ConfigError as error:
                advice = {}
                for key, fix in re.findall(r"(\w+)=\S+ is [^:]*: use ([\d.]+)", str(error)):
                    key = key if key != "page_size" else "tokens_per_cluster"
                    advice[key] = type(getattr(config, key))(float(fix))
                assert name in advice, error
                validate(msgspec.structs.replace(fitted, **advice), page_size)


@pytest.mark.parametrize("page_size", [8192, 10**4, 65536, 2**31])
@pytest.mark.parametrize("per_cluster", [8, 3, 1, 10**6])
def test_pages_too_large_for_a_segment_are_refused_in_one_sentence(page_size, per_cluster):
    config = ClusterKVConfig(tokens_per_cluster=per_cluster)
    with pytest.raises(ConfigError) as error:
        validate(fit_defaults(config, page_size), page_size)
    of_page = [part for part in str(error.value).split("; ") if "page" in part.split(" is ")[0]]
    assert len(of_page) == 1 and "segment_tokens" not in str(error.value)
    for fix in re.search(r"use --page-size (\d+), .* up to (\d+)", of_page[0]).groups():
        served = int(fix)
        assert served <= MAX_PAGE_SIZE
        if per_cluster <= MAX_PAGE_SIZE:
            validate(fit_defaults(config, served), served)


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError) as error:
        validate(ClusterKVConfig(sink_tokens=8, window_tokens=16), 16, head_dim=72)
    assert str(error.value).count("; ") == 2 and "head_dim=72" in str(error.value)


def test_candidates_may_be_fewer_than_the_budget_without_refining():
    validate(ClusterKVConfig(candidate_tokens=256, refine=False), 16, head_dim=64)


@pytest.mark.parametrize("page_size", [8, 16, 32, 64, 128, 256, 512])
def test_the_defaults_fit_every_page_size(page_size):
    validate(fit_defaults(ClusterKVConfig(), page_size), page_size, head_dim=128)
    assert fit_defaults(ClusterKVConfig(), 16) == ClusterKVConfig()


def test_fitting_leaves_alone_what_the_user_set():
    fitted = fit_defaults(ClusterKVConfig(sink_tokens=32), 64)
    assert (fitted.sink_tokens, fitted.window_tokens) == (32, 128)
    with pytest.raises(ConfigError, match="sink_tokens=32 is not a multiple of page_size=64: use 64"):
        validate(fitted, 64)


def test_every_field_is_documented_and_the_document_is_up_to_date():
    assert list(FIELD_DOCS) == list(ClusterKVConfig.__struct_fields__)
    assert DOCS.read_text() == configuration_markdown(), "run python -m sglang_clusterkv.config > docs/configuration.md"


def test_the_module_needs_neither_torch_nor_sglang():
    code = "import sys, sglang_clusterkv.config; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
