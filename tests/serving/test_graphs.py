"""What SGLang's decode graphs ask of the backend, and which graph a step replays, with SGLang's own runner's parts on a CPU.

The kernels' side is tests/kernels/triton/test_graph.py. Red when: a step replays a graph that was not captured for it, a graph
holds a step that it has no room for, a captured layer takes another step's lists or hides a fault, the backend that prefills is
not prepared where its layers are captured, or a replay's dense layers are not counted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner import decode_cuda_graph_runner as sglang_runner
from sglang.srt.model_executor.runner_utils import capture_mode

from sglang_clusterkv.clusters import decoding
from sglang_clusterkv.clusters.rows import DenseReason
from sglang_clusterkv.config import ClusterKVConfig, ConfigError
from sglang_clusterkv.kernels.lists import triton as lists_triton
from sglang_clusterkv.kernels.lists.reference import sparse_step
from sglang_clusterkv.memory.step import first_requests
from sglang_clusterkv.serving import active, runtime, scheduler_hooks
from sglang_clusterkv.serving.backend import ClusterKVAttnBackend
from tests.support.scenes import Scene

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)
LENGTHS = {1: 334, 2: 601, 3: 90}  # row 3 has too few tokens to cluster
HEADS, GROUP, HEAD_DIM, CONTEXT, MOST = 2, 2, 32, 1024, 4


class Prefill(AttentionBackend):
    """Stands for SGLang's own backend: notes what it is asked for, and attends to nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.ends = SharedReadEnds.PRE_REPLAY

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.calls.append(("state", max_bs))

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 7

    def init_forward_metadata(self, forward_batch: Any) -> None:
        self.calls.append(("eager", forward_batch))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        self.calls.append(("out", in_capture, forward_batch.batch_size))

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        self.calls.append(("in",))

    def on_after_cuda_graph_warmup(self) -> None:
        self.calls.append(("warm",))

    def shared_read_ends(self, fm: ForwardMode) -> SharedReadEnds:
        return self.ends

    def forward_decode(self, q: torch.Tensor, *of: Any, **named: Any) -> torch.Tensor:
        self.calls.append(("decode", of[4]))
        return torch.zeros(q.shape[0], HEADS * GROUP * HEAD_DIM)


