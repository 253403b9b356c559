"""The configuration of ClusterKV: one frozen record, its defaults, its documentation and its checks.

Imports neither torch nor sglang, so that a mistake is reported before anything heavy is loaded.
`python -m sglang_clusterkv.config` prints docs/configuration.md.
"""

import difflib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

FLAG = "--clusterkv-config"
ENVIRONMENT = "SGLANG_CLUSTERKV_CONFIG"
CHECK = "CLUSTERKV_CHECK"
EXAMPLE = '{"budget_tokens": 1024}'
# Offsets of a segment's tokens are stored as int16.
MAX_SEGMENT_TOKENS = 32767
# A segment's three vectors lie in quarters on its first four pages.
MIN_SEGMENT_PAGES = 4
MAX_PAGE_SIZE = MAX_SEGMENT_TOKENS // MIN_SEGMENT_PAGES

# What a decode step reads and nothing that is stored depends on: may change between two steps.
STEP_OPTIONS = (
    "budget_tokens",
    "candidate_tokens",
    "refine",
    "choice_spread",
    "estimate",
    "estimate_codes",
    "estimate_spread",
    "estimate_clusters",
    "moving_values",
    "dense_layers",
    "dense_below_tokens",
    "dense_below",
    "recall_extend_tokens",
)


class ConfigError(ValueError):
    """The user's configuration cannot be served; the message is one sentence with the fix."""


class ClusterKVConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the user may set; FIELD_DOCS says what each field means and its unit."""

    budget_tokens: int = 512
    candidate_tokens: int = 2048
    refine: bool = True
    code_bits: Literal[1, 2] = 2
    sink_tokens: int = 16
    window_tokens: int = 64
    segment_tokens: int = 1024
    tokens_per_cluster: int = 8
    kmeans_passes: int = 3
    outlier_share: float = 0.0625
    choice_spread: float = 0.75
    estimate: bool = True
    estimate_codes: bool = True
    estimate_spread: float = 0.25
    estimate_clusters: int = 512
    moving_values: Literal["auto", "always", "never"] = "auto"
    centroid_dtype: Literal["int4", "int8", "bf16"] = "int4"
    dense_layers: int = 0
    dense_below_tokens: int = 0
    dense_below: Literal["auto", "never"] = "auto"
    recall_extend_tokens: int = 0
    recluster_every: int = 256
    merge_segments: bool = True
    reproducible: bool = False
    host_ratio: float = 1.0
    host_kv_dtype: Literal["auto", "int8"] = "auto"
    attend_engine: Literal["auto", "triton", "flashinfer"] = "auto"
    prefill_backend: Literal["auto", "fa3", "trtllm_mha", "flashinfer", "triton"] = "auto"
    trace: bool = False
    trace_tokens: int = 256


FIELD_DOCS: dict[str, str] = {
    "budget_tokens": "Clustered tokens that a (request, kv head) recalls per step and layer and attends to exactly.",
    "candidate_tokens": "Tokens of the best clusters, among which refining picks the budget.",
    "refine": "Pick the budget's tokens one by one by their codes; false recalls whole clusters, the last one trimmed.",
    "code_bits": "Bits per channel of a token's code, 1 or 2.",
    "sink_tokens": "First tokens of a sequence, never clustered and always attended; whole pages, one or more.",
    "window_tokens": "Most recent tokens, always attended (at least so many); whole pages, two or more.",
    "segment_tokens": "Most tokens that are clustered together; whole pages, four or more.",
    "tokens_per_cluster": "Tokens of a cluster on average; divides page_size.",
    "kmeans_passes": "Passes of k-means over a segment.",
    "outlier_share": "Share of a segment's clusters that its farthest keys get: a query finds keys unlike their cluster.",
    "choice_spread": "Weight of a cluster's spread in the choice of clusters; more is more optimistic about wide ones.",
    "estimate": "Estimate the clusters that were not recalled by their means instead of leaving them out.",
    "estimate_codes": "In that estimate, candidates that were not recalled count by their codes; nothing more is read.",
    "estimate_spread": "Weight of a cluster's spread in that estimate.",
    "estimate_clusters": "Clusters estimated by their own mean value; the rest by their segment's mean value.",
    "moving_values": "Estimated values move with the query, as values do with keys inside clusters; auto: on a CPU alone.",
    "centroid_dtype": "Format of stored centroids and mean values: int4, int8 or bf16.",
    "dense_layers": "First layers that attend to everything.",
    "dense_below_tokens": "Sequences shorter than this, in tokens, attend to everything.",
    "dense_below": "auto: on a GPU a step attends to everything where its batch has so few clustered tokens that this is "
    "likely faster, never with a host tier; never: each request by itself. See [gpu.md](gpu.md).",
    "recall_extend_tokens": "A prompt that is in the prefix cache but for so many tokens or fewer recalls for these, as a "
    "decode step does; 0 is off. On a CPU alone. See [design.md](design.md#recalled-extends).",
    "recluster_every": "So many decoded tokens behind the window become a segment, each time; whole pages, four or more.",
    "merge_segments": "Neighbouring segments that one running request alone sees are clustered again as one, when that at "
    "least doubles the largest of them, completes one of segment_tokens or adds a third to a prompt's last one.",
    "reproducible": "Requests one after another get the same answer whatever was served before: segments that others' "
    "requests shaped are built again, and answers that were decoded sparsely are not kept in the prefix cache.",
    "host_ratio": "Tokens that the KV cache holds for each that has room on the device; the others are in host memory. 1 is "
    "off: everything is on the device. See [memory.md](memory.md).",
    "host_kv_dtype": "Format in host memory: auto is the KV cache's own, bit for bit; int8 rounds a page once, when stored.",
    "attend_engine": "What attends to recalled tokens on a GPU; auto is triton, our own kernel. See [gpu.md](gpu.md).",
    "prefill_backend": "Backend of SGLang that prefills on a GPU; auto is SGLang's own choice. See [gpu.md](gpu.md).",
    "trace": "Requests may ask which tokens each step recalled, and get that with the answer. See [explain.md](explain.md).",
    "trace_tokens": "Most steps of an answer that such a trace keeps, the newest ones.",
}


class Limit(NamedTuple):
    """What a number may be."""

    least: float  # in pages where `pages`
    most: float
    why: str  # not more
    pages: bool = False  # whole pages


_HELD = "a program on a GPU holds those of a head"
_SEGMENT = "a token's place in its segment has 16 bits"
_ATTENDED = "every step attends to all of them"
_NORMAL = "1 is the weight that normally distributed keys have"

LIMITS: dict[str, Limit] = {
    "budget_tokens": Limit(1, 32768, _HELD),
    "candidate_tokens": Limit(1, 32768, _HELD),
    "sink_tokens": Limit(1, 65536, _ATTENDED, pages=True),
    "window_tokens": Limit(2, 65536, _ATTENDED, pages=True),
    "segment_tokens": Limit(MIN_SEGMENT_PAGES, MAX_SEGMENT_TOKENS, _SEGMENT, pages=True),
    "tokens_per_cluster": Limit(1, MAX_PAGE_SIZE, "a page holds whole clusters"),
    "kmeans_passes": Limit(1, 64, "requests wait for every pass"),
    "outlier_share": Limit(0, 0.5, "the other keys have clusters too"),
    "choice_spread": Limit(0, 8, _NORMAL),
    "estimate_spread": Limit(0, 8, _NORMAL),
    "estimate_clusters": Limit(1, 65536, "a step on a GPU keeps a list of them for each head"),
    "dense_layers": Limit(0, 1024, "no model has so many layers"),
    "dense_below_tokens": Limit(0, 2**31 - 1, "positions have 32 bits"),
    "recall_extend_tokens": Limit(0, 1024, "each of them costs as much as a decode step"),
    "recluster_every": Limit(MIN_SEGMENT_PAGES, MAX_SEGMENT_TOKENS, _SEGMENT, pages=True),
    "trace_tokens": Limit(1, 4096, "the server keeps them in memory until the answer ends, and sends them with it"),
    "host_ratio": Limit(1, 64, "the clusters of every token stay on the device, and beyond are all that is left there"),
}


def parse_config(text_or_path: str) -> ClusterKVConfig:
    """Read a configuration from JSON text (it starts with `{`) or from the JSON file at a path.

    Raises ConfigError, one sentence with the fix, for a missing file, broken JSON, an unknown key or a wrong type.
    """
    text = text_or_path.strip()
    if not text.startswith("{"):
        try:
            text = Path(text).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(
                f"cannot read {text_or_path!r} ({reason}): pass JSON text such as '{EXAMPLE}' or a JSON file's path"
            ) from None
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"not valid JSON ({error}): write it like '{EXAMPLE}'") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"a {type(raw).__name__} where an object is expected: write it like '{EXAMPLE}'")
    for name in raw:
        if name not in FIELD_DOCS:
            close = difflib.get_close_matches(name, FIELD_DOCS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(FIELD_DOCS)}"
            raise ConfigError(f"unknown key {name!r}: {hint}")
    if twice := _given_twice(text):
        raise ConfigError(f"key {twice[0]!r} is given twice: leave one of them")
    try:
        return msgspec.convert(raw, ClusterKVConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(_wrong_value(raw, str(error))) from None


def _given_twice(text: str) -> list[str]:
    """Keys that valid JSON text gives more than once in an object; decoded, the last one would count."""
    found: list[str] = []

    def keep(pairs: list[tuple[str, object]]) -> None:
        names = [name for name, _ in pairs]
        found.extend(name for name in dict.fromkeys(names) if names.count(name) > 1)

    # Only keys matter here: numbers stay text, whatever their size.
    json.loads(text, object_pairs_hook=keep, parse_int=str, parse_float=str)
    return found


def load_config(flag: str | None, env: Mapping[str, str]) -> ClusterKVConfig:
    """The configuration of this run: the flag before SGLANG_CLUSTERKV_CONFIG before the defaults. Empty is unset."""
    for source, value in ((FLAG, flag), (ENVIRONMENT, env.get(ENVIRONMENT))):
        if value and value.strip():
            try:
                return parse_config(value)
            except ConfigError as error:
                raise ConfigError(f"{source}: {error}") from None
    return ClusterKVConfig()


def fit_defaults(config: ClusterKVConfig, page_size: int) -> ClusterKVConfig:
    """Raise values that still are the defaults to whole pages, so that `--page-size 64` needs no other setting.

    What the user set differently is left alone; `validate` says what is wrong with it.
    """
    defaults = ClusterKVConfig()
    changes = {}
    for name, limit in LIMITS.items():
        value = getattr(config, name)
        if limit.pages and page_size > 1 and value == getattr(defaults, name):
            changes[name] = _whole_pages(value, limit, page_size)
    return msgspec.structs.replace(config, **changes)


def validate(config: ClusterKVConfig, page_size: int, head_dim: int | None = None, layers: int | None = None) -> None:
    """Raise ConfigError when the values do not go together, or not with this page size (tokens), head_dim and layers.

    The message is one sentence that names every problem with its fix, so that one correction is enough.
    """
    values = msgspec.structs.asdict(config)
    problems = [
        f"{name}={values[name]} {said}"
        for name, limit in LIMITS.items()
        if not limit.pages and name != "tokens_per_cluster" and (said := _outside(values[name], limit))
    ]
    numbers_fit = not problems
    problems += _page_problems(values, page_size)
    if numbers_fit and config.refine and config.candidate_tokens < config.budget_tokens:
        problems.append(
            f"candidate_tokens={config.candidate_tokens} is less than budget_tokens={config.budget_tokens}: "
            "raise candidate_tokens or set refine to false"
        )
    if head_dim is not None and (head_dim < 16 or head_dim % 16):
        problems.append(f"head_dim={head_dim} of this model is not a multiple of 16: use another --attention-backend")
    if layers is not None and config.dense_layers >= layers:
        problems.append(
            f"dense_layers={config.dense_layers} leaves none of this model's {layers} layers to recall in: "
            f"use {layers - 1} or less"
        )
    if config.host_ratio > 1 and config.dense_layers > 0:
        problems.append(
            f"host_ratio={config.host_ratio:g} and dense_layers={config.dense_layers} would read all that is in host memory in "
            "every step: set dense_layers to 0 or host_ratio to 1"
        )
    if config.reproducible and config.recall_extend_tokens > 0:
        problems.append("recall_extend_tokens lets answers depend on what is cached, not reproducible: leave one out")
    if problems:
        raise ConfigError("; ".join(problems))


def _outside(value: float, limit: Limit) -> str | None:
    """What is wrong with a number, if something is."""
    if math.isnan(value):
        return f"is not a number: use {limit.least} or more"
    if value < limit.least:
        return f"is less than {limit.least}: use {limit.least} or more"
    if value > limit.most:
        return f"is more than {limit.most} ({limit.why}): use {limit.most} or less"
    return None


def _whole_pages(value: int, limit: Limit, page_size: int) -> int:
    """A number raised to whole pages, and to as many as there must be."""
    return max(int(limit.least), -(-value // page_size)) * page_size


def _page_problems(values: dict[str, Any], page_size: int) -> list[str]:
    """What does not fit whole pages; a fix that is named goes with the fixes of the others."""
    per_cluster = values["tokens_per_cluster"]
    if page_size < 2:
        return [f"page_size={page_size} is too small: use --page-size 16"]
    if page_size > MAX_PAGE_SIZE:
        unit = per_cluster if 0 < per_cluster <= MAX_PAGE_SIZE else 1
        return [
            f"page_size={page_size} is too large, for a segment has {MIN_SEGMENT_PAGES} pages or more and "
            f"{MAX_SEGMENT_TOKENS} tokens or less: use --page-size {max(1, 16 // unit) * unit}, or another multiple of "
            f"tokens_per_cluster up to {MAX_PAGE_SIZE // unit * unit}"
        ]
    problems = []
    if per_cluster < 1 or page_size % per_cluster:
        divisors = [d for d in range(2, page_size + 1) if page_size % d == 0]
        problems.append(
            f"page_size={page_size} is not a multiple of tokens_per_cluster={per_cluster}: "
            f"use {_either([d for d in divisors if d >= 4] or divisors)}"
        )
    segment = 0  # tokens, once fixed
    for name, limit in LIMITS.items():
        if not limit.pages:
            continue
        value, fitting, s = values[name], _whole_pages(values[name], limit, page_size), "s" * (limit.least > 1)
        most = int(limit.most) // page_size * page_size
        than = f"{most} ({limit.why})"
        if name == "recluster_every" and segment < most:
            most, than = segment, f"segment_tokens={segment}"
        if fitting > most:
            problems.append(f"{name}={value} is more than {than}: use {most} or less")
        elif value % page_size:
            problems.append(f"{name}={value} is not a multiple of page_size={page_size}: use {fitting}")
        elif value < fitting:
            problems.append(f"{name}={value} is less than {limit.least} page{s} of {page_size} tokens: use {fitting}")
        if name == "segment_tokens":
            segment = min(fitting, most)
    return problems


def _either(values: Sequence[object]) -> str:
    """`4, 8 or 16`."""
    *others, last = [str(value) for value in values]
    return f"{', '.join(others)} or {last}" if others else last


def _type_text(name: str) -> str:
    """`an integer`, `true or false`, `1 or 2`: what the field accepts, in words."""
    annotation = ClusterKVConfig.__annotations__[name]
    words = {int: "an integer", float: "a number", bool: "true or false"}
    if annotation in words:
        return words[annotation]
    return _either([msgspec.json.encode(choice).decode() for choice in annotation.__args__])


def _wrong_value(raw: dict[str, Any], message: str) -> str:
    # msgspec names the field by its path only: "Expected `int`, got `str` - at `$.budget_tokens`".
    found = re.search(r"at `\$\.(\w+)`", message)
    if found is None:
        return message
    name = found.group(1)
    return f"{name}={msgspec.json.encode(raw[name]).decode()} is not allowed: use {_type_text(name)}"


def _accepted_text(name: str) -> str:
    """What the field accepts, in words, with its limits."""
    limit, text = LIMITS.get(name), _type_text(name)
    return text if limit is None else f"{text}, {'up' if limit.pages else limit.least} to {limit.most:,}"


def checks_indices() -> bool:
    """Whether indices are checked before kernels turn them into addresses (kernels/checks.py)."""
    return os.environ.get(CHECK, "") not in ("", "0")


def configuration_markdown() -> str:
    """The text of docs/configuration.md, from FIELD_DOCS, LIMITS and the defaults."""
    defaults = msgspec.to_builtins(ClusterKVConfig())
    rows = "\n".join(
        f"| `{name}` | `{msgspec.json.encode(defaults[name]).decode()}` | {_accepted_text(name)} | {text} |"
        for name, text in FIELD_DOCS.items()
    )
    reasons: dict[str, list[str]] = {}
    for name, limit in LIMITS.items():
        reasons.setdefault(limit.why, []).append(f"`{name}`")
    limits = "\n".join(f"- {', '.join(names)}: {why}." for why, names in reasons.items())
    return f"""# Configuration

