"""Which segments several requests of a step see, and which requests: what one reads of them may serve all.

Requests that share a prefix see the same segments, whose ids the host knows. Prefixes nest, so the list is per segment, not
per group of requests: one that A, B and C see has all three, a later one B and C alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class SharedSegments(NamedTuple):
    """U segments of a step that two or more of its B requests recall from; on the host.

    The requests of segment u, ascending, are `request[first[u] : first[u + 1]]`, and it is each one's segment of the ordinal
    beside it. Its pages are the same for all of them; where they lie in a request's list is the request's own.
    """

    first: np.ndarray  # int64 [U + 1]
    request: np.ndarray  # int64 [M]
    ordinal: np.ndarray  # int64 [M]
    of_request: np.ndarray  # bool [B, S], whether the request shares its segment of this ordinal


def no_shared_segments(batch: int, segments: int) -> SharedSegments:
    """Of B requests with up to S segments, none of which is shared."""
    none = np.zeros(0, np.int64)
    return SharedSegments(np.zeros(1, np.int64), none, none, np.zeros((batch, segments), bool))


def shared_segments(ids: np.ndarray, count: np.ndarray) -> SharedSegments:
    """Group the segments of B requests by id.

    Args:
        ids: int [B, S], of each request's segments.
        count: int [B], how many of them are recallable.
    """
    if len(ids) == 1:
        return no_shared_segments(*ids.shape)
    of_request = np.zeros(ids.shape, bool)
    request, ordinal = np.nonzero(np.arange(ids.shape[1]) < count[:, None])
    listed = ids[request, ordinal]
    order = np.argsort(listed, kind="stable")  # by id, then by request
    listed, request, ordinal = listed[order], request[order], ordinal[order]
    begins = np.flatnonzero(np.diff(listed, prepend=listed[:1] - 1))
    sizes = np.diff(begins, append=len(listed))
    several = np.repeat(sizes > 1, sizes)
    request, ordinal = request[several], ordinal[several]
    of_request[request, ordinal] = True
    return SharedSegments(np.concatenate(([0], np.cumsum(sizes[sizes > 1]))), request, ordinal, of_request)