class Served:
    """A backend as on a GPU, over an engine on the CPU, whose lists are the definition's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, sliding: tuple[int, ...] = ()) -> None:
        monkeypatch.setattr(decoding, "takes_mixtures", lambda device: True)
        monkeypatch.setattr(decoding, "prepare", lambda *of: None)
        monkeypatch.setattr(decoding, "reserve", lambda *of: 1000)
        self.engine_calls: list[tuple[str, int]] = []  # what FlashInfer would be told
        monkeypatch.setattr(decoding, "capture", lambda *of: self.engine_calls.append(("capture", of[-1].batch)))
        monkeypatch.setattr(decoding, "replay", lambda *of: self.engine_calls.append(("replay", of[-1])))
        self.scene = Scene(CONFIG, layers=2, kv_heads=HEADS, head_dim=HEAD_DIM, context=CONTEXT)
        monkeypatch.setattr(lists_triton, "make", self.made)
        self.lengths, self.dtype = dict(LENGTHS), torch.float32
        for row, length in LENGTHS.items():
            self.scene.prefill(row, length)
        self.engine = self.scene.engine
        self.engine.begin_decode(np.array([1]), np.array([LENGTHS[1]]))
        self.lists: list[Any] = []  # that layers were given
        self.engine.sparse_decode = self.sparse_decode
        monkeypatch.setattr(runtime, "_engine", self.engine)
        monkeypatch.setattr(runtime, "_step", None)
        monkeypatch.setattr(active, "active_config", lambda: CONFIG)
        self.prefill = Prefill()
        self.backend: Any = object.__new__(ClusterKVAttnBackend)
        vars(self.backend).update(
            prefill=self.prefill, engine=self.engine, first_layer=0, _tier_prefill=None, _prefill_decodes=True,
            _longest=CONTEXT, calls_prefill=bool(sliding), _all_dense=None, _said=set(), _threads=1, _prefill_threads=1,
            token_to_kv_pool=self,
        )  # fmt: skip
        self.layers = [self.layer(number, number in sliding) for number in range(2)]
        self.written: list[int] = []
        self.fails = False

    @staticmethod
    def layer(number: int, slides: bool) -> Any:
        return SimpleNamespace(
            layer_id=number, sliding_window_size=63 if slides else -1, logit_cap=0.0, scaling=0.2,
            tp_q_head_num=HEADS * GROUP, head_dim=HEAD_DIM,
        )  # fmt: skip

    # The pool's.
    def get_kv_buffer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.scene.keys[layer], self.scene.values[layer]

    def set_kv_buffer(self, layer: Any, *of: Any) -> None:
        self.written.append(layer.layer_id)

    # The kernels'.
    def made(self, packed: Any, table: Any, page_size: int, lists: Any) -> Any:
        return first_requests(lists, packed.batch)

    def sparse_decode(self, q: torch.Tensor, keys: Any, values: Any, index: Any, layer: int, step: Any, scale: float):
        if self.fails:
            raise RuntimeError("a layer of ours")
        self.lists.append(step)
        return torch.ones_like(q)

    # SGLang's.
    def launch(self, *rows: int) -> None:
        """The scheduler launches a decode batch."""
        for row in rows:
            self.lengths[row] += 1
        runtime._step = self.scene.decode([*rows], [self.lengths[row] for row in rows])

    def forward(self, batch: int, monkeypatch: pytest.MonkeyPatch, *, shared: bool = False) -> torch.Tensor:
        """The model's layers."""
        monkeypatch.setattr("sglang_clusterkv.serving.backend.KVWriteLoc.for_layer", lambda *of: None)
        q = torch.zeros(batch, HEADS * GROUP * HEAD_DIM)
        k = torch.zeros(batch, HEADS, HEAD_DIM)
        for layer in self.layers:
            own = None if shared and layer.layer_id == 1 else k
            output = self.backend.forward_decode(q, own, own, layer, SimpleNamespace(batch_size=batch))
        return output

    def capture(self, label: str, batch: int, monkeypatch: pytest.MonkeyPatch, **how: bool) -> None:
        """What DecodeCudaGraphRunner.capture_one_shape does, one warm-up left out."""
        forward_batch = SimpleNamespace(batch_size=batch)
        capture_mode._set_capture_attention_variant(label)
        try:
            self.backend.init_forward_metadata_out_graph(forward_batch, in_capture=True)
            for _ in range(2):
                self.backend.init_forward_metadata_in_graph(forward_batch)
                self.forward(batch, monkeypatch, **how)
                self.backend.on_after_cuda_graph_warmup()
        finally:
            capture_mode._set_capture_attention_variant(None)

    def view(self, raw: int, padded: int) -> Any:
        """What the runner hands over before a replay: its own view."""
        names = (
            "seq_lens_cpu max_seq_len_host out_cache_loc_virtual kv_loc_plan kv_loc_cols max_seq_len_override spec_info "
            "lora_ids can_run_decode_cuda_graph"
        )
        batch: Any = SimpleNamespace(**dict.fromkeys(names.split()), forward_mode=ForwardMode.DECODE, seq_lens_sum=99)
        buffers: Any = SimpleNamespace(mamba_track_indices=None)
        for name in ("input_ids", "positions", "req_pool_indices", "seq_lens", "seq_lens_cpu"):
            setattr(buffers, name, torch.zeros(MOST, dtype=torch.int64))
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        return sglang_runner.build_replay_fb_view(
            batch, buffers, padded, raw, padded, None, fill, ForwardMode.DECODE, False
        )

    def label(self) -> str | None:
        """As SGLang's runner resolves it."""
        runner: Any = SimpleNamespace(attention_graph_variants=scheduler_hooks._after_graph_variants(None, object()))
        batch: Any = SimpleNamespace()
        return sglang_runner.DecodeCudaGraphRunner._resolve_attention_variant(runner, batch, MOST)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    made = Served(monkeypatch)
    made.backend.init_cuda_graph_state(MOST, MOST)
    return made


