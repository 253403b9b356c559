"""Describe clusters and code tokens in Triton, and write them where the index keeps them, at the rows of the segment's pages.

Grid and names as in `kmeans.triton.segments`, order of sums as in `kmeans.triton`; the definition: `reference` and
`clusters/build.py`.
"""

from __future__ import annotations

from sglang_clusterkv.kernels.encode.triton.call import Call
from sglang_clusterkv.kernels.encode.triton.clusters import describe
from sglang_clusterkv.kernels.encode.triton.target import Target
from sglang_clusterkv.kernels.encode.triton.tokens import code, copy_members
from sglang_clusterkv.kernels.kmeans.triton.segments import Clustering, Pool, Segments
from sglang_clusterkv.memory.codec import RowCodec, TokenCodec


def write(
    keys: Pool, values: Pool, segments: Segments, found: Clustering, target: Target,
    *, page_size: int, clusters_per_page: int, rows: RowCodec, tokens: TokenCodec,
) -> None:  # fmt: skip
    """Describe the clusters of some segments, code their tokens, and write all of it to the index.

    Four launches, three without codes; does not wait for the device.

    Args:
        keys: the pool's, of L layers.
        values: likewise, with the strides of the keys.
        segments: of whole pages, four or more each.
        found: their clusters.
        target: the index's arrays of the same L layers; those of codes are None where none are kept.
        page_size: tokens per page.
        clusters_per_page: cluster rows per page.
        rows: format of centroids and mean values.
        tokens: format of the codes.
    """
    strides = keys.first.stride()[:2]
    assert values.first.stride()[:2] == strides, f"keys have strides {strides}, values {values.first.stride()[:2]}"
    call = Call(keys, values, segments, found, target, page_size, clusters_per_page, rows, tokens)
    describe(call)
    copy_members(call)
    if target.codes is not None:
        code(call)
