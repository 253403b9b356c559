"""The estimate's kernels give what the torch reference gives.

Red when: a row of another cluster, head or segment is read or unpacked wrongly, the choice of clusters with their own mean
value differs (ties included), a cluster counts twice or not at all, what is left of it is miscounted, an empty part is not
weightless, poison gets into a sum, or something is written outside its tensor.
"""

from __future__ import annotations

import msgspec
import pytest
import torch

from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels import grids
from sglang_clusterkv.kernels.estimate import triton as estimate_triton
from sglang_clusterkv.kernels.estimate import triton_own
from sglang_clusterkv.kernels.merge.reference import Partial
from tests.support.filled import FAR, SCALE, Filled, assert_close, merged, of_request

CONFIG = ClusterKVConfig(budget_tokens=48, candidate_tokens=160, segment_tokens=256, estimate_clusters=20)


def config_of(**fields: object) -> ClusterKVConfig:
    return msgspec.structs.replace(CONFIG, **fields)


def estimated(filled: Filled) -> Partial:
    """Launch; its parts as one."""
    decoder = filled.decoder
    clusters = estimate_triton.listed_clusters(filled.index, filled.step)
    if triton_own.is_limited(clusters, filled.config.estimate_clusters):
        triton_own.choose_own(filled.index, filled.step, decoder.workspace)
    decoder.estimate(filled.q, 0, SCALE)
    filled.guarded.assert_untouched()
    return merged(*decoder.workspace.rest(filled.step.batch, sum(decoder.parts)))


def assert_is_reference(filled: Filled) -> None:
    result, expected = estimated(filled), filled.estimated()
    assert_close(result.output, expected.output, filled.dtype)
    assert_close(result.lse, expected.lse, filled.dtype)


@pytest.mark.parametrize(
    ("centroid_dtype", "head_dim", "group", "dtype"),
    [
        ("int4", 64, 1, torch.float32),
        ("int4", 64, 3, torch.bfloat16),
        ("int8", 64, 4, torch.float16),
        ("bf16", 64, 7, torch.float32),
        ("int4", 96, 8, torch.float32),
        ("int8", 96, 3, torch.float32),
        ("int4", 128, 4, torch.bfloat16),
        ("int4", 256, 1, torch.float32),
    ],
)
def test_the_estimate_equals_the_reference(
    centroid_dtype: str, head_dim: int, group: int, dtype: torch.dtype, device: str
) -> None:
    filled = Filled(config_of(centroid_dtype=centroid_dtype), device, head_dim=head_dim, group=group, dtype=dtype)
    assert filled.decoder.parts.rest > 0
    assert_is_reference(filled)


MOVING = {"moving_values": "always"}