def test_the_graph_is_the_steps(served: Served) -> None:
    assert scheduler_hooks._after_graph_variants(None, object()).capture_labels == ("dense", "sparse")
    assert served.label() == "dense", "nothing was launched: SGLang's own dummy runs"
    for rows, label in (((3,), "dense"), ((1,), "sparse"), ((3, 2), "sparse"), ((3,), "dense")):
        served.launch(*rows)
        assert served.label() == label
        assert runtime.peek_step() is not None, "asking takes nothing"


def test_a_process_without_our_engine_keeps_sglangs_graphs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_engine", None)
    assert scheduler_hooks._after_graph_variants(None, object()) is None
    monkeypatch.setattr(active, "active_config", lambda: None)
    assert scheduler_hooks._after_can_run_graph(True, object(), object()) is None, "SGLang's answer stands"


def test_a_step_without_room_runs_without_a_graph_and_is_counted(served: Served) -> None:
    counted = served.engine.counters.steps_without_graph
    served.launch(1, 3)
    assert scheduler_hooks._after_can_run_graph(True, object(), object()) is True and not counted
    room = served.engine.decoding.room
    assert room is not None
    served.engine.decoding.room = room._replace(base=10)
    served.launch(1, 3)
    assert scheduler_hooks._after_can_run_graph(False, object(), object()) is False and not counted
    assert scheduler_hooks._after_can_run_graph(True, object(), object()) is False
    served.launch(3)
    assert scheduler_hooks._after_can_run_graph(True, object(), object()) is True, "a dense step has no lists of ours"
    assert counted == {"base": 1}
    assert served.engine.server_info()["steps_without_graph"] == {"base": 1}