<!-- Written by `python -m sglang_clusterkv.config > docs/configuration.md`: change config.py, not this. -->

`{FLAG}` takes JSON text or the path of a JSON file; without it the environment variable `{ENVIRONMENT}` is read the
same way, which is also how `sgl.Engine` is configured; without both the defaults hold.

```
sglang serve --model-path MODEL --attention-backend clusterkv {FLAG} '{EXAMPLE}'
```

| key | default | accepts | meaning |
|---|---|---|---|
{rows}

`--page-size` is SGLang's own flag; with `--attention-backend clusterkv` it is 16 unless set, and may be 2 to {MAX_PAGE_SIZE:,}.
Values that the table calls whole pages are raised to fit it where they are still the defaults. An unknown key, one given twice,
a wrong type, a number outside its limits or values that do not go together end the start with a sentence that names the fix.

In the environment `{CHECK}=1` has [indices checked](developing.md#checked-indices), and on the plugin's CPU platform:
- `SGLANG_USE_CPU_ENGINE=1`: SGLang's own platform takes its place.
- `SGLANG_CLUSTERKV_CPU_OVERLAP=1`: SGLang's overlap schedule stays on.
- `SGLANG_CLUSTERKV_CPU_LAYERS=0`: decoder layers run by SGLang's modules in every step.
- `SGLANG_CLUSTERKV_CPU_SLEEP=0`: a scheduler that has nothing to do stays awake.
- `SGLANG_CLUSTERKV_CPU_BF16_WEIGHTS=0`: no [weights in half the bytes](performance.md#weights-in-half-the-bytes).

Why not more:

{limits}
"""


if __name__ == "__main__":
    print(configuration_markdown(), end="")
