"""docs/design.md, "Exactly", written down a second time in float64 numpy: the oracle of the engine's tests.

It imports nothing of the package and was written without reading it, so that an error in one is not in the other.
A build function takes one (segment, kv head), a decode function one (request, kv head) with its G query heads.
Each stage is a function of its own: a test feeds it the shipped output of the stage before and compares the one stage.
`decode` runs the stages in a row and hands back every intermediate; `request_output` starts from raw keys and values.

Shapes: M tokens of a segment, C clusters, S segments, D = head_dim, G query heads of the kv head, N candidates,
B base tokens (sinks and window), T tokens of the sequence. "Position" is a token's place in the sequence.
Nothing is rounded unless the function says so (`bf16`, `encode_*`, `store_*`).

Not here: which segments there are (the planner's promise), dense reasons, packed 8-bit rows and packed codes.

Red when: test_exactly.py fails (a stage no longer does what its docstring says), or a test that compares the engine
with a stage fails (engine and design disagree).
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BF16_MAX = (2 - 2**-7) * 2.0**127
GROUP_CHANNELS_MAX = 32
CODE_THRESHOLD = 0.9816  # in units of rms(y)
CODE_INNER = 0.453
CODE_OUTER = 1.510
SPREAD_CAP = 2.0  # of g in the estimate
MOVEMENT_RANK = 8
NO_MASS = 1e-30  # a mass below counts as none where tokens and clusters are ranked
MOST_MASS = 1e20  # a token's by its code, where it is estimated
CODE_LOSS = {1: 1 - 2 / np.pi, 2: 0.1175}  # of a normal variable's energy, by bits
CODED_WEIGHT, OTHER_WEIGHT = 0.5, 1.0  # of the movement of values, of clusters that codes tell of and of all others


def f64(x: ArrayLike) -> Floats:
    """Every stage widens what it is fed: the engine's float32 arrays must not be summed in float32 here."""
    return np.asarray(x, dtype=np.float64)


def bf16(x: ArrayLike) -> Floats:
    """Round to the nearest bfloat16, halves to even, subnormals kept, beyond the largest to infinity; as float64."""
    x = f64(x)
    _, exponent = np.frexp(x)  # |x| in [.5, 1) * 2 ** exponent
    quantum = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
    rounded = np.rint(x / quantum) * quantum
    return np.where(np.abs(rounded) > BF16_MAX, np.copysign(np.inf, x), rounded)


def log_sum_exp(x: Floats) -> Floats:
    """Over the last axis; -inf where it is empty or all -inf."""
    x = f64(x)
    largest = np.max(x, axis=-1, initial=-np.inf)
    shift = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):
        return shift + np.log(np.sum(np.exp(x - shift[..., None]), axis=-1))


# ---- the rotation of the codes