def test_captured_layers_read_the_lists_that_steps_are_written_to(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.capture("sparse", 3, monkeypatch)
    assert len(served.lists) == 4 and all(lists is served.lists[0] for lists in served.lists)
    assert served.written == [0, 1, 0, 1] and served.prefill.calls == [("state", MOST)]
    served.launch(1, 3)
    step = runtime.peek_step()
    assert step is not None and step.sparse is not None
    assert step.sparse.pages.data_ptr() == served.lists[0].pages.data_ptr() and served.lists[0].batch == 3
    served.backend.init_forward_metadata_out_graph(served.view(2, 3))
    assert served.prefill.calls == [("state", MOST)], "nothing of it is in that graph"
    assert runtime.peek_step() is None, "a replay takes the step"


def test_whoever_attends_is_told_before_a_capture_and_a_replay_of_how_many(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashInfer has a plan for each number of requests, padding included, which the batch does not say."""
    for batch in (4, 3):
        for label in ("dense", "sparse"):
            served.capture(label, batch, monkeypatch)
    assert served.engine_calls == [("capture", 4), ("capture", 3)], "a dense step has no lists of ours"
    served.engine_calls.clear()
    for rows, raw, padded in (((1, 3), 2, 3), ((2,), 1, 4), ((3,), 1, 3)):
        served.launch(*rows)
        served.backend.init_forward_metadata_out_graph(served.view(raw, padded))
    assert served.engine_calls == [("replay", 3), ("replay", 4)]


def test_a_dense_graph_is_the_other_backends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.capture("dense", 3, monkeypatch)
    once = [("in",), ("decode", True), ("decode", True), ("warm",)]
    assert served.prefill.calls == [("state", MOST), ("out", True, 3), *once, *once]
    assert served.lists == [] and served.written == []
    served.launch(3)
    served.backend.init_forward_metadata_out_graph(served.view(1, 3))
    assert served.prefill.calls[-1] == ("out", False, 3)
    assert served.backend.get_cuda_graph_seq_len_fill_value() == 7


def test_layers_that_never_recall_are_the_other_backends_in_a_sparse_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(monkeypatch, sliding=(0,))
    served.backend.init_cuda_graph_state(MOST, MOST)
    served.capture("sparse", 3, monkeypatch)
    once = [("in",), ("decode", True), ("warm",)]
    assert served.prefill.calls[1:] == [("out", True, 3), *once, *once]
    assert served.written == [1, 1] and not served.engine.counters.dense_layer_calls
    served.launch(1, 3, 2)
    served.backend.init_forward_metadata_out_graph(served.view(3, 3))
    assert served.prefill.calls[-1] == ("out", False, 3)
    assert served.engine.counters.dense_layer_calls == {"sliding": 2}, "of the sparse requests, once per replay"


def test_a_dense_layer_that_nobody_expected_ends_the_capture(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its backend was not prepared, so a graph of it would read what some other step left."""
    with pytest.raises(RuntimeError, match="layer 1 attends densely"):
        served.capture("sparse", 2, monkeypatch, shared=True)


def test_a_fault_ends_a_capture(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    served.fails = True
    with pytest.raises(RuntimeError, match="a layer of ours"):
        served.capture("sparse", 2, monkeypatch)
    assert not served.engine.counters.faults


def eager(served: Served) -> Any:
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=2)
    served.backend.init_forward_metadata(batch)
    return batch


def test_a_fault_in_an_eager_step_leaves_the_rest_to_the_other_backend(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.launch(1, 3)
    eager(served)
    served.fails = True
    served.forward(2, monkeypatch)
    assert served.engine.counters.faults == {"layer": 1}
    names = [call[0] for call in served.prefill.calls[1:]]
    assert names == ["eager", "decode", "decode"]
    assert [call[1] for call in served.prefill.calls if call[0] == "decode"] == [False, True], "keys are written once"
    assert served.written == [0]


def test_an_eager_dense_step_is_the_other_backends(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows in ((3,), ()):  # of the scheduler, and SGLang's own
        served.prefill.calls.clear()
        runtime._step = None
        if rows:
            served.launch(*rows)
        eager(served)
        served.forward(2, monkeypatch)
        assert [call[0] for call in served.prefill.calls] == ["eager", "decode", "decode"]
    assert served.lists == [] and served.written == []


def test_rows_may_change_once_both_have_read_them(served: Served) -> None:
    ends = served.backend.shared_read_ends
    assert ends(ForwardMode.DECODE) is SharedReadEnds.IN_REPLAY
    served.prefill.ends = SharedReadEnds.POST_REPLAY
    assert ends(ForwardMode.DECODE) is SharedReadEnds.POST_REPLAY
    assert ends(ForwardMode.EXTEND) is SharedReadEnds.UNKNOWN


def test_memory_that_lacks_for_captured_steps_ends_the_start(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*of: object) -> int:
        raise torch.OutOfMemoryError("tried to allocate 3 GB")

    monkeypatch.setattr(decoding, "reserve", short)
    with pytest.raises(ConfigError, match="--mem-fraction-static or --cuda-graph-max-bs"):
        served.backend.init_cuda_graph_state(MOST, MOST)


def test_graphs_may_be_captured_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang does so for fewer or more requests: lists and counts of the first ones are given up."""
    served.backend._dense_layers[0] = DenseReason.SLIDING
    served.backend.init_cuda_graph_state(2, 2)
    served.launch(1)
    step = runtime.peek_step()
    assert step is not None and step.sparse is not None and served.backend._dense_layers == {}
    assert served.engine.decoding.room is not None and served.engine.decoding.room.batch == 2


def test_the_definition_has_what_captured_lists_have(served: Served) -> None:
    """So that a list that is added to a step cannot be left out of captured ones; what the host knows of one it cannot have."""
    borders = served.engine.decoding._borders(np.array([1]), np.array([LENGTHS[1]]), np.array([1]))
    lists = sparse_step(borders, served.scene.req_to_token, 16)._asdict()
    captured = served.engine.decoding.captured(1)._asdict()
    for name, value in lists.items():
        assert name in ("lengths", "shared") or value is None or type(value) is type(captured[name]), name
