"""The float64 oracle (exactly.py) does what it says.

It is the measure of the engine, so it is held against what needs no design: dense attention, plain loops, hand counts.

Red when: a stage of the oracle loses one of its own properties (float64, orthogonal rotation, slice order, least
squares, ties to the lower position, sizes that add up, everything recalled = dense attention, est = all tokens one by
one).
"""

import math

import numpy as np
import pytest

from tests.support import exactly as ex

HEAD_DIMS = (16, 64, 80, 96, 128, 256)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def random_signs(rng: np.random.Generator, head_dim: int) -> np.ndarray:
    return rng.choice([-1.0, 1.0], size=head_dim)


def some_request(rng: np.random.Generator, head_dim: int = 32, heads: int = 3, tokens: int = 240):
    """q, keys, values (bf16), scale: keys in loose groups around a large mean, as real keys are."""
    groups = rng.normal(size=(12, head_dim))
    keys = groups[rng.integers(12, size=tokens)] + 0.4 * rng.normal(size=(tokens, head_dim)) + 3
    values = rng.normal(size=(tokens, head_dim))
    q = 2 * rng.normal(size=(heads, head_dim))
    return ex.bf16(q), ex.bf16(keys), ex.bf16(values), head_dim**-0.5


SEGMENTS = [(16, 128), (128, 192)]  # of the 240 tokens: 16 sinks, a window of 48


# ---- rounding and rotation


def test_bf16_is_the_bit_rounding_of_float32(rng):
    x = (rng.normal(size=4096) * 10.0 ** rng.integers(-40, 38, size=4096)).astype(np.float32)
    x[:256] = (np.arange(0x3F80, 0x3F80 + 256, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # halfway cases
    x[256:260] = [0.0, -0.0, np.inf, np.finfo(np.float32).max]
    bits = x.view(np.uint32).astype(np.uint64)
    expected = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16) << np.uint64(16)
    np.testing.assert_array_equal(ex.bf16(x), expected.astype(np.uint32).view(np.float32).astype(np.float64))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotation_is_orthogonal_and_stays_in_its_block(rng, head_dim):
    signs = random_signs(rng, head_dim)
    rotation = ex.hadamard_rotation(head_dim, signs)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(head_dim), atol=1e-12)
    block = {80: 16, 96: 32}.get(head_dim, head_dim)
    for i in range(0, head_dim, 5):
        for j in range(0, head_dim, 3):
            sylvester = (-1) ** bin((i % block) & (j % block)).count("1")
            expected = sylvester * signs[j] / math.sqrt(block) if i // block == j // block else 0.0
            assert rotation[i, j] == pytest.approx(expected, abs=1e-15)


# ---- k-means


def test_kmeans_keeps_the_start_rule_and_assigns_to_the_nearest(rng):
    keys = ex.bf16(rng.normal(size=(96, 32)))
    result = ex.kmeans_labels(keys, keys.mean(0), tokens_per_cluster=8)
    assert result.centroids.shape == (3, 12, 32)
    np.testing.assert_allclose(result.centroids[0], keys[::8] - keys.mean(0))
    nearest = np.linalg.norm((keys - keys.mean(0))[:, None] - result.centroids[2], axis=-1).argmin(1)
    np.testing.assert_array_equal(result.labels, nearest)
    before = ex.kmeans_labels(keys, keys.mean(0), tokens_per_cluster=8, passes=2)
    members = (keys - keys.mean(0))[before.labels == 4]
    np.testing.assert_allclose(result.centroids[2][4], members.mean(0), rtol=1e-12, atol=1e-12)
    after = ex.kmeans_labels(keys, keys.mean(0), tokens_per_cluster=8, passes=4)
    for other in (before, after):
        assert not np.array_equal(other.labels, result.labels)  # so the number of passes can be told


def test_kmeans_does_not_depend_on_the_mean_it_subtracts(rng):
    _, keys, _, _ = some_request(rng, tokens=128)
    at_mean = ex.kmeans_labels(keys, ex.bf16(keys.mean(0)), 8).labels
    np.testing.assert_array_equal(at_mean, ex.kmeans_labels(keys, np.zeros(32), 8).labels)


