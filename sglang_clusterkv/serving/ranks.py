"""One graph for all tensor-parallel ranks: a captured all-reduce reads its peers' memory where their capture of it lies.

A rank that replays the dense graph of a batch size, or none, while another one replays the sparse one reads what an earlier
step left there. Lengths and borders on the host say the same on all ranks, but a fault of ours on one makes its step dense, and
may leave it other segments for a while. So ranks agree in every launch of a decode batch: a message of the host, in the group
in which SGLang's ranks agree on their requests, that waits for no device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_clusterkv.serving.admission import least_of_ranks

if TYPE_CHECKING:
    from sglang_clusterkv.clusters.decoding import DecodeStep
    from sglang_clusterkv.clusters.engine import ClusterEngine

OTHER_RANK = "rank"  # in `steps_without_graph`: another rank's graph has no room
_DENSE, _WITHOUT_GRAPH, _GRAPH = range(3)


def agreed(engine: ClusterEngine, step: DecodeStep) -> DecodeStep:
    """The decode step that was begun, as all ranks run it: dense if one of them is, without a graph if one of them has to.

    Where nothing was captured each rank runs its own: their collectives come in the same order whatever attention does.
    """
    if engine.decoding.room is None:
        return step
    own = _DENSE if step.sparse is None else _GRAPH if step.too_large is None else _WITHOUT_GRAPH
    least = least_of_ranks(own)
    if least == own:
        return step
    return engine.turn_dense(step) if least == _DENSE else step._replace(too_large=OTHER_RANK)
