"""k-means in Triton: the keys of whole segments, of every layer and kv head, where they lie in the pool.

Grid and names as in `segments`. Sums run in the order of the member lists, which ascend: no atomics, the
same clusters for the same segment in every batch.
"""

from __future__ import annotations

from sglang_clusterkv.kernels.kmeans.triton.call import call_of
from sglang_clusterkv.kernels.kmeans.triton.labels import assign
from sglang_clusterkv.kernels.kmeans.triton.means import update
from sglang_clusterkv.kernels.kmeans.triton.members import list_members
from sglang_clusterkv.kernels.kmeans.triton.outliers import move_to_outliers
from sglang_clusterkv.kernels.kmeans.triton.segments import Clustering, Pool, Segments
from sglang_clusterkv.kernels.kmeans.triton.start import place_first


def cluster(keys: Pool, segments: Segments, passes: int) -> Clustering:
    """Cluster the keys of some segments, for every layer and kv head; see `reference.labels_of`.

    Three launches in a pass and five for outliers, without waiting for the device. Scratch: 4 D + 8 bytes per cluster and
    head, 8 bytes per token and head.

    Args:
        keys: the pool's.
        segments: of at most 32,767 tokens.
        passes: assignments made, at least 1.
    """
    assert segments.max_tokens <= 32767, f"{segments.max_tokens} tokens: offsets in a segment are int16"
    call = call_of(keys, segments)
    place_first(call)
    for done in range(1, passes + 1):
        assign(call)
        list_members(call)
        if done < passes:
            update(call)
        if segments.outliers and done == passes - 1:
            move_to_outliers(call)
    return call.found