def test_start_of_a_segment_that_does_not_divide_is_floored():
    keys = np.arange(10.0)[:, None]
    np.testing.assert_array_equal(ex.start_centroids(keys, 4)[:, 0], [0, 2, 5, 7])


def test_equal_keys_go_to_the_lower_cluster_and_leave_the_other_empty():
    keys = np.repeat(np.array([[1.0, 0.0], [1.0, 0.0], [-2.0, 1.0]]), 2, axis=0)
    result = ex.kmeans_labels(keys, keys.mean(0), tokens_per_cluster=2)
    np.testing.assert_array_equal(result.labels, [0, 0, 0, 0, 2, 2])
    np.testing.assert_array_equal(result.centroids[2][1], result.centroids[0][1])  # kept, not lost
    statistics = ex.cluster_statistics(keys, keys, result.labels, 3)
    np.testing.assert_array_equal(statistics.size, [4, 0, 2])
    assert np.all(statistics.spread == 0) and np.all(statistics.segment_variance == 0)


def test_what_a_cluster_costs_to_leave():
    centroids = np.array([[0.0], [10.0], [13.0], [20.0], [21.0]])
    # 1 is the largest; 3 and 4 are equally large, so 3 counts as the larger; 2 is empty.
    np.testing.assert_array_equal(ex.costs_to_leave(np.array([3, 5, 0, 2, 2]), centroids), [300, np.inf, 0, 200, 2])


def test_the_clusters_that_cost_least_go_to_the_farthest_keys():
    keys = np.array([0.0, 10.0, 90.0, 150.0, 141.0, 165.0, 240.0, 241.0])[:, None]
    labels = np.array([0, 0, 0, 1, 2, 2, 3, 3])
    centroids = ex.update_centroids(keys, labels, np.zeros((4, 1)))  # 100 / 3, 150, 153, 240.5
    one = ex.give_to_outliers(keys, labels, centroids, centroids, 1)  # 1 costs 9
    np.testing.assert_allclose(one.centroids[:, 0], [100 / 3, 90, 153, 240.5])
    two = ex.give_to_outliers(keys, labels, centroids, centroids, 2)  # 3 costs too much
    np.testing.assert_array_equal(two.centroids, one.centroids)
    gaps = [(90 - 100 / 3) ** 2 - (100 / 3) ** 2, (90 - 100 / 3) ** 2 - 9]
    assert two.margin == pytest.approx(min(gaps) / 241**2)
    seen = np.array([[10.0], [0.0], [153.0], [240.5]])  # by what was assigned to, not by the means
    np.testing.assert_allclose(ex.give_to_outliers(keys, labels, seen, centroids, 1).centroids[1], keys[3])
    none = ex.give_to_outliers(keys, labels, centroids, centroids, 0)
    np.testing.assert_array_equal(none.centroids, centroids)
    assert none.margin == np.inf


def test_the_first_of_equal_keys_and_clusters_move():
    keys = np.array([-1.0, 1.0, 5.0, 7.0])[:, None]
    tied = ex.give_to_outliers(
        keys, np.array([0, 0, 3, 3]), np.array([[0.0], [2.0], [4.0], [6.0]]), np.zeros((4, 1)), 1
    )
    np.testing.assert_allclose(tied.centroids[:, 0], [0, -1, 0, 0])  # 1 and 2 are empty
    assert tied.margin == 0


def test_an_outlier_has_a_cluster_of_its_own(rng):
    keys = 0.1 * rng.normal(size=(128, 32))
    places = [72, 74, 75, 76, 77]  # key 72 starts a cluster
    keys[places] += 2 * np.eye(5, 32)
    without, given = (ex.kmeans_labels(keys, keys.mean(0), 8, outliers=count).labels for count in (0, 4))
    assert np.bincount(given)[given[places]].tolist() == [1] * 5  # those too that had one before
    assert np.sum(np.bincount(without)[without[places]] == 1) < 5


