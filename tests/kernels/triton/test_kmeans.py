"""k-means by Triton's kernels: labels, member lists and their ends, of ragged segments of all layers and heads at once.

Labels are followed pass by pass: each must name a centroid, computed in float64 from the labels before, that is nearest up
to the rounding of 16-bit mantissas. What is given to outliers is that of the reference.

Red when: a kernel reads a key of another slot, head, layer or segment, starts from other keys, breaks a tie upwards, moves an
empty cluster's centroid to a mean, gives another cluster than the one that costs least to another key than the farthest, sorts
a list unstably, writes beyond its segment, or lets a segment depend on what is built beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sglang_clusterkv.kernels.kmeans import reference
from sglang_clusterkv.kernels.kmeans import triton as kernels
from sglang_clusterkv.kernels.kmeans.triton.outliers import gain_kernel, largest_kernel
from sglang_clusterkv.kernels.kmeans.triton.segments import Clustering, Pool, pool_of, segments_of
from tests.support import exactly

GUARD = 64  # elements around a buffer
Make = Callable[..., torch.Tensor]


def pool(device: str, *, layers: int = 2, heads: int = 2, head_dim: int = 32, dtype: torch.dtype) -> list[torch.Tensor]:
    """Keys of 20 centres, with a common offset, [256 slots, H, D] per layer."""
    generator = torch.Generator().manual_seed(head_dim)
    which = torch.randint(20, (layers, 256), generator=generator)
    centres = 2 * torch.randn(20, heads, head_dim, generator=generator)
    noise = torch.randn(layers, 256, heads, head_dim, generator=generator)
    return list((centres[which] + 0.5 * noise + 3 * torch.randn(head_dim, generator=generator)).to(dtype).to(device))


def slots_of(device: str, *tokens: int) -> list[torch.Tensor]:
    """Slots of segments of these lengths, scattered over the pool."""
    order = torch.randperm(256, generator=torch.Generator().manual_seed(1)).to(device)
    return list(order[: sum(tokens)].split(list(tokens)))


def centered(buffers: list[torch.Tensor], slots: torch.Tensor) -> torch.Tensor:
    """The segment's keys relative to their mean, float64 [N, M, D]."""
    keys = torch.stack([buffer[slots] for buffer in buffers]).double().transpose(1, 2).flatten(0, 1)
    return keys - keys.mean(1, keepdim=True)


def cluster(
    buffers: list[torch.Tensor], slots: list[torch.Tensor], per_cluster: int, passes: int, outlier_share: float = 0.0
) -> Clustering:
    segments = segments_of(slots, per_cluster, outlier_share)
    return kernels.cluster(pool_of(buffers), segments, passes)


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, int]]:
    """Every buffer that the kernels' host code makes: poisoned, between two guards; (with guards, elements inside)."""
    made: list[tuple[torch.Tensor, int]] = []
    empty = torch.empty

    def poisoned(shape: tuple[int, ...], *, dtype: torch.dtype = torch.float32, device: object = None) -> torch.Tensor:
        count = torch.Size(shape).numel()
        whole = empty(count + 2 * GUARD, dtype=dtype, device=device)  # type: ignore[call-overload]
        whole.fill_(float("nan") if dtype.is_floating_point else -7)
        made.append((whole, count))
        return whole[GUARD : GUARD + count].view(shape)

    monkeypatch.setattr(torch, "empty", poisoned)
    return made


def assert_guards_hold(made: list[tuple[torch.Tensor, int]]) -> None:
    assert made, "no buffer was made"
    for whole, count in made:
        for guard in (whole[:GUARD], whole[GUARD + count :]):
            assert bool(guard.isnan().all() if guard.dtype.is_floating_point else (guard == -7).all())


def assert_nearest(keys: torch.Tensor, centroids: torch.Tensor, labels: torch.Tensor) -> None:
    """Each label's centroid is as near as the nearest, up to the rounding of products of 16-bit mantissas."""
    score = 2 * keys @ centroids.transpose(1, 2) - centroids.square().sum(-1).unsqueeze(1)
    short = score.amax(-1) - score.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    rounding = 2.0**-13 * keys.norm(dim=-1) * centroids.norm(dim=-1).amax(-1, keepdim=True)
    assert bool((short <= rounding).all()), (short - rounding).max()


