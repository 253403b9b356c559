"""Where a sparse step on a GPU pays: it has a cost that does not follow the context, launches and choices for every kv head.

Decided from host numbers alone, so that all tensor-parallel ranks decide alike. Nothing of Triton is imported here.
"""

from __future__ import annotations

from typing import NamedTuple


class BreakEven(NamedTuple):
    """Bytes of one layer's keys and values that a dense step has to read before a sparse one is faster.

    Attributes:
        bytes_per_pair: for each (request, kv head).
        least_bytes: for the batch, however few its requests.
    """

    bytes_per_pair: float
    least_bytes: float

    def pays(self, pairs: int, covered_bytes: int) -> bool:
        """Whether a step attends sparsely.

        Args:
            pairs: (request, kv head) of the requests that could.
            covered_bytes: of keys and values of one layer that the clusters of these cover.
        """
        return covered_bytes >= max(self.least_bytes, self.bytes_per_pair * pairs)


# By the model of a step's time on an H200 (`step_time.py`, `python -m benchmarks.break_even`), none of it measured: 73,000
# tokens of Llama-3.1-8B's kv heads in bf16, or 4,700 for each request.
MODELLED = BreakEven(bytes_per_pair=2.4e6, least_bytes=300e6)