def test_slack_is_zero_for_the_best_label_and_counts_for_another():
    scores = np.array([[1.0, 4.0, 3.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(ex.assignment_slack(scores, ex.assign(scores)), [0, 0])
    np.testing.assert_array_equal(ex.assignment_slack(scores, np.array([2, 2])), [0.25, 0])


def test_statistics_add_up(rng):
    _, keys, values, _ = some_request(rng, tokens=128)
    labels = ex.kmeans_labels(keys, keys.mean(0), 8).labels
    s = ex.cluster_statistics(keys, values, labels, 16)
    assert s.size.sum() == 128
    np.testing.assert_array_equal(np.sort(np.concatenate(s.members)), np.arange(128))
    assert all(np.all(np.diff(m) > 0) for m in s.members)
    np.testing.assert_allclose(s.size @ s.centroid / 128, s.segment_mean_key)
    np.testing.assert_allclose(s.size @ s.mean_value / 128, s.segment_mean_value)
    within = sum(((keys[m] - keys[m].mean(0)) ** 2).sum(0) for m in s.members if len(m))
    np.testing.assert_allclose(s.segment_variance, within / 128)
    assert s.size @ s.spread / 128 == pytest.approx(1)  # the mean spread of a token's cluster


# ---- rows


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_packing_goes_by_slices_and_back(rng, head_dim):
    values = rng.integers(-8, 8, size=head_dim)
    words = ex.pack_int4(values)
    assert words.dtype == np.uint32 and words.shape == (head_dim // 8,)
    for i in range(head_dim // 8):
        for j in range(8):
            assert (int(words[i]) >> (4 * j)) & 15 == values[j * head_dim // 8 + i] % 16
    np.testing.assert_array_equal(ex.unpack_int4(words), values)


def test_groups_are_whole_slices():
    groups = {16: 16, 32: 32, 48: 24, 64: 32, 80: 20, 96: 24, 112: 28, 128: 32, 192: 24, 256: 32}
    for head_dim, group in groups.items():
        assert ex.group_channels(head_dim) == group
        assert group % (head_dim // 8) == 0 and head_dim % group == 0
    with pytest.raises(AssertionError):
        ex.group_channels(72)


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_rows_round_to_the_nearest_half_to_even(rng, bits):
    top = {4: 7, 8: 127}[bits]
    x = rng.normal(size=128) * np.repeat([1.0, 100.0, 0.01, 0.0], 32)
    row = ex.encode_int(x, bits)
    assert row.scale[3] == 0 and np.all(row.values[96:] == 0)
    np.testing.assert_array_equal(row.scale, ex.bf16(np.abs(x).reshape(4, 32).max(1) / top))
    error = np.abs(ex.decode_int(row.values, row.scale) - x)
    assert np.all(error <= 0.51 * np.repeat(row.scale, 32))  # .01 for the clamp, where the scale was rounded down
    halves = np.concatenate([[top], np.arange(15) - 7.5 if bits == 8 else np.arange(13) - 6.5])
    row = ex.encode_int(np.resize(halves, 16), bits)
    assert row.scale[0] == 1
    np.testing.assert_array_equal(row.values[1:13] % 2, 0)


def test_a_stored_centroid_is_relative_to_the_stored_mean(rng):
    mean = ex.bf16(100 + rng.normal(size=64))
    centroid = mean + 0.01 * rng.normal(size=64)
    for dtype, error in (("int4", 0.003), ("int8", 2e-4), ("bf16", 2e-4), ("exact", 1e-12)):
        assert np.abs(ex.store_centroid(centroid, mean, dtype) - centroid).max() < error


# ---- codes


@pytest.mark.parametrize("bits", [1, 2])
def test_the_scale_of_a_code_is_least_squares(rng, bits):
    y = rng.normal(size=64)
    code = ex.encode_code(y, bits)
    levels = ex.code_levels(code.codes, bits)
    scale = ex.code_scale(y, levels)
    assert code.scale == ex.bf16(scale)
    assert (y - scale * levels) @ levels == pytest.approx(0, abs=1e-12)
    best = np.sum((y - scale * levels) ** 2)
    assert all(np.sum((y - factor * scale * levels) ** 2) > best for factor in (0.99, 1.01))
    if bits == 1:
        assert scale == pytest.approx(np.abs(y).mean())
    # a normal variable keeps 1 - 2/pi of its power with one bit, .1175 with two (Max, 1960)
    error = [np.mean((y - ex.decode_code(*ex.encode_code(y, bits), bits)) ** 2) for y in rng.normal(size=(400, 64))]
    assert np.mean(error) == pytest.approx({1: 1 - 2 / math.pi, 2: 0.1175}[bits], rel=0.06)


def test_codes_at_the_borders():
    y = np.array([0.0, -0.0, 1.0, -1.0, 0.9, -0.9, 1.2, -1.2])
    y[6:] *= math.sqrt((8 - 2 * 1 - 2 * 0.81) / 2) / 1.2  # rms 1
    code = ex.encode_code(y, 2)
    levels = [ex.CODE_INNER, ex.CODE_INNER, 1.51, -1.51, ex.CODE_INNER, -ex.CODE_INNER, 1.51, -1.51]
    np.testing.assert_array_equal(ex.code_levels(code.codes, 2), levels)
    np.testing.assert_array_equal(ex.code_levels(ex.encode_code(y, 1).codes, 1), [1, 1, 1, -1, 1, -1, 1, -1])
    np.testing.assert_array_equal(ex.code_is_close(y, 2, 0.05), [True, True, True, True, False, False, False, False])
    assert ex.encode_code(np.zeros(16), 2).scale == ex.encode_code(np.zeros(16), 1).scale == 0


# ---- decode, stage by stage


def test_spread_lies_between_the_centroid_and_the_tokens(rng):
    """Jensen: a cluster's tokens weigh more than size * exp(logit of the centroid); g is the difference if normal."""
    head_dim, n = 16, 200_000
    variance = rng.uniform(0.5, 1.5, size=head_dim)
    keys = 2 + rng.normal(size=(n, head_dim)) * np.sqrt(variance)
    s = ex.cluster_statistics(keys, keys, np.zeros(n, dtype=int), 1)
    clusters = ex.Clusters(
        s.size, s.centroid, s.mean_value, s.spread, np.array([0]), s.segment_variance[None], s.segment_mean_value[None]
    )
    q, scale = rng.normal(size=(2, head_dim)), head_dim**-0.5
    true = ex.log_sum_exp(ex.exact_logits(q, keys, scale))
    without = ex.choice_logits(q, scale, clusters, 0.0)[:, 0]
    assert np.all(true > without)
    np.testing.assert_allclose(ex.choice_logits(q, scale, clusters, 1.0)[:, 0], true, atol=0.02)
    g = ex.spread_term(q, scale, clusters)[:, 0]
    np.testing.assert_allclose(ex.choice_logits(q, scale, clusters)[:, 0], without + 0.75 * g)
    np.testing.assert_allclose(ex.estimate_logits(q, scale, clusters, s.size)[:, 0], without + 0.25 * g)
    assert np.all(g > 0.1)


def test_only_the_estimate_caps_the_spread(rng):
    q, keys, values, scale = some_request(rng, heads=1)
    s = ex.cluster_statistics(keys, values, np.arange(len(keys)) % 12, 12)
    clusters = ex.Clusters(
        s.size,
        s.centroid,
        s.mean_value,
        s.spread,
        np.zeros(12, int),
        s.segment_variance[None],
        s.segment_mean_value[None],
    )
    q = q * np.sqrt(ex.SPREAD_CAP / np.median(ex.spread_term(q, scale, clusters)))
    g = ex.spread_term(q, scale, clusters)
    assert g.min() < ex.SPREAD_CAP < g.max()
    without = ex.choice_logits(q, scale, clusters, 0.0)
    np.testing.assert_allclose(ex.choice_logits(q, scale, clusters, 2.0), without + 2.0 * g)
    estimate = ex.estimate_logits(q, scale, clusters, s.size, 3.0) - without
    np.testing.assert_allclose(estimate, np.where(g < 2, 3 * g, 6))


def test_masses_per_token_are_shares_of_one(rng):
    choice, base = rng.normal(size=(3, 9)), rng.normal(size=(3, 4))
    size = rng.integers(1, 20, size=9)
    per_token = np.exp(ex.choice_log_mass(choice, base, size))
    base_mass = np.exp(base - ex.log_sum_exp(np.concatenate([choice, base], 1))[:, None]).sum(1).mean()
    assert per_token @ size + base_mass == pytest.approx(1)
    far = choice - np.array([[2000.0], [3000.0], [1999.0]])  # no float64 is as small as these shares
    log_mass = ex.choice_log_mass(far, base, size)
    assert log_mass.max() < -1900
    by_hand = [
        math.log(sum(math.exp(far[h, c] - ex.log_sum_exp(base)[h] + 2000) for h in range(3)) / 3 / size[c]) - 2000
        for c in range(9)
    ]
    np.testing.assert_allclose(log_mass, by_hand, rtol=1e-12)
    choice[:, 4], size[4] = -np.inf, 0
    assert ex.choice_log_mass(choice, base, size)[4] == -np.inf


def test_candidates_stop_at_the_limit_and_ties_go_lower():
    mass = np.array([-2.3, -1.2, -1.2, -np.inf, -1.6])
    size = np.array([5, 4, 3, 0, 6])
    assert ex.select_candidates(mass, size, 9) == [(1, 4), (2, 3), (4, 2)]
    assert ex.select_candidates(mass, size, 7) == [(1, 4), (2, 3)]  # 7 are reached: none of the next
    assert ex.select_candidates(mass, size, 1) == [(1, 1)]
    assert ex.select_candidates(mass, size, 100) == [(1, 4), (2, 3), (4, 6), (0, 5)]
    assert ex.select_candidates(mass, size, 0) == []
    assert ex.select_candidates(np.full(5, -np.inf), size, 6) == [(0, 5), (1, 1)]


def test_recall_ties_go_to_the_lower_position_of_the_sequence():
    score = np.array([1.0, 2.0, 1.0, 1.0, 0.5])
    position = np.array([90, 80, 20, 30, 10])
    np.testing.assert_array_equal(ex.recall(score, position, 3), [1, 2, 3])
    np.testing.assert_array_equal(ex.recall(score, position, 9), [1, 2, 3, 0, 4])
    # Less than 1e-30 is nothing, whichever is less.
    np.testing.assert_array_equal(ex.recall(np.array([1e-33, 2e-30, 1e-31, 1e-29]), position[:4], 4), [3, 1, 2, 0])


def test_candidate_logits_with_exact_residuals_are_exact(rng):
    q, keys, _, scale = some_request(rng, head_dim=96)
    rotation = ex.hadamard_rotation(96, random_signs(rng, 96))
    centroid = keys + rng.normal(size=keys.shape)
    logits = ex.candidate_logits(q, scale, rotation, centroid, (keys - centroid) @ rotation.T)
    np.testing.assert_allclose(logits, ex.exact_logits(q, keys, scale), rtol=1e-10, atol=1e-10)


def test_own_values_go_to_the_most_mass_and_the_rest_by_segment():
    est = np.log(np.array([[1.0, 3.0, 0.0, 2.0], [1.0, 1.0, 0.0, 2.0]]) + 1e-300)
    est[:, 2] = -np.inf
    mass, left = np.array([1.0, 0.5, 9.0, 2.0]), np.array([1, 4, 0, 1])
    np.testing.assert_array_equal(ex.own_value_clusters(mass, left, 1), [1])  # two have 2: the lower
    np.testing.assert_array_equal(ex.own_value_clusters(mass, left, 4), [1, 3, 0])
    np.testing.assert_array_equal(ex.own_value_clusters(mass * 1e-31, left, 4), [0, 1, 3])  # all are nothing
    np.testing.assert_array_equal(ex.own_value_clusters(mass * 1e-31, left, 3), [0, 1])  # the third has nothing left
    means = np.arange(4.0)[:, None]
    clusters = ex.Clusters(
        np.ones(4, int), means, means, np.zeros(4), np.array([0, 0, 1, 1]), np.zeros((2, 1)), np.array([[50.0], [60.0]])
    )
    np.testing.assert_array_equal(ex.estimate_values(clusters, np.array([1]))[:, 0], [50, 1, 60, 60])
    output, lse = ex.softmax_output(est, ex.estimate_values(clusters, np.array([1])))
    np.testing.assert_allclose(output[:, 0], [(50 + 3 + 120) / 6, (50 + 1 + 120) / 4])
    np.testing.assert_allclose(lse, np.log([6, 4]))


def test_parts_merge_to_the_softmax_over_all(rng):
    logits, values = 5 * rng.normal(size=(3, 20)), rng.normal(size=(20, 8))
    parts = [ex.softmax_output(logits[:, s], values[s]) for s in (slice(0, 7), slice(7, 7), slice(7, 20))]
    merged = ex.merge([o for o, _ in parts], [lse for _, lse in parts])
    np.testing.assert_allclose(merged, ex.softmax_output(logits, values)[0], atol=1e-12)


def test_stages_widen_float32(rng):
    """What the engine ships is float32; summed as such, the oracle would err like the engine."""
    q, keys, values, scale = (x if np.isscalar(x) else x.astype(np.float32) for x in some_request(rng))
    labels = np.arange(240) % 12
    centroids = ex.update_centroids(keys, labels, keys[:12])
    s = ex.cluster_statistics(keys, values, labels, 12)
    narrow = (x.astype(np.float32) for x in (s.centroid, s.mean_value, s.spread))
    vectors = (x.astype(np.float32)[None] for x in (s.segment_variance, s.segment_mean_value))
    clusters = ex.Clusters(s.size, *narrow, np.zeros(12, int), *vectors)
    choice, base = ex.choice_logits(q, scale, clusters).astype(np.float32), ex.exact_logits(q, keys[:9], scale)
    base = base.astype(np.float32)
    total = ex.total(choice, base).astype(np.float32)
    rotation = ex.hadamard_rotation(32).astype(np.float32)
    stages = {
        "assignment": ex.assignment_scores(keys, keys[:12]),
        "slack": ex.assignment_slack(ex.assignment_scores(keys, keys[:12]).astype(np.float32), labels),
        "centroids": centroids,
        "statistics": s.centroid,
        "decode": ex.decode_int(ex.encode_int4(keys[0]).values, ex.encode_int4(keys[0]).scale.astype(np.float32)),
        "stored": ex.store_centroid(keys[0], keys[1], "bf16"),
        "spread": ex.spread_term(q, scale, clusters),
        "choice": ex.choice_logits(q, scale, clusters),
        "mass": ex.choice_log_mass(choice, base, s.size),
        "total": ex.total(choice, base),
        "candidates": ex.candidate_logits(q, scale, rotation, keys, keys),
        "group mass": ex.group_mass(choice, total),
        "largest mass": ex.largest_mass(choice, total),
        "values": ex.estimate_values(clusters, np.array([1])),
        "output": ex.softmax_output(choice, values[:12])[0],
        "dense": ex.dense_attention(q, keys, values, scale),
        "merged": ex.merge([q, q], [total, total]),
    }
    assert {name for name, x in stages.items() if x.dtype != np.float64} == set()
    np.testing.assert_array_equal(centroids, ex.update_centroids(ex.f64(keys), labels, keys[:12]))
    np.testing.assert_array_equal(stages["total"], ex.total(ex.f64(choice), ex.f64(base)))


# ---- decode as a whole


@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("estimate", [True, False])
def test_a_budget_that_covers_everything_is_dense_attention(rng, refine, estimate):
    q, keys, values, scale = some_request(rng)
    rotation = ex.hadamard_rotation(32, random_signs(rng, 32))
    options = ex.Options(176, 176, 512, refine=refine, estimate=estimate)
    step = ex.request_output(q, keys, values, scale, SEGMENTS, rotation, options)
    np.testing.assert_array_equal(step.recalled_position, np.arange(16, 192))
    assert not step.left.any()
    np.testing.assert_allclose(step.output, ex.dense_attention(q, keys, values, scale), atol=1e-12)
    fewer = ex.request_output(q, keys, values, scale, SEGMENTS, rotation, options._replace(budget_tokens=40))
    assert np.abs(fewer.output - step.output).max() > 1e-6  # the equality above is not idle


def test_estimates_of_single_tokens_are_dense_attention(rng):
    q, keys, values, scale = some_request(rng)
    step = ex.request_output(
        q,
        keys,
        values,
        scale,
        SEGMENTS,
        ex.hadamard_rotation(32),
        ex.Options(0, 0, 176),
        tokens_per_cluster=1,
        centroid_dtype="exact",
    )
    assert len(step.recalled_position) == 0 and len(step.own) == 176
    np.testing.assert_allclose(step.output, ex.dense_attention(q, keys, values, scale), atol=1e-12)


@pytest.mark.parametrize("centroid_dtype", ["int4", "int8", "bf16"])
def test_tokens_add_up_at_a_small_budget(rng, centroid_dtype):
    q, keys, values, scale = some_request(rng)
    step = ex.request_output(
        q, keys, values, scale, SEGMENTS, ex.hadamard_rotation(32), ex.Options(20, 50, 6), centroid_dtype=centroid_dtype
    )
    assert sum(taken for _, taken in step.candidates) == len(step.candidate_position) == 50
    assert len(set(step.recalled_position.tolist())) == 20
    assert set(step.recalled_position) <= set(step.candidate_position)
    assert step.left.sum() + 20 == 176 and step.base_logits.shape == (3, 64)
    assert len(step.own) == 6


def test_whole_clusters_are_taken_without_refining(rng):
    q, keys, values, scale = some_request(rng)
    rotation, options = ex.hadamard_rotation(32), ex.Options(20, 50, 6, refine=False)
    step = ex.request_output(q, keys, values, scale, SEGMENTS, rotation, options)
    assert sum(taken for _, taken in step.candidates) == 20
    np.testing.assert_array_equal(step.recalled_position, np.sort(step.candidate_position))
    assert all(step.left[c] == 0 for c, _ in step.candidates[:-1])
    same_but_refined = ex.request_output(q, keys, values, scale, SEGMENTS, rotation, options._replace(refine=True))
    assert [c for c, _ in same_but_refined.candidates][: len(step.candidates)] == [c for c, _ in step.candidates]
    assert not np.array_equal(same_but_refined.recalled_position, step.recalled_position)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("estimate", "codes"), [(True, True), (True, False), (False, True)])
def test_decode_is_what_plain_loops_compute(seed, estimate, codes):
    rng = np.random.default_rng(seed)
    q, keys, values, scale = some_request(rng, head_dim=16, heads=2, tokens=112)
    segments, rotation = [(8, 40), (40, 96)], ex.hadamard_rotation(16, random_signs(rng, 16))
    stored = [ex.store_segment(keys[b:e], values[b:e], rotation, tokens_per_cluster=4) for b, e in segments]
    clusters, members, y = ex.request_clusters(segments, stored, 112)
    options = ex.Options(10, 24, 3, estimate=estimate, estimate_codes=codes)
    step = ex.decode(q, keys, values, scale, clusters, members, y, rotation, options)
    expected, recalled, total = loops(q, keys, values, scale, stored, [b for b, _ in segments], rotation, options)
    assert set(step.recalled_position.tolist()) == recalled
    np.testing.assert_allclose(step.total, np.log(total), atol=1e-12)
    np.testing.assert_allclose(step.output, expected, atol=1e-12)


def loops(q, keys, values, scale, stored, begins, rotation, options):
    """The same formulas without arrays: output [G, D], the recalled positions and exp(total) [G]."""
    heads, channels = range(len(q)), range(len(q[0]))
    of_position = {}  # position -> (segment, cluster)
    for s, segment in enumerate(stored):
        for i, c in enumerate(segment.labels):
            of_position[begins[s] + i] = (s, int(c))
    size = {}
    for where in of_position.values():
        size[where] = size.get(where, 0) + 1

    def dot(a, b):
        return sum(a[d] * b[d] for d in channels)

    def logit(h, where, n, weight, cap=math.inf):
        s, c = where
        g = scale**2 / 2 * stored[s].spread[c] * sum(q[h][d] ** 2 * stored[s].variance[d] for d in channels)
        return math.log(n) + scale * dot(q[h], stored[s].centroid[c]) + weight * min(g, cap)

    base = [t for t in range(len(keys)) if t not in of_position]
    base_mass = [sum(math.exp(scale * dot(q[h], keys[t])) for t in base) for h in heads]
    choice = {w: [math.exp(logit(h, w, size[w], options.choice_spread)) for h in heads] for w in size}
    whole = [base_mass[h] + sum(c[h] for c in choice.values()) for h in heads]
    per_token = {w: sum(choice[w][h] / whole[h] for h in heads) / len(q) / size[w] for w in size}
    total = [
        base_mass[h] + sum(math.exp(logit(h, w, size[w], options.estimate_spread, 2)) for w in size) for h in heads
    ]

    candidates = []
    for w in sorted(size, key=lambda w: (-per_token[w], w)):
        candidates += [t for t in sorted(of_position) if of_position[t] == w]
        if len(candidates) >= options.candidate_tokens:
            break
    rotated = [[dot(rotation[i], q[h]) for i in channels] for h in heads]

    def by_code(h, t):
        s, c = of_position[t]
        return math.exp(scale * (dot(q[h], stored[s].centroid[c]) + dot(rotated[h], stored[s].y[t - begins[s]])))

    def score(t):
        return max(by_code(h, t) / total[h] for h in heads)

    recalled = set(
        sorted(candidates[: options.candidate_tokens], key=lambda t: (-score(t), t))[: options.budget_tokens]
    )
    left = {w: size[w] - sum(of_position[t] == w for t in recalled) for w in size}
    est = {w: [math.exp(logit(h, w, left[w], options.estimate_spread, 2)) for h in heads] for w in size if left[w]}
    of_mean, lost = dict(est), {1: 1 - 2 / math.pi, 2: 0.1175}[options.code_bits]
    for w in est if options.estimate_codes else ():
        rest = [t for t in candidates[: options.candidate_tokens] if of_position[t] == w and t not in recalled]
        if rest:
            # What codes lose, as the spread is counted: the difference of the logit with that weight and with none.
            more = [logit(h, w, 1, lost, 2) - logit(h, w, 1, 0.0) for h in heads]
            est[w] = [left[w] * math.exp(more[h]) * sum(by_code(h, t) for t in rest) / len(rest) for h in heads]
    ranked = sorted(of_mean, key=lambda w: (-sum(of_mean[w][h] / total[h] for h in heads), w))
    output = []
    for h in heads:
        parts = [(math.exp(scale * dot(q[h], keys[t])), values[t]) for t in [*base, *sorted(recalled)]]
        if options.estimate:
            parts += [(est[w][h], stored[w[0]].mean_value[w[1]]) for w in ranked[: options.estimate_clusters]]
            for s in range(len(stored)):
                rest = sum(est[w][h] for w in ranked[options.estimate_clusters :] if w[0] == s)
                parts.append((rest, stored[s].segment_mean_value))
        mass = sum(m for m, _ in parts)
        output.append([sum(m * v[d] for m, v in parts) / mass for d in channels])
    return np.array(output), recalled, total