def means(keys: torch.Tensor, labels: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Means of the members; an empty cluster keeps its centroid."""
    one_hot = torch.nn.functional.one_hot(labels, centroids.shape[1]).double()
    sizes = one_hot.sum(1).unsqueeze(-1)
    return torch.where(sizes > 0, one_hot.transpose(1, 2) @ keys / sizes.clamp(min=1), centroids)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "tokens"),
    [
        (32, torch.float32, (37, 80)),
        (64, torch.float16, (65,)),
        (96, torch.bfloat16, (48,)),
        (128, torch.bfloat16, (40,)),
    ],
)
def test_each_pass_assigns_to_the_nearest_centroid_and_lists_the_members(
    device: str, guarded: list[tuple[torch.Tensor, int]], head_dim: int, dtype: torch.dtype, tokens: tuple[int, ...]
) -> None:
    buffers = pool(device, layers=2 if head_dim == 32 else 1, head_dim=head_dim, dtype=dtype)
    slots = slots_of(device, *tokens)
    found = [cluster(buffers, slots, 8, passes) for passes in (1, 2, 3)]
    assert_guards_hold(guarded)
    first_token, first_cluster = 0, 0
    for segment, own in enumerate(slots):
        keys, count = centered(buffers, own), own.numel() // 8
        centroids = keys[:, reference.start_positions(own.numel(), count, keys.device)]
        for result in found:
            labels = result.labels[:, first_token : first_token + own.numel()].long()
            assert int(labels.min()) >= 0 and int(labels.max()) < count
            assert_nearest(keys, centroids, labels)
            centroids = means(keys, labels, centroids)
            members = result.members[:, first_token : first_token + own.numel()]
            torch.testing.assert_close(members.long(), labels.argsort(dim=1, stable=True), rtol=0, atol=0)
            sizes = torch.nn.functional.one_hot(labels, count).sum(1)
            ends = result.cluster_end[:, first_cluster : first_cluster + count]
            torch.testing.assert_close(ends.long(), sizes.cumsum(1), rtol=0, atol=0)
        kept = torch.stack([buffer[own] for buffer in buffers]).double().mean(1).flatten(0, 1)
        torch.testing.assert_close(found[0].center[:, segment].double(), kept, rtol=1e-5, atol=1e-5)
        first_token, first_cluster = first_token + own.numel(), first_cluster + count


@pytest.mark.parametrize(("head_dim", "dtype"), [(32, torch.float32), (96, torch.bfloat16)])
def test_the_clusters_that_cost_least_go_to_the_farthest_keys(
    device: str, guarded: list[tuple[torch.Tensor, int]], head_dim: int, dtype: torch.dtype
) -> None:
    buffers = pool(device, layers=1, head_dim=head_dim, dtype=dtype)
    slots = slots_of(device, 80, 40, 5)  # of the last one, no cluster in four
    before, after = cluster(buffers, slots, 2, 2), cluster(buffers, slots, 2, 3, 0.25)
    assert_guards_hold(guarded)
    first, clear = 0, []
    for own in slots:
        keys, count = centered(buffers, own), own.numel() // 2
        labels, last = (found.labels[:, first : first + own.numel()].long() for found in (before, after))
        start = keys[:, reference.start_positions(own.numel(), count, keys.device)]
        seen = means(keys, cluster(buffers, [own], 2, 1).labels.long(), start)
        centroids = means(keys, labels, seen)
        for n in range(len(keys)):
            rows = (x[n].cpu().numpy() for x in (keys, labels, seen, centroids))
            moved, margin = exactly.give_to_outliers(*rows, count // 4)
            clear.append(margin > 1e-4)  # else it is open which are taken
            if clear[-1]:
                assert_nearest(keys[n : n + 1], torch.from_numpy(moved)[None].to(keys.device), last[n : n + 1])
        first += own.numel()
    assert sum(clear) >= 0.6 * len(clear), clear


@pytest.mark.parametrize("wanted", [1, 7, 64])
def test_the_largest_numbers_are_found_and_listed_in_order(device: str, wanted: int) -> None:
    """More than are read in one step, with many equals, zeros and an infinity; a segment that wants none; one beside it."""
    generator = torch.Generator().manual_seed(wanted)
    numbers = torch.randint(5, (2, 2000), generator=generator) * torch.rand(2, 2000, generator=generator).round()
    numbers[0, 1500], numbers[1, 3] = float("inf"), 1e-40
    numbers = numbers.to(device)
    begin = torch.tensor([0, 1700, 1800, 2000], dtype=torch.int32, device=device)
    outliers = torch.tensor([0, wanted, wanted, 2 * wanted], dtype=torch.int32, device=device)
    gains = torch.tensor([[wanted, 0, wanted]] * 2, dtype=torch.int32, device=device)
    found = torch.full((2, 2 * wanted + 1), -7, dtype=torch.int16, device=device)
    largest_kernel[(2, 3)](numbers, begin, outliers, gains, found, 2000, 2 * wanted + 1, RANKED=1024, num_warps=4)
    assert bool((found[:, -1] == -7).all())
    for segment, (low, high) in enumerate([(0, 1700), (1800, 2000)]):
        expected = numbers[:, low:high].argsort(dim=-1, descending=True, stable=True)[:, :wanted].sort(-1).values
        assert torch.equal(found[:, segment * wanted : (segment + 1) * wanted].long(), expected)


def test_no_more_move_than_gain(device: str) -> None:
    """Sorted, the distances are larger than the costs up to the first, the third, never, always; and one may have no more."""
    distances = torch.tensor([[9.0, 1.0, 5.0, 7.0], [8.0, 8.0, 8.0, 0.0], [0.0, 0.0, 0.0, 0.0], [5.0, 6.0, 7.0, 8.0]])
    costs = torch.tensor([[float("inf"), 9.0, 2.0], [7.0, 7.5, 7.9], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    cheapness = (0x7F800000 - costs.view(torch.int32)).view(torch.float32).to(device)
    tokens, clusters, most = (torch.tensor([0, n], dtype=torch.int32, device=device) for n in (4, 3, 3))
    gains = torch.full((4, 1), -7, dtype=torch.int32, device=device)
    distances = distances.to(device)
    for limit, expected in ((3, [1, 3, 0, 3]), (2, [1, 2, 0, 2])):
        most[1] = limit
        gain_kernel[(4, 1)](distances, cheapness, tokens, clusters, most, gains, 4, 3, RANKED=1024, num_warps=4)
        assert gains[:, 0].tolist() == expected


def test_head_dim_256_and_a_few_hundred_clusters(device: str) -> None:
    buffers = pool(device, layers=1, heads=1, head_dim=256, dtype=torch.bfloat16)
    (slots,) = slots_of(device, 150)
    result = cluster(buffers, [slots], 1, 1)  # more clusters than one program lists; each key starts one
    assert result.labels[0].tolist() == list(range(150))
    assert result.members[0].tolist() == list(range(150)) and result.cluster_end[0].tolist() == list(range(1, 151))


def test_equal_keys_go_to_the_lowest_cluster_and_the_others_stay_empty(device: str) -> None:
    (buffer,) = pool(device, layers=1, dtype=torch.bfloat16)
    buffer[:] = buffer[:1].clone()
    result = cluster([buffer], slots_of(device, 64), 1, 2)  # more clusters than are compared at a time
    assert not result.labels.any()
    assert result.cluster_end.tolist() == [[64] * 64] * 2
    assert result.members.tolist() == [list(range(64))] * 2


def test_duplicate_keys_are_labelled_as_by_the_reference(device: str) -> None:
    # Five different keys, so that clusters run empty; small integers, whose sums and means are exact: ties are ties.
    (buffer,) = pool(device, layers=1, dtype=torch.float32)
    buffer[:] = buffer.round()[torch.arange(256, device=device) % 5]
    (slots,) = slots_of(device, 64)
    labels = cluster([buffer], [slots], 8, 3).labels.long()
    expected = reference.labels_of(centered([buffer], slots).float(), 8, 3)
    torch.testing.assert_close(labels, expected, rtol=0, atol=0)


def test_one_cluster_has_all_tokens(device: str) -> None:
    result = cluster(pool(device, layers=1, dtype=torch.float16), slots_of(device, 15), 8, 2)
    assert not result.labels.any() and result.cluster_end.tolist() == [[15]] * 2


def test_labels_of_nan_keys_are_addresses(device: str) -> None:
    (buffer,) = pool(device, layers=1, dtype=torch.float32)
    (slots,) = slots_of(device, 64)
    buffer[slots[3]] = float("nan")
    result = cluster([buffer], [slots], 8, 2, 0.25)
    assert int(result.labels.min()) >= 0 and int(result.labels.max()) < 8
    assert result.members.long().sort(1).values.tolist() == [list(range(64))] * 2


def test_a_segment_is_clustered_the_same_in_every_call(device: str) -> None:
    buffers = pool(device, layers=1, dtype=torch.bfloat16)
    first, second = slots_of(device, 70, 40)
    together = cluster(buffers, [first, second], 2, 3, 0.25)
    for own, begin in ((first, 0), (second, 70)):
        alone = cluster(buffers, [own], 2, 3, 0.25)
        assert torch.equal(alone.labels, together.labels[:, begin : begin + own.numel()])


def test_addresses_are_64_bits_wide(device: str) -> None:
    """Slots far beyond 2^31 elements, and a layer's offset that brings them back into the buffer."""
    (buffer,) = pool(device, layers=1, dtype=torch.bfloat16)
    (slots,) = slots_of(device, 40)
    far = 1 << 30
    segments = segments_of([slots + far], 8)
    offset = torch.tensor([-far * buffer.stride(0)], device=device)
    labels = kernels.cluster(Pool(buffer, offset), segments, 1).labels
    assert torch.equal(labels, cluster([buffer], [slots], 8, 1).labels)


def test_layers_of_different_strides_are_refused(device: str) -> None:
    narrow = torch.zeros(4, 2, 32, device=device)
    with pytest.raises(AssertionError, match="strides"):
        pool_of([narrow, torch.zeros(4, 4, 32, device=device)[:, :2]])
