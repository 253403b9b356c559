"""What Triton's kernels write of a segment: rows, spreads, ends, vectors, member lists and codes, in the index's arrays.

The arrays are poisoned and compared whole with what the torch references write from the same labels, so every byte outside
of the segments' rows must be as it was.

Red when: a kernel writes beside its rows, packs a format in another order, rounds another way, reads another
slot, head or layer, or describes an empty cluster otherwise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_clusterkv.clusters import build
from sglang_clusterkv.config import ClusterKVConfig
from sglang_clusterkv.kernels.encode import reference as encode_reference
from sglang_clusterkv.kernels.encode.triton.clusters import describe_kernel
from sglang_clusterkv.kernels.kmeans import reference as kmeans_reference
from sglang_clusterkv.memory import movement
from sglang_clusterkv.memory.device import Geometry
from sglang_clusterkv.memory.index import ClusterIndex

PAGE, PAGES, POISON = 16, 24, 0xA5
Buffers = list[torch.Tensor]


def poisoned_index(config: ClusterKVConfig, layers: int, heads: int, head_dim: int, device: str) -> ClusterIndex:
    index = ClusterIndex(config, Geometry(layers, heads, head_dim, PAGE, PAGES), device)
    for name, array in index.arrays.items():
        if name != "page_state":
            array.view(torch.uint8).fill_(POISON)
    return index


def buffers(layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: str, seed: int) -> Buffers:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(layers, PAGES * PAGE, heads, head_dim, generator=generator) + 1.5
    return list(rows.to(dtype).to(device))


def segments(device: str, *pages: int) -> list[torch.Tensor]:
    """Slots of segments of so many pages, which are scattered over the pool."""
    order = torch.randperm(PAGES - 1, generator=torch.Generator().manual_seed(3))[: sum(pages)] + 1
    slots = (order.unsqueeze(1) * PAGE + torch.arange(PAGE)).to(device)
    return [part.flatten() for part in slots.split(list(pages))]


def write_by_reference(
    monkeypatch: pytest.MonkeyPatch, index: ClusterIndex, slots: torch.Tensor, keys: Buffers, values: Buffers,
    labels: torch.Tensor,
) -> None:  # fmt: skip
    """Write one segment as `build_segments` does with the torch references, from given labels."""
    with monkeypatch.context() as patched:
        patched.setattr(build.kmeans, "labels_of", lambda *_: labels)
        patched.setattr(build.kmeans, "sum_by_label", kmeans_reference.sum_by_label)
        patched.setattr(build.encode, "within_variance", encode_reference.within_variance)
        patched.setattr(build.encode, "token_codes", encode_reference.token_codes)
        parts = [
            build._heads_first(buffers, slots, [None] * len(keys), part) for part, buffers in enumerate((keys, values))
        ]
        tables = build.cluster_segment(index, *parts)
    build._write(index, slice(0, len(keys)), slots[::PAGE] // PAGE, slots, tables)


def labels_written(index: ClusterIndex, slots: torch.Tensor) -> torch.Tensor:
    """Labels of a segment's tokens by the index's member lists, int64 [N, M]."""
    rows = index.cluster_rows(slots[::PAGE] // PAGE).flatten()
    members = index.arrays["members"][:, slots].transpose(1, 2).flatten(0, 1).long()
    ends = index.arrays["cluster_end"][:, rows].transpose(1, 2).flatten(0, 1).long().contiguous()
    position = torch.arange(slots.numel(), device=slots.device).expand_as(members).contiguous()
    return torch.zeros_like(members).scatter_(1, members, torch.searchsorted(ends, position, right=True))


def assert_equal_up_to_ties(actual: ClusterIndex, expected: ClusterIndex) -> None:
    """Integers are equal; rounded values may differ by one step, and only rarely (sums run in another order)."""
    for name in ("cluster_end", "members", "page_state"):
        assert torch.equal(actual.arrays[name], expected.arrays[name]), name
    rows = ("key_rows", "key_scales", "value_rows", "value_scales")
    for name in (*rows, "spread", "segment_vectors", "codes", "code_scales"):
        if name not in expected.arrays:
            continue
        ours, right = (index.arrays[name].view(torch.uint8) for index in (actual, expected))
        assert (ours != right).float().mean() < 2e-3, name
        untouched = (right == POISON).all(-1)
        assert (ours[untouched] == POISON).all(), f"{name}: written beside its rows"
    for name in ("key_scales", "value_scales", "spread", "segment_vectors", "code_scales"):
        if name in expected.arrays:
            torch.testing.assert_close(actual.arrays[name], expected.arrays[name], rtol=2.0**-7, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "centroid_dtype", "bits", "layers", "pages"),
    [
        (32, torch.float32, "int4", 2, 2, (4,)),
        (64, torch.float16, "int8", 1, 1, (4, 5)),
        (96, torch.bfloat16, "int4", 1, 1, (4,)),
        (80, torch.bfloat16, "bf16", 2, 1, (4,)),
        (128, torch.bfloat16, "int4", 2, 1, (4,)),
        (256, torch.bfloat16, "int8", 2, 1, (4,)),
        (16, torch.float32, "int4", 2, 1, (4,)),  # one scale per row
    ],
)
def test_the_index_holds_what_the_reference_writes(
    device: str, monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype, centroid_dtype: str, bits: int,
    layers: int, pages: tuple[int, ...],
) -> None:  # fmt: skip
    config = ClusterKVConfig(centroid_dtype=centroid_dtype, code_bits=bits)
    heads = 2 if head_dim < 80 else 1
    actual, expected = (poisoned_index(config, layers, heads, head_dim, device) for _ in range(2))
    keys, values = (buffers(layers, heads, head_dim, dtype, device, seed) for seed in (0, 1))
    slots = segments(device, *pages)
    build.write_in_place(actual, slots, keys, values)
    for own in slots:
        write_by_reference(monkeypatch, expected, own, keys, values, labels_written(actual, own))
    assert_equal_up_to_ties(actual, expected)


@pytest.mark.parametrize(("head_dim", "layers", "pages"), [(64, 2, (4, 7)), (96, 1, (13,))])
def test_values_move_by_what_the_reference_writes(
    device: str, monkeypatch: pytest.MonkeyPatch, head_dim: int, layers: int, pages: tuple[int, ...]
) -> None:
    """Of segments with no component, with some, and with all. What the rows make together: a row's sign may differ."""
    config = ClusterKVConfig(moving_values="always")
    actual, expected = (poisoned_index(config, layers, 2, head_dim, device) for _ in range(2))
    keys, values = (buffers(layers, 2, head_dim, torch.bfloat16, device, seed) for seed in (0, 1))
    slots = segments(device, *pages)
    build.write_in_place(actual, slots, keys, values)
    for own in slots:
        write_by_reference(monkeypatch, expected, own, keys, values, labels_written(actual, own))
        behind = own[::PAGE][4:12] // PAGE
        products = []
        for index in (actual, expected):
            meets, adds = movement.unpack(index.arrays["segment_vectors"][:, behind])
            products.append(torch.einsum("lrhd,lrhe->lhde", meets, adds))
        assert products[1].abs().max() > 0.01 or len(own) <= 4 * PAGE
        torch.testing.assert_close(*products, atol=2e-3, rtol=2e-2)
        for index in (actual, expected):
            index.arrays["segment_vectors"][:, behind] = 0
    assert_equal_up_to_ties(actual, expected)