@pytest.mark.parametrize(
    ("fields", "head_dim", "group", "dtype"),
    [
        ({}, 64, 3, torch.float32),
        ({"centroid_dtype": "bf16", "estimate_codes": False}, 96, 1, torch.float32),
        ({"estimate_clusters": 40}, 128, 4, torch.bfloat16),
        ({}, 256, 1, torch.float32),
        ({"estimate_clusters": 10_000}, 64, 1, torch.float32),
        ({"segment_tokens": 128, "recluster_every": 128}, 32, 8, torch.float32),
    ],
)
def test_values_move_with_the_query(
    fields: dict[str, object],
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of clusters with their own mean value too, and where there are no others; of segments with few components, too."""
    monkeypatch.setattr(estimate_triton, "REST_CLUSTERS", 32)  # several tiles, with borders inside segments
    filled = Filled(config_of(**MOVING, **fields), device, head_dim=head_dim, group=group, dtype=dtype)
    assert filled.decoder.parts.rest > 0
    still = config_of(**fields)
    moving, filled.index.config = filled.index.config, still
    without = filled.estimated().output
    filled.index.config = moving
    assert (filled.estimated().output - without).abs().max() > 0.01, "nothing moves"
    assert_is_reference(filled)


def test_nothing_left_moves_nothing(device: str) -> None:
    filled = Filled(config_of(**MOVING), device)
    everything_recalled(filled)
    result = estimated(filled)
    assert (result.lse[1] == -torch.inf).all() and (result.output[1] == 0).all()


@pytest.mark.parametrize("fields", [{"estimate_codes": False}, {"refine": False}, {"code_bits": 1}])
def test_logits_are_those_of_means_or_of_codes(fields: dict[str, object], device: str) -> None:
    assert_is_reference(Filled(config_of(**fields), device, group=1))


@pytest.mark.parametrize("limit", [1, 40, 100, 10_000])
def test_any_number_of_own_values_is_right(limit: int, device: str) -> None:
    """40: more than the shorter request has, fewer than the other."""
    filled = Filled(config_of(estimate_clusters=limit), device)
    assert (filled.decoder.parts.rest > 0) == (limit < 64), "requests have 64 clusters at most"
    assert_is_reference(filled)


def test_several_tiles_of_own_values_give_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_triton, "own_clusters", lambda _: 16)
    assert_is_reference(Filled(config_of(estimate_clusters=10_000), device, group=1))


@pytest.mark.parametrize(("least_own", "least_rest"), [(5, 1000), (20, 16)])
def test_any_parts_give_the_same(least_own: int, least_rest: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grids, "LEAST_OWN", least_own)
    monkeypatch.setattr(grids, "LEAST_REST", least_rest)
    assert_is_reference(Filled(CONFIG, device, group=1))


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every request had more masses than a program holds, and they were read a few at a time."""
    monkeypatch.setattr(triton_own, "HELD", (1, 1, 1))
    monkeypatch.setattr(triton_own, "BLOCK", 16)


def test_masses_that_no_program_can_hold_are_read_again(in_memory: None, device: str) -> None:
    assert_is_reference(Filled(CONFIG, device, group=1))


def test_the_own_clusters_are_the_references(device: str) -> None:
    """The list itself: the clusters with the most mass."""
    filled = Filled(CONFIG, device)
    estimated(filled)
    mass = filled.scores.estimate_mass * filled.recalled.left
    best = mass.argsort(dim=-1, descending=True, stable=True)[..., :20].sort(-1).values
    assert filled.decoder.workspace.own[:2].tolist() == best.tolist()


@pytest.mark.parametrize("held", [True, False])
def test_ties_go_to_the_lower_place(held: bool, device: str, request: pytest.FixtureRequest) -> None:
    heads = 2
    if not held:
        request.getfixturevalue("in_memory")
        heads = 1  # whose masses the interpreter reads again for each bit
    filled = Filled(CONFIG, device, group=1, kv_heads=heads)
    w, own = filled.decoder.workspace, int(filled.step.page_count[1]) * 2
    # All clusters are alike but for three; one of the others has nothing left, so it is not among the first.
    w.segment_bonus[1] = 0.0
    of_request(w, w.dot, 1, own)[:] = 1.0
    of_request(w, w.estimate_mass, 1, own)[:] = 0.25
    left = of_request(w, w.left, 1, own)
    left[:] = 8
    left[:, [0, 5, own - 1]] = torch.tensor([0, 16, 9], dtype=torch.int32, device=device)
    result = estimated(filled)
    assert w.own[1].tolist() == [[*range(1, 20), own - 1]] * heads
    tokens = left.sum(-1, keepdim=True)  # each counts once, at its own value or at its segment's
    assert_close(result.lse[1], 1.0 + tokens.double().log(), torch.float32)


def test_masses_of_nothing_are_taken_in_order(device: str) -> None:
    filled = Filled(CONFIG, device, group=1)
    w = filled.decoder.workspace
    of_request(w, w.estimate_mass, 1, int(filled.step.page_count[1]) * 2)[:] = 0.0
    estimated(filled)
    assert filled.decoder.workspace.own[1].tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_masses_that_are_no_numbers_are_taken_in_order(value: float, device: str) -> None:
    """A GPU's NaN would be the largest of all by its bits, and a list that is made by bits would stay unwritten."""
    filled = Filled(CONFIG, device, group=1)
    w, clusters = filled.decoder.workspace, int(filled.step.page_count[1]) * 2
    of_request(w, w.estimate_mass, 1, clusters)[:] = value
    of_request(w, w.left, 1, clusters)[:] = 8
    of_request(w, w.left, 1, clusters)[:, 3] = 0
    estimated(filled)
    assert w.own[1].tolist() == [[0, 1, 2, *range(4, 21)]] * 2


def everything_recalled(filled: Filled) -> None:
    """As if every token of request 1 and head 0 of request 0 had been recalled."""
    w = filled.decoder.workspace
    first, second = (of_request(w, w.left, b, int(filled.step.page_count[b]) * 2) for b in range(2))
    first[0] = 0
    second[:] = 0


@pytest.mark.parametrize("limit", [20, 100, 10_000])
def test_nothing_left_weighs_nothing(limit: int, device: str) -> None:
    filled = Filled(config_of(estimate_clusters=limit), device)
    everything_recalled(filled)
    result, expected = estimated(filled), filled.estimated()
    empty = torch.zeros(2, 2, dtype=torch.bool, device=device)
    empty[1], empty[0, 0] = True, True
    assert (result.lse[empty] == -torch.inf).all() and (result.output[empty] == 0).all()
    assert_close(result.output[~empty], expected.output[~empty], torch.float32)


@pytest.mark.parametrize("centroid_dtype", ["int4", "bf16"])
def test_rows_of_which_nothing_is_left_are_not_read(centroid_dtype: str, device: str) -> None:
    """An empty cluster's row holds anything; its scales, or itself in bf16, may be no numbers."""
    filled = Filled(config_of(centroid_dtype=centroid_dtype, estimate_clusters=10_000), device)
    view = filled.index.layer(0)
    numbers = view.value_rows.view(torch.bfloat16) if view.value_scales is None else view.value_scales
    w, left = filled.decoder.workspace, filled.recalled.left
    for b in range(2):
        rows = filled.index.cluster_rows(filled.step.pages[b]).flatten()
        gone = (left[b] == 0).all(0)[: len(rows)]
        gone[1] = True
        numbers[rows[gone]] = torch.nan
        of_request(w, w.left, b, len(rows))[:, 1] = 0
        left[b, :, 1] = 0
    result = estimated(filled)
    assert_close(result.lse, filled.estimated().lse, torch.float32)
    assert result.output.isfinite().all()


def test_short_segments_are_summed_apart(device: str) -> None:
    """Segments of 4 pages, so that a tile touches many."""
    filled = Filled(config_of(segment_tokens=64, recluster_every=64, estimate_clusters=3), device, group=1)
    assert int(filled.step.segment_count.max()) > 6
    assert_is_reference(filled)


def test_padding_is_poison() -> None:
    """What the tests above rely on."""
    filled = Filled(CONFIG, "cpu")
    w, own = filled.decoder.workspace, int(filled.step.page_count[0]) * 2
    whole = int(w.offset[1])
    assert whole > own
    assert of_request(w, w.dot, 0, whole)[..., own:].isnan().all()
    assert (of_request(w, w.left, 0, whole)[..., own:] == FAR).all()