def hadamard_rotation(head_dim: int, signs: ArrayLike | None = None) -> Floats:
    """R [D, D] = H diag(signs) / sqrt(block), with R @ x the rotated x.

    block is the largest power of two that divides D, H has Sylvester's matrix of that size in every diagonal block.
    signs [D] of +-1, all + when None.
    """
    block = head_dim & -head_dim
    sylvester = np.ones((1, 1))
    while len(sylvester) < block:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    diagonal = np.ones(head_dim) if signs is None else f64(signs)
    assert diagonal.shape == (head_dim,) and np.all(np.abs(diagonal) == 1), signs
    return np.kron(np.eye(head_dim // block), sylvester) * diagonal / np.sqrt(block)


# ---- k-means


class KMeans(NamedTuple):
    labels: Ints  # [M] cluster of each token: the last assignment
    centroids: Floats  # [passes, C, D] relative to mean_key; those that each assignment saw ([0] is the start)
    scores: Floats  # [M, C] of the last assignment


def assignment_scores(keys_centered: Floats, centroids: Floats) -> Floats:
    """[M, C] = 2 x.c - |c|^2; a token goes to its largest, ties to the lower cluster."""
    centroids = f64(centroids)
    return 2 * f64(keys_centered) @ centroids.T - np.sum(centroids**2, axis=1)


def assign(scores: Floats) -> Ints:
    """Labels [M] of scores [M, C]."""
    return np.argmax(scores, axis=1)  # argmax takes the first of equals


def assignment_slack(scores: Floats, labels: Ints) -> Floats:
    """[M] how far the score of a given label is from the token's best, relative to the token's largest |score|.

    0 for the labels of `assign`. Labels computed in float32 are right where it is below the tolerance (1e-5).
    """
    scores = f64(scores)
    given = np.take_along_axis(scores, np.asarray(labels, dtype=np.int64)[:, None], axis=1)[:, 0]
    size = np.max(np.abs(scores), axis=1)
    return (np.max(scores, axis=1) - given) / np.where(size > 0, size, 1.0)


def start_centroids(keys_centered: Floats, clusters: int) -> Floats:
    """[C, D]: key floor(j M / C) for cluster j."""
    return keys_centered[np.arange(clusters) * len(keys_centered) // clusters]


def update_centroids(keys_centered: Floats, labels: Ints, previous: Floats) -> Floats:
    """[C, D] means of the members; a cluster without members keeps its previous centroid."""
    keys_centered, centroids = f64(keys_centered), f64(previous).copy()
    for c in np.unique(labels):
        centroids[c] = np.mean(keys_centered[labels == c], axis=0)
    return centroids


class Outliers(NamedTuple):
    centroids: Floats  # [C, D] those that the last assignment sees
    margin: float  # how clear the choices were: 0 where the last key or cluster taken and the first one left are equal


def costs_to_leave(sizes: Ints, centroids: Floats) -> Floats:
    """[C] size times squared distance to the nearest larger cluster; of equally large ones the lower is the larger."""
    costs = np.full(len(sizes), np.inf)
    order = sorted(range(len(sizes)), key=lambda c: (-sizes[c], c))
    for place, c in enumerate(order):
        for larger in order[:place]:
            costs[c] = min(costs[c], sizes[c] * np.sum((centroids[c] - centroids[larger]) ** 2))
        if sizes[c] == 0:
            costs[c] = 0.0
    return costs


def give_to_outliers(keys_centered: Floats, labels: Ints, seen: Floats, centroids: Floats, outliers: int) -> Outliers:
    """At most `outliers` clusters, those that cost least to leave, get as many keys, ascending on both sides.

    The keys are those farthest from the centroids `seen` by the assignment that gave the labels; `centroids` are the means
    after it. Equal clusters count by number, equal keys by position. The n-th key and cluster are taken where the distance is
    larger than the cost. The margin is relative to the largest squared key.
    """
    keys_centered, moved = f64(keys_centered), f64(centroids).copy()
    sizes = np.bincount(labels, minlength=len(moved))
    distance = np.sum((keys_centered - f64(seen)[labels]) ** 2, axis=1)
    costs = costs_to_leave(sizes, moved)
    farthest, cheapest = np.argsort(-distance, kind="stable"), np.argsort(costs, kind="stable")
    gains = distance[farthest[:outliers]] - costs[cheapest[:outliers]]
    count = int(np.sum(gains > 0))
    moved[np.sort(cheapest[:count])] = keys_centered[np.sort(farthest[:count])]
    gaps = [np.abs(gains[np.isfinite(gains)]).min(initial=np.inf)]
    if 0 < count < len(distance):
        gaps.append(distance[farthest[count - 1]] - distance[farthest[count]])
    if 0 < count < len(costs) and costs[cheapest[count]] > 0:
        gaps.append(costs[cheapest[count]] - costs[cheapest[count - 1]])
    return Outliers(moved, float(min(gaps) / max(np.sum(keys_centered**2, axis=1).max(), 1e-300)))


def kmeans_labels(
    keys: Floats, mean_key: Floats, tokens_per_cluster: int, passes: int = 3, outliers: int = 0
) -> KMeans:
    """Labels of `passes` assignments with means between them, outliers put before the last. keys [M, D], mean_key [D].

    In exact arithmetic mean_key changes no label: |x - c| does not know the origin.
    """
    assert len(keys) % tokens_per_cluster == 0, (len(keys), tokens_per_cluster)
    centered = f64(keys) - f64(mean_key)
    centroids = [start_centroids(centered, len(keys) // tokens_per_cluster)]
    for _ in range(passes - 1):
        labels = assign(assignment_scores(centered, centroids[-1]))
        centroids.append(update_centroids(centered, labels, centroids[-1]))
    if passes > 1:
        centroids[-1] = give_to_outliers(centered, labels, *centroids[-2:], outliers).centroids
    scores = assignment_scores(centered, centroids[-1])
    return KMeans(assign(scores), np.stack(centroids), scores)


class ClusterStatistics(NamedTuple):
    """Unrounded."""

    size: Ints  # [C]; 0: an empty cluster, the rest of its line is 0
    centroid: Floats  # [C, D] mean of the members' keys, absolute
    mean_value: Floats  # [C, D]
    spread: Floats  # [C] s_c = sum_d var_cd / sum_d V_d, 0 where V sums to 0
    members: list[Ints]  # C arrays of offsets in the segment, ascending
    segment_mean_key: Floats  # [D]
    segment_mean_value: Floats  # [D]
    segment_variance: Floats  # [D] V_d = sum_c n_c var_cd / sum_c n_c


def cluster_statistics(keys: Floats, values: Floats, labels: Ints, clusters: int) -> ClusterStatistics:
    """Means, sizes and spreads from labels. keys and values [M, D], labels [M] below `clusters`."""
    keys, values = f64(keys), f64(values)
    members = [np.flatnonzero(labels == c) for c in range(clusters)]
    size = np.array([len(m) for m in members])
    centroid = np.zeros((clusters, keys.shape[1]))
    mean_value = np.zeros((clusters, keys.shape[1]))
    variance = np.zeros((clusters, keys.shape[1]))
    for c in np.flatnonzero(size):
        centroid[c] = np.mean(keys[members[c]], axis=0)
        mean_value[c] = np.mean(values[members[c]], axis=0)
        variance[c] = np.mean((keys[members[c]] - centroid[c]) ** 2, axis=0)
    segment_variance = size @ variance / np.sum(size)
    whole = np.sum(segment_variance)
    spread = np.sum(variance, axis=1) / whole if whole > 0 else np.zeros(clusters)
    return ClusterStatistics(
        size, centroid, mean_value, spread, members, np.mean(keys, axis=0), np.mean(values, axis=0), segment_variance
    )


# ---- rows: 4 bits, 8 bits, bf16


def group_channels(head_dim: int) -> int:
    """Channels that share a scale: as many slices of D/8 as tile D and stay within 32 channels, one at least."""
    assert head_dim % 16 == 0, f"head_dim={head_dim} is no multiple of 16"
    slice_channels = head_dim // 8
    return slice_channels * max(n for n in (1, 2, 4, 8) if n == 1 or n * slice_channels <= GROUP_CHANNELS_MAX)


class EncodedRow(NamedTuple):
    values: Ints  # [D]
    scale: Floats  # [D / group] bf16
    quotient: Floats  # [D] x / scale before rounding: near k + 1/2, float32 may fall to the other side


def encode_int(x: Floats, bits: int) -> EncodedRow:
    """x [D] to integers of `bits` (4 or 8) bits; groups of consecutive channels, each with a bf16 scale."""
    top = {4: 7, 8: 127}[bits]
    x = f64(x)
    groups = x.reshape(-1, group_channels(len(x)))
    scale = bf16(np.max(np.abs(groups), axis=1) / top)
    divisor = np.where(scale > 0, scale, 1.0)[:, None]
    quotient = np.where(scale[:, None] > 0, groups / divisor, 0.0)
    values = np.clip(np.rint(quotient), -top - 1, top).astype(np.int64)  # rint: halves to even
    return EncodedRow(values.ravel(), scale, quotient.ravel())


def encode_int4(x: Floats) -> EncodedRow:
    return encode_int(x, 4)


def encode_int8(x: Floats) -> EncodedRow:
    return encode_int(x, 8)


def decode_int(values: Ints, scale: Floats) -> Floats:
    """[D] from integers [D] and the groups' scales [D / group]."""
    return f64(values) * np.repeat(f64(scale), len(values) // len(scale))


def pack_int4(values: Ints) -> NDArray[np.uint32]:
    """Words [D/8] of values [D] in -8..7: nibble j (from the low end) of word i is channel j D/8 + i."""
    values = np.asarray(values, dtype=np.int64)
    assert len(values) % 8 == 0 and np.all((values >= -8) & (values <= 7)), values
    words = np.zeros(len(values) // 8, dtype=np.int64)
    for j, channels in enumerate(values.reshape(8, -1)):
        words |= (channels & 15) << (4 * j)
    return words.astype(np.uint32)


def unpack_int4(words: NDArray[np.uint32]) -> Ints:
    """Values [D] of words [D/8]."""
    nibbles = np.stack([(np.asarray(words).astype(np.int64) >> (4 * j)) & 15 for j in range(8)])
    return np.where(nibbles > 7, nibbles - 16, nibbles).ravel()


def store_row(x: Floats, dtype: str) -> Floats:
    """[D] as it is read back after storing as `int4`, `int8` or `bf16`; `exact` changes nothing (self-checks)."""
    if dtype == "exact":
        return f64(x)
    if dtype == "bf16":
        return bf16(x)
    row = encode_int(x, {"int4": 4, "int8": 8}[dtype])
    return decode_int(row.values, row.scale)


def store_centroid(centroid: Floats, stored_mean_key: Floats, dtype: str) -> Floats:
    """[D] absolute: the row is relative to the segment's mean key as stored."""
    mean_key = f64(stored_mean_key)
    return mean_key + store_row(f64(centroid) - mean_key, dtype)


# ---- codes of keys


class Code(NamedTuple):
    codes: Ints  # [D] bit 0: negative; bit 1 (2 bits only): the outer level
    scale: float  # bf16


def code_levels(codes: Ints, bits: int) -> Floats:
    """l [D]: +-1 with 1 bit, +-.453 or +-1.510 with 2."""
    size = np.ones(len(codes)) if bits == 1 else np.where(codes & 2, CODE_OUTER, CODE_INNER)
    return np.where(codes & 1, -size, size)


def code_scale(y: Floats, levels: Floats) -> float:
    """Unrounded b = <y, l> / <l, l>, the least squares of y - b l; with 1 bit that is mean |y|."""
    y, levels = f64(y), f64(levels)
    return float(y @ levels / (levels @ levels))


def encode_code(y: Floats, bits: int) -> Code:
    """Code of y [D] = R (k - stored centroid)."""
    y = f64(y)
    codes = (y < 0).astype(np.int64)  # sign(0) = +
    if bits == 2:
        codes += 2 * (np.abs(y) >= CODE_THRESHOLD * np.sqrt(np.mean(y**2)))
    else:
        assert bits == 1, bits
    scale = code_scale(y, code_levels(codes, bits)) if np.any(y) else 0.0
    return Code(codes, float(bf16(scale)))


def decode_code(codes: Ints, scale: float, bits: int) -> Floats:
    """y [D] = b l."""
    return scale * code_levels(codes, bits)


def code_is_close(y: Floats, bits: int, tolerance: float) -> NDArray[np.bool_]:
    """[D] channels whose level hangs on less than tolerance * rms(y): there float32 may choose another."""
    size, rms = np.abs(f64(y)), np.sqrt(np.mean(f64(y) ** 2))
    close = size < tolerance * rms
    return close | (np.abs(size - CODE_THRESHOLD * rms) < tolerance * rms) if bits == 2 else close


# ---- movement of values with keys


def movement_rank(tokens: int, page_size: int) -> int:
    """Components of a segment of so many tokens: one a page behind its first four, eight at most."""
    return max(0, min(MOVEMENT_RANK, tokens // page_size - 4))


def covariance(keys: Floats, values: Floats, labels: Ints) -> Floats:
    """[D of values, D of keys] mean over the tokens of (value - its cluster's mean) (key - its cluster's mean)^T."""
    keys, values = f64(keys).copy(), f64(values).copy()
    for c in np.unique(labels):
        keys[labels == c] -= keys[labels == c].mean(axis=0)
        values[labels == c] -= values[labels == c].mean(axis=0)
    return values.T @ keys / len(keys)


def gram_schmidt(x: Floats) -> Floats:
    """[R, D] orthonormal rows; a row of which less than 1e-5 is left becomes 0."""
    made: list[Floats] = []
    for row in f64(x):
        rest = row.copy()
        for before in made:
            rest -= (rest @ before) * before
        length = np.linalg.norm(rest)
        made.append(rest / length if length > 1e-5 * np.linalg.norm(row) else np.zeros_like(row))
    return np.stack(made)


def movement_factors(covariance: Floats, rank: int, rotation: Floats) -> tuple[Floats, Floats]:
    """Rows that meet the query and rows that are added [R, D], unrounded: three passes of subspace iteration."""
    meets = rotation[np.arange(rank) * len(rotation) // rank]
    for _ in range(3):
        meets = gram_schmidt(gram_schmidt(meets @ covariance.T) @ covariance)
    return meets, meets @ covariance.T


def store_movement(covariance: Floats, rank: int, rotation: Floats, exact: bool = False) -> Floats:
    """[D of values, D of keys] as it is read back, its rows in 4 bits; 0 without components."""
    if rank == 0:
        return np.zeros_like(covariance)
    rows = movement_factors(covariance, rank, rotation)
    meets, adds = rows if exact else (np.stack([store_row(row, "int4") for row in part]) for part in rows)
    return adds.T @ meets


# ---- a stored segment


class StoredSegment(NamedTuple):
    """What decode reads back of one (segment, kv head)."""

    labels: Ints  # [M]
    members: list[Ints]  # C arrays of offsets in the segment, ascending
    size: Ints  # [C]
    centroid: Floats  # [C, D] absolute
    mean_value: Floats  # [C, D]
    spread: Floats  # [C] bf16
    mean_key: Floats  # [D] bf16
    segment_mean_value: Floats  # [D] bf16
    variance: Floats  # [D] bf16
    y: Floats  # [M, D] decoded codes, rotated
    movement: Floats | None = None  # [D of values, D of keys], of a cluster of spread 1


def store_segment(
    keys: Floats,
    values: Floats,
    rotation: Floats,
    tokens_per_cluster: int = 8,
    passes: int = 3,
    centroid_dtype: str = "int4",
    code_bits: int = 2,
    outlier_share: float = 0.0,
    moving_page: int = 0,
) -> StoredSegment:
    """Cluster and encode keys and values [M, D]; centroid_dtype `exact` leaves everything but the codes unrounded.

    moving_page: tokens of a page, where values move with keys; 0: they don't.
    """
    keys, values = f64(keys), f64(values)
    rounded = f64 if centroid_dtype == "exact" else bf16
    mean_key = rounded(np.mean(keys, axis=0))
    outliers = math.floor(len(keys) // tokens_per_cluster * outlier_share)
    labels = kmeans_labels(keys, mean_key, tokens_per_cluster, passes, outliers).labels
    statistics = cluster_statistics(keys, values, labels, len(keys) // tokens_per_cluster)
    centroid = np.stack([store_centroid(c, mean_key, centroid_dtype) for c in statistics.centroid])
    y = []
    for key, label in zip(keys, labels, strict=True):
        code = encode_code(rotation @ (key - centroid[label]), code_bits)
        y.append(decode_code(code.codes, code.scale, code_bits))
    return StoredSegment(
        labels=labels,
        members=statistics.members,
        size=statistics.size,
        centroid=centroid,
        mean_value=np.stack([store_row(v, centroid_dtype) for v in statistics.mean_value]),
        spread=rounded(statistics.spread),
        mean_key=mean_key,
        segment_mean_value=rounded(statistics.segment_mean_value),
        variance=rounded(statistics.segment_variance),
        y=np.stack(y),
        movement=store_movement(
            covariance(keys, values, labels),
            movement_rank(len(keys), moving_page),
            rotation,
            centroid_dtype == "exact",
        )
        if moving_page
        else None,
    )


# ---- decode, stage by stage


class Clusters(NamedTuple):
    """A request's clusters in the order of its pages: cluster c is the one at position c. All as stored, decoded."""

    size: Ints  # [C]
    centroid: Floats  # [C, D] absolute
    mean_value: Floats  # [C, D]
    spread: Floats  # [C]
    segment: Ints  # [C] index into the two below
    variance: Floats  # [S, D]
    segment_mean_value: Floats  # [S, D]
    movement: Floats | None = None  # [S, D of values, D of keys]; None: values do not move


class Options(NamedTuple):
    budget_tokens: int
    candidate_tokens: int
    estimate_clusters: int
    choice_spread: float = 0.75
    estimate_spread: float = 0.25
    refine: bool = True
    estimate: bool = True
    estimate_codes: bool = True
    code_bits: int = 2


def exact_logits(q: Floats, k: Floats, scale: float) -> Floats:
    """[G, n] of queries [G, D] and keys [n, D]."""
    return scale * f64(q) @ f64(k).T


def spread_term(q: Floats, scale: float, clusters: Clusters) -> Floats:
    """g [G, C] = 1/2 scale^2 s_c sum_d q_d^2 V_d, with V of the cluster's segment."""
    return 0.5 * scale**2 * f64(clusters.spread) * (f64(q) ** 2 @ f64(clusters.variance).T)[:, clusters.segment]


def cluster_logits(
    q: Floats, scale: float, clusters: Clusters, size: Ints, spread_weight: float, cap: float = np.inf
) -> Floats:
    """[G, C] = log size_c + scale q.centroid_c + spread_weight min(g, cap); -inf where size is 0."""
    with np.errstate(divide="ignore"):
        log_size = np.log(f64(size))
    bonus = spread_weight * np.minimum(spread_term(q, scale, clusters), cap)
    return log_size + exact_logits(q, clusters.centroid, scale) + bonus


def choice_logits(q: Floats, scale: float, clusters: Clusters, choice_spread: float = 0.75) -> Floats:
    """choice [G, C], by full sizes; g has no cap here."""
    return cluster_logits(q, scale, clusters, clusters.size, choice_spread)


def estimate_logits(q: Floats, scale: float, clusters: Clusters, left: Ints, estimate_spread: float = 0.25) -> Floats:
    """est [G, C] by the sizes left [C]; with clusters.size as left, the logits that `total` sums."""
    return cluster_logits(q, scale, clusters, left, estimate_spread, SPREAD_CAP)


def estimate_by_codes(
    est: Floats, left: Ints, logits: Floats, cluster: Ints, total_logits: Floats, spreads: Floats, code_bits: int
) -> Floats:
    """est [G, C], where clusters of candidates that were not recalled have the mean mass of these per token left [C].

    logits [G, n], by codes, and cluster [n] of these candidates; total_logits [G]; spreads [G, C]: g.
    """
    est = f64(est).copy()
    logits = np.minimum(f64(logits), f64(total_logits)[:, None] + np.log(MOST_MASS))
    for c in np.unique(cluster):
        mine = logits[:, cluster == c]
        mean = log_sum_exp(mine) - np.log(mine.shape[1])
        est[:, c] = np.log(left[c]) + mean + CODE_LOSS[code_bits] * np.minimum(spreads[:, c], SPREAD_CAP)
    return est


def choice_log_mass(choice: Floats, base_logits: Floats, size: Ints) -> Floats:
    """[C] log of the mean over the group of p / n_c, p = softmax over choice [G, C] and base_logits [G, B].

    -inf where size is 0. A log, for p of a sharp head may be less than any float.
    """
    choice = f64(choice)
    log_p = choice - log_sum_exp(np.concatenate([choice, base_logits], axis=1))[:, None]
    return log_sum_exp(log_p.T) - np.log(len(choice)) - np.log(np.maximum(size, 1))


def total(estimate_of_all: Floats, base_logits: Floats) -> Floats:
    """[G] log-sum-exp over the estimate logits of all clusters with full sizes [G, C] and base_logits [G, B]."""
    return log_sum_exp(np.concatenate([estimate_of_all, base_logits], axis=1))


def select_candidates(log_mass: Floats, size: Ints, candidate_tokens: int) -> list[tuple[int, int]]:
    """(cluster, members taken), best cluster first, ties to the lower cluster, until candidate_tokens are reached.

    A cluster is taken while the sum before it is < candidate_tokens; of the last one only so many members, the first
    of its list, that at most candidate_tokens remain. Clusters of size 0 are not there.
    """
    chosen, tokens = [], 0
    for c in np.argsort(-log_mass, kind="stable"):
        if tokens >= candidate_tokens:
            break
        if size[c] > 0:
            taken = min(int(size[c]), candidate_tokens - tokens)
            chosen.append((int(c), taken))
            tokens += taken
    return chosen


def candidate_logits(q: Floats, scale: float, rotation: Floats, centroid: Floats, y: Floats) -> Floats:
    """[G, N] = scale (q.centroid + <R q, y>); per candidate, centroid [N, D] of its cluster and y [N, D] decoded."""
    q = f64(q)
    return scale * (q @ f64(centroid).T + (q @ f64(rotation).T) @ f64(y).T)


def largest_mass(logits: Floats, total_logits: Floats) -> Floats:
    """[n] the group's largest exp(logit - total); logits [G, n], total_logits [G]."""
    return np.max(np.exp(f64(logits) - f64(total_logits)[:, None]), axis=0)


def group_mass(logits: Floats, total_logits: Floats) -> Floats:
    """[n] mean over the group of exp(logit - total); logits [G, n], total_logits [G]."""
    return np.mean(np.exp(f64(logits) - f64(total_logits)[:, None]), axis=0)


def or_none(mass: Floats) -> Floats:
    """Masses, 0 where they are below NO_MASS."""
    return np.where(f64(mass) < NO_MASS, 0.0, mass)


def recall(score: Floats, position: Ints, budget_tokens: int) -> Ints:
    """Indices into the candidates: the min(budget_tokens, N) with the largest score, best first.

    score [N]; position [N] in the sequence: of equal scores the lower position wins.
    """
    return np.lexsort((position, -or_none(score)))[:budget_tokens]


def left_sizes(size: Ints, recalled_cluster: Ints) -> Ints:
    """[C] sizes without the recalled tokens; recalled_cluster [n] names the cluster of each."""
    left = np.asarray(size) - np.bincount(np.asarray(recalled_cluster, dtype=np.int64), minlength=len(size))
    assert np.all(left >= 0), (size, recalled_cluster)
    return left


def estimate_mass_per_token(
    q: Floats, scale: float, clusters: Clusters, total_logits: Floats, estimate_spread: float = 0.25
) -> Floats:
    """[C] mean over the group of exp(est - total) by one token of each cluster."""
    one = np.ones_like(clusters.size)
    return group_mass(estimate_logits(q, scale, clusters, one, estimate_spread), total_logits)


def own_value_clusters(mass_per_token: Floats, left: Ints, estimate_clusters: int) -> Ints:
    """Clusters estimated by their own mean value: largest mass left first, ties to the lower.

    None with 0 left; but where so many masses are none, such clusters have a place among these.
    """
    order = np.argsort(-or_none(f64(mass_per_token) * left), kind="stable")
    own = order[:estimate_clusters]
    return own[np.asarray(left)[own] > 0]


def estimate_values(clusters: Clusters, own: Ints) -> Floats:
    """[C, D] the value by which each cluster is estimated: its own mean value in `own`, else its segment's.

    Summing exp(est) times these is the same as summing the others' exp(est) per head and segment first.
    """
    values = f64(clusters.segment_mean_value)[clusters.segment]
    values[own] = clusters.mean_value[own]
    return values


def softmax_output(logits: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Output [G, D] and log-sum-exp [G] of logits [G, n] and values [n, D]; 0 and -inf where there is no mass."""
    lse = log_sum_exp(logits)
    weights = np.exp(f64(logits) - np.where(np.isfinite(lse), lse, 0.0)[:, None])
    return weights @ f64(values), lse


def movement_weights(clusters: Clusters, estimate_spread: float, coded: Ints | None) -> Floats:
    """[C] how much of their movement clusters have; coded: those that codes tell of; None: codes are not in the estimate."""
    weight = np.full(len(clusters.size), estimate_spread if coded is None else OTHER_WEIGHT)
    if coded is not None:
        weight[coded] = CODED_WEIGHT
    return weight


def moved(q: Floats, scale: float, clusters: Clusters, est: Floats, weight: Floats) -> Floats:
    """[G, D] what the movement of values adds to the output of the softmax over est [G, C]; 0 where that is empty.

    weight [C]: how much of it each cluster has.
    """
    if clusters.movement is None:
        return np.zeros_like(q, dtype=np.float64)
    lse = log_sum_exp(est)
    weights = np.exp(f64(est) - np.where(np.isfinite(lse), lse, 0.0)[:, None])
    by_cluster = np.einsum("svk,gk->gsv", f64(clusters.movement), f64(q))[:, clusters.segment]
    return scale * np.einsum("gc,c,gcv->gv", weights, weight * f64(clusters.spread), by_cluster)


def merge(outputs: list[Floats], lses: list[Floats]) -> Floats:
    """[G, D] of parts with outputs [G, D] and log-sum-exps [G]: what one softmax over all of them gives."""
    lse = f64(np.stack(lses, axis=1))  # [G, parts]
    weights = np.exp(lse - log_sum_exp(lse)[:, None])
    return np.einsum("gp,pgd->gd", weights, f64(np.stack(outputs)))


def dense_attention(q: Floats, k: Floats, v: Floats, scale: float) -> Floats:
    """[G, D] of q [G, D] over all of k and v [T, D]."""
    return softmax_output(exact_logits(q, k, scale), v)[0]


# ---- decode as a whole


class Decoded(NamedTuple):
    """Every stage of one decode step."""

    base_logits: Floats  # [G, B]
    choice: Floats  # [G, C]
    log_mass: Floats  # [C]
    total: Floats  # [G]
    candidates: list[tuple[int, int]]  # (cluster, members taken), best first
    candidate_cluster: Ints  # [N]
    candidate_position: Ints  # [N]
    candidate_logits: Floats  # [G, N]; without refine nobody asks for them and they are still here
    recalled_position: Ints  # [n] ascending
    left: Ints  # [C]
    est: Floats  # [G, C] by the sizes left, and by codes
    own: Ints  # clusters estimated by their own mean value; empty without estimate
    output: Floats  # [G, D]


def decode(
    q: Floats,
    keys: Floats,
    values: Floats,
    scale: float,
    clusters: Clusters,
    members: list[Ints],
    y: Floats,
    rotation: Floats,
    options: Options,
) -> Decoded:
    """One step of one (request, kv head).

    q [G, D]; keys and values [T, D]; members: per cluster its positions in the sequence, in the order of its list;
    y [T, D] decoded codes by position (lines of unclustered tokens are not read). The base is every position that is
    in no cluster.
    """
    q, keys, values = f64(q), f64(keys), f64(values)
    clustered = np.concatenate([*members, np.empty(0, dtype=np.int64)]).astype(np.int64)
    assert len(np.unique(clustered)) == len(clustered) == np.sum(clusters.size), (len(clustered), clusters.size)
    base = np.setdiff1d(np.arange(len(keys)), clustered)
    base_logits = exact_logits(q, keys[base], scale)

    choice = choice_logits(q, scale, clusters, options.choice_spread)
    log_mass = choice_log_mass(choice, base_logits, clusters.size)
    all_est = estimate_logits(q, scale, clusters, clusters.size, options.estimate_spread)
    total_logits = total(all_est, base_logits)
    estimate_mass = estimate_mass_per_token(q, scale, clusters, total_logits, options.estimate_spread)

    limit = options.candidate_tokens if options.refine else options.budget_tokens
    candidates = select_candidates(log_mass, clusters.size, limit)
    cluster = np.array([c for c, taken in candidates for _ in range(taken)], dtype=np.int64)
    position = np.array([p for c, taken in candidates for p in members[c][:taken]], dtype=np.int64)
    logits = candidate_logits(q, scale, rotation, clusters.centroid[cluster], y[position])
    if options.refine:
        chosen = recall(largest_mass(logits, total_logits), position, options.budget_tokens)
    else:
        chosen = np.arange(len(position))
    recalled = np.sort(position[chosen])

    left = left_sizes(clusters.size, cluster[chosen])
    est = estimate_logits(q, scale, clusters, left, options.estimate_spread)
    coded = None
    if options.refine and options.estimate_codes:
        rest = np.setdiff1d(np.arange(len(position)), chosen)
        spreads = spread_term(q, scale, clusters)
        est = estimate_by_codes(est, left, logits[:, rest], cluster[rest], total_logits, spreads, options.code_bits)
        coded = np.unique(cluster[rest])
    attended = np.concatenate([base, recalled])
    all_logits, all_values = [exact_logits(q, keys[attended], scale)], [values[attended]]
    own = np.empty(0, dtype=np.int64)
    if options.estimate:
        own = own_value_clusters(estimate_mass, left, options.estimate_clusters)
        all_logits.append(est)
        all_values.append(estimate_values(clusters, own))
    output, lse = softmax_output(np.concatenate(all_logits, axis=1), np.concatenate(all_values))
    if options.estimate:
        share = np.exp(log_sum_exp(est) - lse)[:, None]
        weight = movement_weights(clusters, options.estimate_spread, coded)
        output = output + share * moved(q, scale, clusters, est, weight)
    return Decoded(
        base_logits=base_logits,
        choice=choice,
        log_mass=log_mass,
        total=total_logits,
        candidates=candidates,
        candidate_cluster=cluster,
        candidate_position=position,
        candidate_logits=logits,
        recalled_position=recalled,
        left=left,
        est=est,
        own=own,
        output=output,
    )


def request_clusters(
    segments: list[tuple[int, int]], stored: list[StoredSegment], tokens: int
) -> tuple[Clusters, list[Ints], Floats]:
    """Clusters, members (positions) and y [tokens, D] of a request whose segments are [begin, end) in the sequence."""
    assert len(segments) == len(stored) > 0, (segments, len(stored))
    ends = [0] + [end for _, end in segments]
    assert all(end <= begin for end, (begin, _) in zip(ends, segments, strict=False)) and ends[-1] <= tokens, segments
    y = np.zeros((tokens, stored[0].y.shape[1]))
    members: list[Ints] = []
    for (begin, end), segment in zip(segments, stored, strict=True):
        y[begin:end] = segment.y
        members += [begin + m for m in segment.members]
    clusters = Clusters(
        size=np.concatenate([s.size for s in stored]),
        centroid=np.concatenate([s.centroid for s in stored]),
        mean_value=np.concatenate([s.mean_value for s in stored]),
        spread=np.concatenate([s.spread for s in stored]),
        segment=np.repeat(np.arange(len(stored)), [len(s.size) for s in stored]),
        variance=np.stack([s.variance for s in stored]),
        segment_mean_value=np.stack([s.segment_mean_value for s in stored]),
        movement=None if stored[0].movement is None else np.stack([f64(s.movement) for s in stored]),
    )
    return clusters, members, y


def request_output(
    q: Floats,
    keys: Floats,
    values: Floats,
    scale: float,
    segments: list[tuple[int, int]],
    rotation: Floats,
    options: Options,
    tokens_per_cluster: int = 8,
    centroid_dtype: str = "int4",
    code_bits: int = 2,
    outlier_share: float = 0.0,
    moving_page: int = 0,
) -> Decoded:
    """Cluster, store and decode one (request, kv head) from raw keys and values [T, D].

    segments: [begin, end) in the sequence, ascending and disjoint, at least one. What lies outside them is sinks and
    window.
    """
    stored = [
        store_segment(
            keys[begin:end],
            values[begin:end],
            rotation,
            tokens_per_cluster=tokens_per_cluster,
            centroid_dtype=centroid_dtype,
            code_bits=code_bits,
            outlier_share=outlier_share,
            moving_page=moving_page,
        )
        for begin, end in segments
    ]
    clusters, members, y = request_clusters(segments, stored, len(keys))
    return decode(q, keys, values, scale, clusters, members, y, rotation, options)