def test_equal_keys_leave_empty_clusters_as_the_reference_stores_them(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ClusterKVConfig()
    actual, expected = (poisoned_index(config, 1, 2, 32, device) for _ in range(2))
    keys, values = (buffers(1, 2, 32, torch.float32, device, seed) for seed in (0, 1))
    keys[0][:] = keys[0][:1].bfloat16().float()  # the mean is then the key: residuals and variances are zero
    (slots,) = segments(device, 4)
    write_by_reference(monkeypatch, expected, slots, keys, values, torch.zeros(2, 64, dtype=torch.int64, device=device))
    build.write_in_place(actual, [slots], keys, values)
    assert_equal_up_to_ties(actual, expected)


def test_without_codes_none_are_written(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterKVConfig(refine=False)
    actual, expected = (poisoned_index(config, 1, 2, 32, device) for _ in range(2))
    keys, values = (buffers(1, 2, 32, torch.bfloat16, device, seed) for seed in (0, 1))
    (slots,) = segments(device, 4)
    build.write_in_place(actual, [slots], keys, values)
    write_by_reference(monkeypatch, expected, slots, keys, values, labels_written(actual, slots))
    assert_equal_up_to_ties(actual, expected)


def test_layers_without_clusters_are_left_out(device: str) -> None:
    """The layers that recall, of more, get what they would get alone."""
    config = ClusterKVConfig()
    part = ClusterIndex(config, Geometry(4, 1, 32, PAGE, PAGES, clustered=(1, 3)), device)
    alone = ClusterIndex(config, Geometry(2, 1, 32, PAGE, PAGES), device)
    keys, values = (buffers(4, 1, 32, torch.bfloat16, device, seed) for seed in (0, 1))
    (slots,) = segments(device, 4)
    build.write_in_place(part, [slots], keys, values)
    build.write_in_place(alone, [slots], [keys[1], keys[3]], [values[1], values[3]])
    for name, array in part.arrays.items():
        assert torch.equal(array.view(torch.uint8), alone.arrays[name].view(torch.uint8)), name
    assert part.arrays["members"][:, slots].any(1).all(), "both were written"


def test_a_strided_pool_is_read_where_it_lies(device: str) -> None:
    """SGLang's keys and values may be halves of one allocation."""
    config = ClusterKVConfig()
    apart, together = (poisoned_index(config, 1, 2, 32, device) for _ in range(2))
    keys, values = (buffers(1, 2, 32, torch.bfloat16, device, seed) for seed in (0, 1))
    both = torch.cat((keys[0], values[0]), -1)
    (slots,) = segments(device, 4)
    build.write_in_place(apart, [slots], keys, values)
    build.write_in_place(together, [slots], [both[..., :32]], [both[..., 32:]])
    for name, array in apart.arrays.items():
        assert torch.equal(array.view(torch.uint8), together.arrays[name].view(torch.uint8)), name


def test_segments_of_a_call_share_its_launches_and_its_scratch_is_bounded(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many segments; `tokens_per_call` counts every byte that is made for a token."""
    config = ClusterKVConfig()
    index = poisoned_index(config, 2, 2, 128, device)
    keys, values = (buffers(2, 2, 128, torch.bfloat16, device, seed) for seed in (0, 1))
    launches, scratch = [], []
    kind, empty = type(describe_kernel), torch.empty

    def made(*sizes: Any, **how: Any) -> torch.Tensor:
        tensor = empty(*sizes, **how)
        scratch.append(tensor.nbytes)
        return tensor

    def count(*pages: int) -> tuple[int, int]:
        launches.clear()
        scratch.clear()
        with monkeypatch.context() as patched:
            patched.setattr(kind, "run", lambda kernel, *of, **named: launches.append(kernel))
            patched.setattr(torch, "empty", made)
            build.write_in_place(index, segments(device, *pages), keys, values)
        return len(launches), sum(scratch)

    alone, together = count(8), count(8, 8)
    assert alone[0] == together[0] == 19
    bounded = build.SCRATCH_BYTES / build.tokens_per_call(index, copied=False)  # of a token
    assert 0.8 < together[1] / (16 * PAGE * bounded) < 1.05, "and a few bytes of a segment"
