"""`sglang-clusterkv plan`: sizes that are the server's, times that are the step model's, and refusals in one sentence.

Red when: a byte of the pool or the index is left out or counted on a rank that has none of it, a model that a start refuses is
planned, a step that recalls nothing counts as sparse, advice on a host tier does not let the requests in, or a user's mistake
ends with a traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.step_model import StepShape, dense_launches, sparse_launches
from sglang_clusterkv.kernels.step_time import GAP_US, dense_us, layer_time
from sglang_clusterkv.memory.device import Geometry, index_bytes
from sglang_clusterkv.tools import cli
from sglang_clusterkv.tools.plan.checkpoint import read_checkpoint
from sglang_clusterkv.tools.plan.devices import GPUS, MEMORY_SHARE, REACHED
from sglang_clusterkv.tools.plan.plan import Plan, Times, Wish, make_plan

CONFIG = ClusterKVConfig(dense_below="never")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
WISH = Wish(context=32_768, concurrency=8, tp=1, page_size=16, memory_gb=132.0, tbs=4.8, counted=True)


def folder(tmp_path: Path, **changes: Any) -> Path:
    """A model's folder with LLAMA's configuration, changed; None takes a key away."""
    config = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path


def plan_of(tmp_path: Path, wish: Wish = WISH, config: ClusterKVConfig = CONFIG, **changes: Any) -> Plan:
    return make_plan(read_checkpoint(folder(tmp_path, **changes)), 16.0, config, wish)


def step_times(context: int, batch: int, is_dense: bool, heads: int = 32, kv_heads: int = 8, tbs: float = 4.8) -> Times:
    """Milliseconds of the attention of 32 layers."""
    shape = StepShape(32, heads, kv_heads, 128, batch, context)
    launches = dense_launches(shape) if is_dense else sparse_launches(shape, CONFIG)
    rate = 1e6 * tbs * REACHED
    least = sum(launch.bytes / rate + GAP_US for launch in launches)
    likely = least if is_dense else layer_time(shape, CONFIG, rate).likely
    return Times(0.032 * least, 0.032 * likely)


def shared(*parts: tuple[float, Times]) -> Times:
    """A step some layers of which take the one time and some the other: a share of all and what a step of it would take."""
    return Times(
        *(
            sum(share * ms for (share, _), ms in zip(parts, column, strict=True))
            for column in zip(*(t for _, t in parts), strict=True)
        )
    )


def test_sizes_are_the_pools_and_the_indexs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert plan.dense.token_bytes == plan.sparse.token_bytes == 32 * 8 * 2 * 128 * 2
    assert plan.dense.index_bytes == 0
    page = index_bytes(CONFIG, Geometry(32, 8, 128, 16, pages=1))
    assert plan.sparse.index_bytes == -(-page // 16)
    for side in (plan.dense, plan.sparse):
        used = side.pool_tokens * (side.token_bytes + side.index_bytes)
        assert 116e9 - 16 * 2 * side.token_bytes < used <= 116e9
        assert side.fits == side.pool_tokens // 32_768 >= side.running == 8


def test_a_step_is_the_models_and_the_weights(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    table = 128_256 * 4096 * 2  # of the embeddings, which a step does not read
    assert plan.weights_ms == pytest.approx((16e9 - table) / 4.32e9)
    for side, is_dense in ((plan.dense, True), (plan.sparse, False)):
        assert side.attention == pytest.approx(step_times(32_768, 8, is_dense))
        assert side.step == pytest.approx([ms + plan.weights_ms for ms in side.attention])
        assert side.tokens_per_s == pytest.approx(8e3 / side.step.least)
        assert side.likely_tokens_per_s == pytest.approx(8e3 / side.step.likely)
    assert plan.speedup and plan.likely_speedup
    assert plan.speedup > plan.likely_speedup > 1.2


def test_what_is_likely_is_known_where_instructions_are_counted(tmp_path: Path) -> None:
    known = plan_of(tmp_path)
    for wish, config, changes in (
        (WISH._replace(counted=False), CONFIG, {}),  # another generation
        (WISH, ClusterKVConfig(dense_below="never", refine=False), {}),
        (WISH, ClusterKVConfig(dense_below="never", estimate=False), {}),
        (WISH, CONFIG, {"dtype": "float32"}),
    ):
        plan = plan_of(tmp_path, wish, config, **changes)
        assert plan.sparse.step and plan.sparse.step.likely is None and plan.likely_speedup is None
        assert plan.speedup and plan.pays_from and known.pays_from and plan.pays_from < known.pays_from
    # Less bandwidth slows what reads most.
    slower = plan_of(tmp_path, WISH._replace(tbs=3.35))
    assert slower.sparse.attention == pytest.approx(step_times(32_768, 8, False, tbs=3.35))
    assert slower.dense.attention == pytest.approx(step_times(32_768, 8, True, tbs=3.35))
    assert slower.likely_speedup and known.likely_speedup and slower.likely_speedup > known.likely_speedup
    shape = StepShape(32, 32, 8, 128, 8, 32_768)
    assert dense_us(shape, 4.3e6) == pytest.approx(dense_us(shape))
    assert GPUS["H100"].counted and GPUS["H200"].counted and not GPUS["B200"].counted and not GPUS["A100-80G"].counted


def test_requests_that_do_not_fit_wait(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, WISH._replace(concurrency=64))
    assert plan.sparse.running == plan.sparse.fits < plan.dense.running == plan.dense.fits < 64
    assert plan.sparse.attention == pytest.approx(step_times(32_768, plan.sparse.fits, False))


def test_ranks_have_a_part_each(tmp_path: Path) -> None:
    whole, half = plan_of(tmp_path), plan_of(tmp_path, WISH._replace(tp=2))
    assert half.dense.token_bytes == whole.dense.token_bytes // 2
    assert half.weights_ms == pytest.approx(whole.weights_ms / 2)
    assert half.sparse.attention == pytest.approx(step_times(32_768, 8, False, 16, 4))
    # More ranks than kv heads: each has one.
    assert plan_of(tmp_path, WISH._replace(tp=16)).dense.token_bytes == whole.dense.token_bytes // 8


def test_what_is_not_recalled_is_dense(tmp_path: Path) -> None:
    for wish, config in (
        (WISH._replace(context=512), CONFIG),
        (WISH, ClusterKVConfig(budget_tokens=32_768, candidate_tokens=32_768)),
        (WISH, ClusterKVConfig(dense_below_tokens=40_000)),
        (WISH._replace(concurrency=2), ClusterKVConfig()),  # a batch of 65,536 tokens: `dense_below` is auto
    ):
        plan = plan_of(tmp_path, wish, config)
        assert plan.sparse.attention == plan.dense.attention
        assert plan.pays_from is None
    by_itself, always = plan_of(tmp_path, WISH, ClusterKVConfig()), plan_of(tmp_path)
    assert by_itself.sparse == always.sparse
    assert by_itself.pays_from and always.pays_from and by_itself.pays_from > always.pays_from
    some = plan_of(tmp_path, WISH, ClusterKVConfig(dense_layers=8))
    mixed = shared((0.25, step_times(32_768, 8, True)), (0.75, step_times(32_768, 8, False)))
    assert some.sparse.attention == pytest.approx(mixed)


def test_where_it_begins_to_pay(tmp_path: Path) -> None:
    first = plan_of(tmp_path).pays_from
    assert first and first % 1024 == 0
    assert step_times(first, 8, False).likely < step_times(first, 8, True).least
    assert step_times(first - 1024, 8, False).likely >= step_times(first - 1024, 8, True).least
    by_bytes = plan_of(tmp_path, WISH._replace(counted=False)).pays_from
    assert by_bytes and step_times(by_bytes, 8, False).least < step_times(by_bytes, 8, True).least


def test_sliding_layers_read_their_window(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 24 + ["full_attention"] * 8
    plan = plan_of(tmp_path, sliding_window=1024, layer_types=kinds)
    page = index_bytes(CONFIG, Geometry(32, 8, 128, 16, pages=1, clustered=tuple(range(24, 32))))
    assert plan.sparse.index_bytes == -(-page // 16), "of the eight layers that recall"
    slid = (0.75, step_times(1024, 8, True))
    assert plan.dense.attention == pytest.approx(shared(slid, (0.25, step_times(32_768, 8, True))))
    assert plan.sparse.attention == pytest.approx(shared(slid, (0.25, step_times(32_768, 8, False))))
    gemma = read_checkpoint(folder(tmp_path, model_type="gemma3_text", sliding_window=1024, num_hidden_layers=26))
    assert gemma.sliding_layers == 22
    assert read_checkpoint(folder(tmp_path, sliding_window=4096, use_sliding_window=False)).sliding_layers == 0


def test_a_host_tier_that_is_advised_lets_them_in(tmp_path: Path) -> None:
    assert "not needed" in plan_of(tmp_path).host_tier
    plan = plan_of(tmp_path, WISH._replace(concurrency=64))
    ratio = float(plan.host_tier.split()[1])
    per_token = 116e9 / (64 * 32_768)
    assert plan.sparse.token_bytes / ratio + plan.sparse.index_bytes <= per_token
    assert plan.sparse.token_bytes / (ratio - 0.5) + plan.sparse.index_bytes > per_token
    assert f"{64 * 32_768 * 131_072 / 1e9:.1f} GB of host memory" in plan.host_tier
    rounded = plan_of(tmp_path, WISH._replace(concurrency=64), ClusterKVConfig(host_kv_dtype="int8"))
    assert f"{64 * 32_768 * 256 * 264 / 1e9:.1f} GB of host memory" in rounded.host_tier
    cpu = WISH._replace(concurrency=30, tbs=None)
    assert "none helps" in plan_of(tmp_path, cpu).host_tier  # both tiers are the same memory
    rounded = plan_of(tmp_path, cpu, ClusterKVConfig(host_kv_dtype="int8"))
    ratio = float(rounded.host_tier.split()[1])
    row_bytes = 32 * 8 * (2 * 128 + 8)
    assert rounded.sparse.token_bytes / ratio + rounded.sparse.index_bytes + row_bytes <= 116e9 / (30 * 32_768)
    assert "none helps" in plan_of(tmp_path, WISH._replace(concurrency=1000)).host_tier


def test_a_cache_in_8_bits_takes_half_and_its_host_rows_no_less_as_int8(tmp_path: Path) -> None:
    model, wish = read_checkpoint(folder(tmp_path))._replace(dtype="fp8_e4m3"), WISH._replace(concurrency=120)
    plan = make_plan(model, 16.0, CONFIG, wish)
    whole = plan_of(tmp_path)
    assert 2 * plan.sparse.token_bytes == whole.sparse.token_bytes
    assert plan.sparse.index_bytes == whole.sparse.index_bytes and plan.sparse.fits > whole.sparse.fits
    assert f"{120 * 32_768 * 65_536 / 1e9:.1f} GB of host memory" in plan.host_tier
    assert "refused" in make_plan(model, 16.0, ClusterKVConfig(host_kv_dtype="int8"), wish).host_tier


def test_the_table_and_the_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        "--model",
        str(folder(tmp_path)),
        "--context",
        "32768",
        "--concurrency",
        "8",
        "--weights-gb",
        "16",
    ]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["memory_gb"] == MEMORY_SHARE * GPUS["H200"].memory_gb
    assert (
        f"| tokens/s, all requests | {found['dense']['tokens_per_s']:,.0f} | {found['sparse']['tokens_per_s']:,.0f} "
        f"| {found['sparse']['likely_tokens_per_s']:,.0f} |" in printed
    )
    assert f"| speed-up | 1 | {found['speedup']:.2f} | {found['likely_speedup']:.2f} |" in printed
    assert (
        f"| {found['sparse']['attention_ms']['least']:.2f} | {found['sparse']['attention_ms']['likely']:.2f} |"
        in printed
    )
    assert f"likely faster with clusterkv from {found['pays_from']:,} tokens on" in printed
    assert cli.main([*arguments, "--gpu", "B200"]) == 0
    assert (
        "known for the H100 and H200 alone" in (printed := capsys.readouterr().out)
        and "clusterkv, likely" not in printed
    )


def test_a_cpu_has_sizes_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(folder(tmp_path)), "--context", "32768", "--weights-gb", "16", "--gpu", "cpu"]
    assert cli.main([*arguments, "--memory-gb", "64", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "262,144" in printed and "speed-up" not in printed and "no model of a step on a CPU" in printed
    assert cli.main(arguments) == 1
    assert "--memory-gb" in capsys.readouterr().err


def test_weights_are_those_of_the_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 7000}}')
    assert read_checkpoint(folder(tmp_path)).weight_bytes == 7000
    (tmp_path / "model-1.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-2.safetensors").write_bytes(b"x" * 50)
    assert read_checkpoint(folder(tmp_path)).weight_bytes == 150


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear attention"),
        ({"attention_chunk_size": 8192}, "chunked attention"),
        ({"is_encoder_decoder": True}, "cross-attention"),
        ({"attn_logit_softcapping": 50.0}, "caps its attention logits"),
        ({"architectures": ["BertModel"]}, "no decode step"),
        ({"head_dim": 72}, "not a multiple of 16"),
        ({"v_head_dim": 64}, "differ in size"),
        ({"sliding_window": 4096}, "sliding window"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"max_position_embeddings": 8192}, "more than this model's 8192"),
    ],
)
def test_refused_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    model = str(folder(tmp_path, **changes))
    assert cli.main(["plan", "--model", model, "--context", "32768", "--weights-gb", "16"]) == 1
    out, error = capsys.readouterr()
    assert words in error and error.count("\n") == 1 and not out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--weights-gb", "500"], "do not fit"),
        (["--weights-gb", "16", "--tp", "3"], "does not divide"),
        (["--weights-gb", "16", "--clusterkv-config", '{"budget": 1}'], "did you mean"),
        (
            ["--weights-gb", "16", "--clusterkv-config", '{"recall_extend_tokens": 1024}'],
            "leave out recall_extend_tokens",
        ),
        (["--weights-gb", "16", "--tp", "2", "--clusterkv-config", '{"trace": true}'], "leave out --tp-size or trace"),
        ([], "pass --weights-gb"),
    ],
)
def test_mistakes_are_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert cli.main(["plan", "--model", str(folder(tmp_path)), "--context", "4096", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_no_model_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", str(tmp_path / "none"), "--context", "4096"]) == 1
    assert "pass the folder" in capsys.readouterr().err


def test_gigabytes_may_be_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "--model", str(folder(tmp_path)), "--context", "4096", "--gpu", "cpu"]
    assert cli.main([*arguments, "--weights-gb", "1.5", "--memory-gb", "3.5"]) == 0
    printed = capsys.readouterr().out
    assert "1.5 GB of weights" in printed and "cpu: 3.5 GB" in printed


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--memory-gb", "0", "must be a number above 0, in GB"),
        ("--memory-gb", "nan", "must be a number above 0, in GB"),
        ("--weights-gb", "2 GB", "must be a number above 0, in GB"),
        ("--concurrency", "1.5", "must be a whole number, 1 or more"),
        ("--concurrency", "1,000", "must be a whole number, 1 or more"),
        ("--tp", "0", "must be a whole number, 1 or more"),
    ],
)
def test_numbers_that_are_none_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, words: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--model", str(tmp_path), "--context", "4096", option, value])
    assert ended.value.code == 2 and f"argument {option}: {words}" in capsys.readouterr().err
