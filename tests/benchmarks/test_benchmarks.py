"""The parts of the benchmarks that compute, without a server: what they print is what was measured.

Red when: a result file replaces an older one or loses what it was measured on, a ratio is taken to another arm or cell, failed
requests count as measured, servers are sent different requests or an evicted prefix, an operation is measured although its
test is red or missing, its time holds another's, a scene does not fit its memory, results of different runs are put into one
table, or the KL of a token is put to another one's entropy.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import kernels, serving
from benchmarks.kernel_scene import (
    MEMORY_SHARE,
    OUR_DENSE,
    SHAPES,
    STEP,
    CpuClock,
    Operation,
    Shape,
    fitting_layers,
    geometry_of,
    key_objective,
    make_scene,
    scene_bytes,
)
from benchmarks.quality import documents, model_level
from benchmarks.results_file import write_results
from benchmarks.serving import BenchmarkError, Cell, Load
from sglang_clusterkv.config import ClusterKVConfig
from tests.support.interpreter import interpreting

CONFIG = ClusterKVConfig(budget_tokens=64, candidate_tokens=256)
SHORT_SEGMENTS = ClusterKVConfig(segment_tokens=64, recluster_every=64)
TINY = SHAPES["smollm2-135m"]._replace(layers=4)


# -- files of results -------------------------------------------------------------------------------------------------


def write(folder: Path, **fields: Any) -> Path:
    about: dict[str, Any] = {
        "title": "A title",
        "setting": "a model",
        "command": "python -m benchmarks.x",
        "body": "| a |",
    }
    return write_results("x", folder=folder, **(about | {"data": {"a": 1}} | fields))


def test_results_of_one_second_stand_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    written = [write(tmp_path, data={"run": run}) for run in range(3)]
    assert len(set(written)) == 3
    assert [json.loads(path.with_suffix(".json").read_text())["results"]["run"] for path in written] == [0, 1, 2]


def test_one_file_of_an_older_run_is_enough_to_take_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.strftime", lambda *_: "20260101-000000")
    for suffix in (".svg", ".json", ".md"):
        (tmp_path / f"x-20260101-000000{suffix}").write_text("older")
        assert write(tmp_path).name != "x-20260101-000000.md"
        assert (tmp_path / f"x-20260101-000000{suffix}").read_text() == "older"


def test_results_name_what_they_were_measured_on(tmp_path: Path) -> None:
    path = write(tmp_path)
    about = json.loads(path.with_suffix(".json").read_text())
    for text in (about["machine"], about["versions"], "a model", "python -m benchmarks.x", "| a |"):
        assert text in path.read_text()
    assert "SGLang 0." in about["versions"] and "torch " in about["versions"] and "cores" in about["machine"]


# -- servers ----------------------------------------------------------------------------------------------------------


def result(completed: int = 4, **fields: Any) -> dict[str, Any]:
    """A line as bench_serving writes it, as far as it is read."""
    return {
        "completed": completed,
        "median_ttft_ms": 200.0,
        "median_tpot_ms": 50.0,
        "median_itl_ms": 40.0,
        "output_throughput": 30.0,
        "duration": 4.0,
        "total_output_tokens": 64,
        "cache_report": {"cache_hit_rate_pct": 98.5, "total_prompt_tokens": 4000},
        "server_info": {
            "internal_states": [{"clusterkv": counts(build_ms=700, sparse_steps=30, dense_steps={"short": 3})}]
        },
    } | fields


def counts(**fields: Any) -> dict[str, Any]:
    return {"build_ms": 500, "sparse_steps": 10, "dense_steps": {}} | fields


def test_the_last_line_of_bench_servings_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("\n".join(json.dumps(result(duration=float(i))) for i in range(3)) + "\n")
    assert serving.read_result(file, 4)["duration"] == 2.0


def test_failed_requests_are_no_measurement(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    with pytest.raises(BenchmarkError, match="no result"):
        serving.read_result(file, 4)
    file.write_text(json.dumps(result(completed=3)) + "\n")
    with pytest.raises(BenchmarkError, match="3 of 4"):
        serving.read_result(file, 4)


@pytest.mark.parametrize("error", [None, SystemExit(1), ValueError("no such dataset")])
def test_bench_serving_gets_its_arguments_and_its_failure_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException | None
) -> None:
    def cli_main() -> None:
        print("arguments", *sys.argv[1:])
        if error is not None:
            raise error

    monkeypatch.setitem(sys.modules, "sglang.benchmark.serving", SimpleNamespace(cli_main=cli_main))
    before, log = list(sys.argv), tmp_path / "bench.log"
    with nullcontext() if error is None else pytest.raises(BenchmarkError, match=str(log)):
        serving.drive(["--seed", "1"], log)
    assert sys.argv == before
    assert "python -m sglang.benchmark.serving --seed 1\narguments --seed 1\n" in log.read_text()


def test_a_row_counts_what_happened_in_its_cell_only() -> None:
    row = serving.row_of("clusterkv", Cell("shared", 1000, 4), result(), counts())
    assert row["clustering_share"] == pytest.approx(0.2 / 4)
    assert (row["sparse_steps"], row["dense_steps"]) == (20, 3)
    assert row["hit_rate"] == pytest.approx(0.985)
    assert (row["ttft_ms"], row["tpot_ms"], row["tokens_per_s"]) == (200.0, 50.0, 30.0)


def row(arm: str, context: int, **fields: float) -> dict[str, Any]:
    found = result(**fields) | {"server_info": result()["server_info"]}
    return serving.row_of(arm, Cell("shared", context, 1), found, counts() if arm == "clusterkv" else None)


def test_ratios_are_to_the_base_in_the_same_cell() -> None:
    rows = [
        row("torch_native", 1000, median_tpot_ms=100.0),
        row("torch_native", 4000, median_tpot_ms=400.0),
        row("clusterkv", 1000, median_tpot_ms=50.0, median_ttft_ms=100.0, output_throughput=45.0),
        row("clusterkv", 4000, median_tpot_ms=100.0),
    ]
    lines = serving.ratio_table(rows, "torch_native").splitlines()[2:]
    fields = [[field.strip() for field in line.strip("|").split("|")] for line in lines]
    assert [field[1:4] for field in fields] == [
        ["1,000", "1", "torch_native"],
        ["1,000", "1", "clusterkv"],
        ["4,000", "1", "torch_native"],
        ["4,000", "1", "clusterkv"],
    ]
    assert [field[5] for field in fields] == ["1.00", "0.50", "1.00", "1.00"]  # TTFT
    assert [field[7] for field in fields] == ["1.00", "0.50", "1.00", "0.25"]  # TPOT
    assert [field[10] for field in fields] == ["1.00", "1.50", "1.00", "1.00"]  # tokens/s
    assert [field[12:] for field in fields] == [["-", "-"], ["5.0 %", "87 %"]] * 2


def test_without_the_base_there_is_no_ratio() -> None:
    line = serving.ratio_table([row("clusterkv", 1000)], "torch_native").splitlines()[2]
    assert [field.strip() for field in line.strip("|").split("|")][5] == "-"


def test_a_prefix_is_read_once_and_then_by_every_concurrency_before_it_is_flushed() -> None:
    cells = serving.make_cells(["shared", "random", "chat"], [1000, 4000], [1, 8], [1])
    of_context = [str(cell) for cell in cells if cell.context == 1000]
    assert of_context == ["prefix 1,000 x 1", "shared 1,000 x 1", "shared 1,000 x 8", "random 1,000 x 1"]
    server, load = SimpleNamespace(url="http://127.0.0.1:1"), Load(1, 32, 3)
    flushed = ["--flush-cache" in serving.arguments_of(cell, load, server, Path("m"), Path("c")) for cell in cells]
    assert flushed == [cell.fills_cache or cell.workload != "shared" for cell in cells]


def test_all_requests_of_a_context_share_bench_servings_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.benchmark.datasets.generated_shared_prefix import GeneratedSharedPrefixDataset

    monkeypatch.setenv("HOME", str(tmp_path))  # bench_serving keeps what it makes there
    shared = []
    server, load = SimpleNamespace(url="http://127.0.0.1:1"), Load(1, 32, 3)
    for cell in (Cell("shared", 200, 1, fills_cache=True), Cell("shared", 200, 1), Cell("shared", 200, 4)):
        arguments = serving.arguments_of(cell, load, server, Path("m"), Path("c"))
        rows = shared_prefix_rows(GeneratedSharedPrefixDataset, arguments)
        assert len(rows) == load.requests(cell)
        shared += [tuple(prompt[: 200 - serving.QUESTION_TOKENS]) for prompt in rows]
        assert all(len(prompt) == 200 for prompt in rows)
    assert len(set(shared)) == 1


class Vocabulary:
    """As much of a tokenizer as random prompts take."""

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(500)}


def shared_prefix_rows(dataset: Any, arguments: list[str]) -> list[list[int]]:
    """The prompts that bench_serving makes of these arguments: it seeds `random` before."""
    import random

    import numpy as np

    def value(name: str) -> int:
        return int(arguments[arguments.index(name) + 1])

    random.seed(value("--seed"))
    np.random.seed(value("--seed"))
    made = dataset(
        num_groups=value("--gsp-num-groups"),
        prompts_per_group=value("--gsp-prompts-per-group"),
        system_prompt_len=value("--gsp-system-prompt-len"),
        question_len=value("--gsp-question-len"),
        output_len=value("--gsp-output-len"),
        range_ratio=1.0,
        seed=value("--seed"),
        fast_prepare=False,
        send_routing_key=False,
        num_turns=1,
        ordered="--gsp-ordered" in arguments,
        input_ids="--tokenize-prompt" in arguments,
    ).load(Vocabulary())
    return [row.prompt for row in made]


def test_the_pool_holds_every_request_of_a_cell() -> None:
    load = Load(1, 32, 3)
    assert load.pool_tokens(Cell("shared", 7700, 8)) >= 7700 + 8 * (serving.QUESTION_TOKENS + 32)
    assert load.pool_tokens(Cell("random", 1000, 8)) >= 8 * (1000 + 32)
    assert load.pool_tokens(Cell("chat", 4000, 4)) >= 4000 + 4 * 3 * 32


def test_conversations_are_what_bench_serving_replays_turn_by_turn(tmp_path: Path) -> None:
    from sglang.benchmark.datasets.agentic_trace import AgenticTraceDataset

    file = tmp_path / "conversations.json"
    serving.write_conversations(file, Cell("chat", 300, 3), turns=2)
    rows = AgenticTraceDataset(str(file), num_requests=3, fixed_output_len=8, offset=0, max_turns=2).load(None)
    assert [len(row.prompt) for row in rows] == [2, 2, 2]
    assert len({row.prompt[0][0]["content"] for row in rows}) == 1  # the document
    assert [message["role"] for message in rows[0].prompt[0]] == ["system", "user"]
    assert len({row.prompt[0][1]["content"] for row in rows}) == 3


# -- operations -------------------------------------------------------------------------------------------------------


def test_an_operation_whose_test_is_red_is_named_with_it() -> None:
    ran = []

    def run(arguments: tuple[str, ...]) -> bool:
        ran.append(arguments)
        return arguments != ("b.py",)

    red = kernels.red_operations({"score": ["a.py"], "select": ["b.py"], "refine": ["b.py"]}, run)
    assert red == {"select": "red: pytest b.py", "refine": "red: pytest b.py"}
    assert ran == [("a.py",), ("b.py",)]


def test_a_step_is_red_with_any_part_of_it() -> None:
    tests = {"score": ["a.py"], "k-means": ["b.py"], STEP: ["c.py"]}
    assert set(kernels.red_operations(tests, lambda arguments: arguments != ("a.py",))) == {"score", STEP}
    assert set(kernels.red_operations(tests, lambda arguments: arguments != ("b.py",))) == {"k-means"}


def test_a_red_test_is_seen_as_red(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_red():\n    assert False\n\n\ndef test_green():\n    pass\n")
    assert kernels.run_tests([str(tmp_path / "test_it.py"), "-k", "green"], "cpu")
    assert not kernels.run_tests([str(tmp_path / "test_it.py")], "cpu")


def test_the_gpus_operations_are_called_as_they_are_written() -> None:
    with interpreting("cpu"):
        from benchmarks import kernels_cuda

        scene = make_scene(CONFIG, Shape(1, 2, 1, 64), 1, 1, 200, torch.float32, "cpu")
        operations = kernels_cuda.operations(scene)
        for operation in operations:
            output = operation.call(0)
        assert isinstance(output, torch.Tensor)
        torch.testing.assert_close(output, kernels_cuda.whole_step(scene)(0))
        predicted = {operation.name for operation in operations} | {STEP, OUR_DENSE}
        assert set(kernels_cuda.model_ms(scene)) == predicted
        parts = kernels_cuda.clustering(replace(scene, config=SHORT_SEGMENTS))
        for part in parts:
            part.call()
        names = {part.name for part in [*operations, *parts]}
        assert names | {STEP} <= set(kernels.TESTS["cuda"])


@pytest.fixture(scope="module")
def measured() -> tuple[Any, dict[str, Any]]:
    """A small scene on the CPU and its figures, with the test of one operation red."""
    from benchmarks import kernels_cpu

    scene = make_scene(CONFIG, TINY, 1, 2, 1500, torch.float32, "cpu")
    red = {"score": "red: pytest a.py"}
    return scene, kernels.measure(scene, kernels_cpu, CpuClock(), 1, bandwidth=10.0, red=red)


def test_every_operation_of_a_device_has_a_test(measured: tuple[Any, dict[str, Any]]) -> None:
    from benchmarks import kernels_cpu

    scene, _ = measured
    names = {operation.name for operation in [*kernels_cpu.operations(scene), *kernels_cpu.clustering(scene)]}
    assert names | {STEP} == set(kernels.TESTS["cpu"])
    for arguments in kernels.TESTS["cpu"].values():
        assert (kernels.ROOT / arguments[0]).exists()


def test_a_red_operation_has_no_figure(measured: tuple[Any, dict[str, Any]]) -> None:
    _, found = measured
    names = [line["name"] for line in found["operations"]]
    assert "score" not in names and "select" in names
    text = kernels.table(found, {"score": "red: pytest a.py"})
    assert "| score | red: pytest a.py |" in text
    assert "| score |" not in text.replace("| score | red: pytest a.py |", "")


def test_a_red_step_has_no_time_share_or_ratio(measured: tuple[Any, dict[str, Any]]) -> None:
    from benchmarks import kernels_cpu

    scene, found = measured
    assert len(kernels.summary([found]).splitlines()) == 3
    red = kernels.measure(scene, kernels_cpu, CpuClock(), 1, bandwidth=10.0, red={STEP: "red: pytest a.py"})
    assert red["whole"] is None and red["eager_ms"] is None
    assert {line["share"] for line in red["operations"] + red["dense"]} == {None}
    assert len(kernels.summary([red]).splitlines()) == 2
    assert kernels.table(red, {STEP: "red: pytest a.py"}).count(STEP) == 1


def test_gbps_are_bytes_over_time() -> None:
    line = kernels.line_of("select", ms=10.0, whole_ms=40.0, moved_bytes=80e6, bandwidth=16.0)
    assert (line.share, line.gbps, line.of_copy) == (0.25, pytest.approx(8.0), pytest.approx(0.5))
    assert kernels.line_of("merge", 1.0, 40.0, 0, 16.0).gbps is None


def test_a_part_of_clustering_holds_no_others_time() -> None:
    times = {"k-means": 2.0, "encode": 5.0}
    assert [kernels.alone_ms(times, "k-means", None), kernels.alone_ms(times, "encode", "k-means")] == [2.0, 3.0]


class CountingClock:
    """A millisecond per call of an operation."""

    def __init__(self) -> None:
        self.calls = 0

    def ms(self, call: Any, repeats: int) -> float:
        before = self.calls
        call()
        return float(self.calls - before)


def test_times_are_of_the_models_layers(measured: tuple[Any, dict[str, Any]]) -> None:
    scene, _ = measured
    clock, two_layers = CountingClock(), replace(measured[0], layers=2)

    def operation(layer: int) -> None:
        clock.calls += 1

    assert kernels.per_layer_ms(operation, two_layers, clock, 1) == 1.0
    assert clock.calls == 2
    assert two_layers.to_model == 2.0 and scene.to_model == 4.0


def test_each_operation_is_timed_on_what_the_ones_before_it_left(measured: tuple[Any, dict[str, Any]]) -> None:
    scene, _ = measured
    called: list[str] = []

    def operation(name: str) -> Operation:
        return Operation(name, lambda layer: called.append(name), 0)

    fake = SimpleNamespace(
        operations=lambda scene: [operation(name) for name in "abc"],
        clustering=lambda scene: [],
        dense_steps=lambda scene: {},
        whole_step=lambda scene: lambda layer: None,
        kmeans_comparison=lambda scene, repeats: [],
        model_ms=lambda scene: {},
    )
    once = SimpleNamespace(ms=lambda call, repeats: call() or 1.0)
    kernels.measure(scene, fake, once, 1, 1.0, {})
    assert "".join(called) == "a" + "ab" + "abc"


def test_a_cell_is_requests_times_tokens() -> None:
    assert kernels.Cell.parse("8x32768") == kernels.Cell(8, 32768)
    assert kernels.Cell.parse("8x7700/7010") == kernels.Cell(8, 7700, 7008), "whole pages"
    for wrong in ("1x7700/7000", "8x100/112"):
        with pytest.raises(ValueError, match="share"):
            kernels.Cell.parse(wrong)


@pytest.mark.parametrize("free_gb", [1, 4, 16])
def test_layers_are_capped_by_the_free_memory(free_gb: int) -> None:
    shape, context, dtype = SHAPES["llama-3.1-8b"], 131072, torch.bfloat16
    free = free_gb << 30
    layers = fitting_layers(CONFIG, shape, 6, 1, context, dtype, free)
    assert layers == {1: 0, 4: 1, 16: 6}[free_gb]
    for count in (layers, layers + 1):
        fits = scene_bytes(CONFIG, geometry_of(shape, count, 1, context), dtype) <= MEMORY_SHARE * free
        assert fits == (count == layers or layers == 6) or count == 0


def test_a_scenes_requests_have_their_own_pages() -> None:
    scene = make_scene(CONFIG, TINY, 1, 2, 300, torch.float32, "cpu")
    slots = [scene.engine.req_to_token[row, :301] for row in (1, 2)]
    assert len(torch.cat(slots).unique()) == 602
    assert scene.step.batch == 2 and scene.segments == 2


def test_a_scenes_requests_share_their_first_pages() -> None:
    scene = make_scene(CONFIG, TINY, 1, 3, 700, torch.float32, "cpu", shared=640)
    rows = scene.engine.req_to_token[1:4, :701]
    assert torch.equal(rows[0, :640], rows[1, :640]) and len(rows.unique()) == 640 + 3 * 61
    assert scene.step.batch == 3 and scene.step.shared is not None and len(scene.step.shared.request) % 3 == 0
    assert len(scene.step.shared.request) > 0


def test_the_objective_is_the_distance_to_the_clusters_mean() -> None:
    keys = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [5.0, 5.0], [5.0, 7.0]]])
    assert key_objective(keys, torch.tensor([[0, 0, 1, 1]]), 3) == pytest.approx(1.0)
    assert key_objective(keys, torch.tensor([[0, 1, 2, 2]]), 3) == pytest.approx(0.5)


def test_changes_are_arms_of_ours_at_every_budget() -> None:
    changes = [{"choice_spread": 0.5}, {"candidate_tokens": 512}]
    arms = model_level.arms_of(["ours", "oracle"], [128, 256], None, changes)
    names = [arm.name for arm in arms]
    assert names[:4] == ["ours-128", "ours-256", "oracle-128", "oracle-256"]
    assert names[4:6] == ["ours-128-choice_spread 0.5", "ours-128-candidate_tokens 512"]
    assert len(names) == len(set(names))
    assert arms[5].options == {"budget_tokens": 128, "candidate_tokens": 512}
    assert [model_level.changed(arm.options) for arm in arms[3:5]] == [{}, {"choice_spread": 0.5}]


def test_bytes_are_those_of_the_servers_configuration() -> None:
    (arm,) = model_level.arms_of(["ours"], [256])

    def read(config: dict[str, Any]) -> float:
        return model_level.step_bytes(arm, model_level.Sizes(6800, 150, 64, 30, config))

    # Twice the clusters: another row of 36 bytes, a spread and an end of 2 each; 512 own mean values as before.
    assert read({"tokens_per_cluster": 4}) - read({}) == pytest.approx(6800 / 8 * (36 + 4))
    assert read({"code_bits": 1}) == pytest.approx(read({}) - 2048 * 64 / 8)


def test_an_arm_is_compared_with_ours_at_its_budget_or_at_the_same_bytes() -> None:
    options = {"budget_tokens": 256, "candidate_tokens": 2048}
    assert model_level.like_ours("oracle-256", options) == "ours-256"
    assert model_level.like_ours("ours-256-choice_spread 0.5", options) == "ours-256"
    assert model_level.like_ours("ours-256", options) is None
    published = {"budget_tokens": 576, "candidate_tokens": 2048}
    assert model_level.like_ours("published-equal-bytes-256", published) == "ours-256"


def model_level_result(folder: Path, name: str, arms: list[str], setting: str = "SmolLM2, 7000 tokens") -> Path:
    """What model_level writes, of one document."""
    document = {"arms": {arm: {"kl": [0.1]} for arm in arms}, "dense": {"surprise": [name]}, "sizes": {}}
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"setting": setting, "results": {"documents": [document]}}))
    return file


def test_results_of_one_setting_are_joined_by_their_common_arms(tmp_path: Path) -> None:
    files = [model_level_result(tmp_path, "a", ["x", "y", "z"]), model_level_result(tmp_path, "b", ["y", "z", "u"])]
    documents, setting = model_level.join(files)
    assert [list(document["arms"]) for document in documents] == [["y", "z"]] * 2
    assert setting == "SmolLM2, 7000 tokens"
    (tmp_path / "later").mkdir()
    files += [model_level_result(tmp_path / "later", "a", ["y", "u"])]  # document a again
    later = json.loads(files[-1].read_text())
    later["results"]["documents"][0]["arms"]["y"]["kl"] = [0.2]
    files[-1].write_text(json.dumps(later))
    documents, _ = model_level.join(files)
    assert [set(document["arms"]) for document in documents] == [{"y", "z", "u"}] * 2
    assert [document["arms"]["y"]["kl"] for document in documents] == [[0.2], [0.1]]
    (document,), _ = model_level.join(files, count=1)
    assert set(document["arms"]) == {"x", "y", "z", "u"}
    with pytest.raises(SystemExit, match="no policy"):
        model_level.join([*files, model_level_result(tmp_path, "c", ["v"])])
    with pytest.raises(SystemExit, match="differ"):
        model_level.join([*files, model_level_result(tmp_path, "c", ["y"], "SmolLM2, 4000 tokens")])
    (tmp_path / "d.json").write_text("{}")
    with pytest.raises(SystemExit, match="d.json is not a result"):
        model_level.join([*files, tmp_path / "d.json"])


def test_entropy_is_that_of_the_row() -> None:
    rows = np.log(np.array([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 1e-300, 1e-300]]))
    assert model_level.entropy(rows) == pytest.approx([np.log(4), np.log(2)])


def test_the_kl_of_each_token_counts_where_dense_was_as_unsure() -> None:
    def document(kl: list[float], answers: list[list[float]]) -> dict[str, Any]:
        return {
            "entropy": [0.05, 1.5, 2.3],
            "answer_entropy": [[0.1, 0.5], [2.0]],
            "arms": {"ours-128": {"kl": kl, "answer_kl": answers}},
        }

    both = [document([1, 2, 3], [[4, 5], [6]]), document([10, 20, 30], [[40, 50], [60]])]
    found = model_level.by_entropy(both, "ours-128")
    assert found == [
        {"tokens": 2, "kl": 5.5, "most": 10},
        {"tokens": 4, "kl": 24.75, "most": 50},  # a bound belongs to the column that it begins
        {"tokens": 2, "kl": 11, "most": 20},
        {"tokens": 4, "kl": 24.75, "most": 60},
    ]
    del both[1]["entropy"]  # an older result
    assert model_level.by_entropy(both, "ours-128") is None


def test_each_kind_of_text_is_what_it_says_and_the_same_again() -> None:
    for kind, holds in {documents.CODE: "\ndef ", documents.DIGITS: " "}.items():
        name, text = documents.read_kind(kind)
        assert holds in text and len(text) > 200_000
        assert documents.read_kind(kind) == (name, text)
    assert set(text) == set("0123456789 ")
    numbers = text.split()
    assert len(numbers) == documents.NUMBERS and len(set(numbers)) > 0.7 * len(numbers)
